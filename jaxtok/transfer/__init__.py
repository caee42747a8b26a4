"""Surgeries: pure functions from one model to another (`jaxtok.protocols.Surgery`), one file a system."""

"""Checkpoints of other code bases, in and out."""

"""Corpora and Grain pipelines."""

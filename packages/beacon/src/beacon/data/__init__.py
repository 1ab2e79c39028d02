"""Rows for beacon training."""

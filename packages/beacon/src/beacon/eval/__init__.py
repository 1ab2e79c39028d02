"""Evaluations of a beacon model."""

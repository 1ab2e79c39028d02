"""Beacons inside stock transformers models: one mixin for all families, executed block by block."""

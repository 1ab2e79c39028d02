"""Scaling laws: their formulas, how they are fitted, and where two of them cross. Free of torch."""

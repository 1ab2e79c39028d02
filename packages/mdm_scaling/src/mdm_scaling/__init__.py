"""Masked diffusion and autoregressive pre-training under one roof, and the scaling laws of both."""

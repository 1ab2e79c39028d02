"""Distil a Transformer into a student with RWKV time mixing, which generates with constant memory."""

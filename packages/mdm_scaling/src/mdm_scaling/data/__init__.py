"""Corpora in Megatron's format, and the order in which a run reads them."""

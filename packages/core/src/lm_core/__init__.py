"""Shared machinery of the training methods: options, data, the loop, engines, checkpoints and reports."""

"""Optimizers beside torch's AdamW: one paper, one file."""

"""Analysis: what a trained encoder has come to know, read from its hidden states."""

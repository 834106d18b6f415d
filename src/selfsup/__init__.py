"""Self-supervised learning on your own data, and the evidence of what it was worth."""

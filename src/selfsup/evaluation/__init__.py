"""Evaluation: metrics, classical baselines, and the comparison with training from scratch."""

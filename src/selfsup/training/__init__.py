"""Training: one loop that knows `Objective` and nothing else."""

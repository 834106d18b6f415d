"""Tasks: what labels ask for: head, loss, metric, prediction."""

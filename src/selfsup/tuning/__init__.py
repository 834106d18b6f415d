"""Tuning: which parameters move for a task, and what is added."""

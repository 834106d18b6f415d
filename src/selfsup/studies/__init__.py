"""Studies: one published claim each, made again at small scale."""

"""Models: a batch to features, for every kind of data."""

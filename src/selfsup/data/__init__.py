"""Data: files to numbered examples, for every kind of data."""

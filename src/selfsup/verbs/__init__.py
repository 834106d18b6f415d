"""The verbs, as functions on run folders: what `selfsup.api` gives and the command line calls."""

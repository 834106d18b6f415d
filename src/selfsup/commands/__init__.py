"""The command line, verb by verb: parsers, and what they print of what `selfsup.verbs` gives."""

"""Methods: how to learn without labels, one file each, in the families of the field."""

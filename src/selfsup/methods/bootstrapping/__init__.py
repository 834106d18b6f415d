"""Methods that predict their own slowly moving features."""

"""Methods that tell the example from others."""

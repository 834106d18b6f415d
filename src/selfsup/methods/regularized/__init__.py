"""Methods that keep features apart by their statistics."""

"""Methods that rebuild their input through a narrow code."""

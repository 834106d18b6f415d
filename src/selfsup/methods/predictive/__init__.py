"""Methods that predict a label that the data give for free."""

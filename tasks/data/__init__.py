"""One file a data set: its prepared form, how to read it, how to make it."""

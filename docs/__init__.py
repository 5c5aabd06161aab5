"""The documentation, and the program that makes the parts of it that follow from the code: python -m docs."""

"""Compares runs by the files they left on disk: python -m sage.report."""

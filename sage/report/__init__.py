"""Compare runs from what they left on disk: python -m sage.report."""

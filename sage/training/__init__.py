"""One run: its settings, the loop, what it measures, how it is put together."""

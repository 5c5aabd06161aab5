"""Who this process is among the workers of a run, and how they meet."""

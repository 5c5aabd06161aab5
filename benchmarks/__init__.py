"""Programs that measure, and their dated results in benchmarks/results/."""

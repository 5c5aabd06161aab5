"""Programs that measure, and their dated results in benchmarks/results/."""

from sage.workers import environment

environment.set_defaults()  # as run.py does, before torch is imported

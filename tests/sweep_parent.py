"""A sweep whose points are `python -c CODE`.

python -m tests.sweep_parent SWEEP RUNS CODE JOBS
"""

import sys
from pathlib import Path

from tests.test_sweep import run_points

if __name__ == "__main__":
    path, runs, code, num_jobs = sys.argv[1:]
    sys.exit(run_points(Path(path), Path(runs), ["-c", code], "--jobs", num_jobs))

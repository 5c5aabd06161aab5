"""Seconds and peak memory of preparing a data set of MovieLens 20M's size, from a generated ratings.csv.

.venv/bin/python -m benchmarks.ncf_prepare [--rows N] [--folder DIR]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

NUM_USERS, NUM_ITEMS = 138_493, 26_744
MOST_SECONDS, MOST_BYTES = 120.0, 6e9  # required; the program fails beyond
CHILD = """
import sys
from pathlib import Path
from tasks.data.movielens import ML_20M
print(ML_20M.prepare(Path(sys.argv[2]), Path(sys.argv[1])))
"""


def generate(file: Path, num_rows: int) -> None:
    """A ratings.csv in the official form, sorted by user and item; users and items of skewed frequency, each
    user with 20 ratings or more."""
    rng = np.random.default_rng(0)
    extra = num_rows - 20 * NUM_USERS
    users = np.concatenate(
        [np.repeat(np.arange(NUM_USERS), 20), _skewed(rng, NUM_USERS, extra, 1.5)]
    )  # (rows,)
    items = _skewed(rng, NUM_ITEMS, num_rows, 2.0)
    order = np.lexsort((items, users))
    frame = pd.DataFrame(
        {
            "userId": users[order] + 1,
            "movieId": items[order] * 5 + 1,  # ids have gaps, as the official ones
            "rating": rng.integers(1, 11, num_rows) / 2,
            "timestamp": rng.integers(789_652_009, 1_427_784_002, num_rows),
        }
    )
    frame.to_csv(file, index=False)


def _skewed(rng: np.random.Generator, count: int, size: int, power: float) -> np.ndarray:
    """Numbers (size,) below count, the small ones more frequent."""
    return (count * rng.random(size) ** power).astype(np.int64)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        file = Path(temporary) / "ratings.csv"
        generate(file, arguments.rows)
        print(f"{file}: {arguments.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB")
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", CHILD, str(file), temporary], check=True)
        seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_bytes = used.ru_maxrss * 1024  # Linux counts in KiB
    print(f"{seconds:.1f} s ({used.ru_utime + used.ru_stime:.1f} s of CPU), peak {peak_bytes / 1e9:.2f} GB")
    return int(seconds > MOST_SECONDS or peak_bytes > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

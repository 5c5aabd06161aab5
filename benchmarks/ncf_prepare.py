"""Seconds and peak memory of preparing a data set of MovieLens 20M's size, from a generated ratings.csv.

python -m benchmarks.ncf_prepare [--rows N] [--folder DIR] [--json FILE]
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.command import make_parser
from benchmarks.machine import load_average, machine
from benchmarks.made import draw_ratings
from sage.files import write_json
from tasks.data.movielens import ML_20M

_, NUM_USERS, NUM_ITEMS = ML_20M.sizes
MOST_SECONDS, MOST_BYTES = 120.0, 6e9
"""What preparation may take; the program fails where it takes more."""
CHILD = """
import sys
from pathlib import Path
from tasks.data.movielens import ML_20M
print(ML_20M.prepare(Path(sys.argv[2]), Path(sys.argv[1])))
"""


def generate(file: Path, num_rows: int) -> None:
    """Write a ratings.csv in the official format, sorted by user and item."""
    ratings = draw_ratings(num_rows, NUM_USERS, NUM_ITEMS)
    stars = np.random.default_rng(0).integers(1, 11, num_rows) / 2
    columns = {
        "userId": ratings.users + 1,
        "movieId": ratings.items * 5 + 1,  # ids have gaps, as the official ones
        "rating": stars,
        "timestamp": ratings.times,
    }
    pd.DataFrame(columns).to_csv(file, index=False)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        file = Path(temporary) / "ratings.csv"
        generate(file, arguments.rows)
        print(f"{file}: {arguments.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB")
        facts = machine()
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", CHILD, str(file), temporary], check=True)
        seconds = time.monotonic() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak_bytes = used.ru_maxrss * 1024  # Linux counts in KiB
    processor_seconds = used.ru_utime + used.ru_stime
    print(f"{seconds:.1f} s ({processor_seconds:.1f} s of CPU), peak {peak_bytes / 1e9:.2f} GB")
    if arguments.json:
        figures = {"seconds": seconds, "processor_seconds": processor_seconds, "peak_bytes": peak_bytes}
        facts |= {"rows": arguments.rows, **figures, "load_average_after": load_average()}
        write_json(arguments.json, facts)
    return int(seconds > MOST_SECONDS or peak_bytes > MOST_BYTES)


if __name__ == "__main__":
    sys.exit(main())

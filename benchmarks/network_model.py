"""The advisor's model of a network beside what benchmarks.network measured.

    python -m benchmarks.network_model FILE ... [--latency 50us]

Each FILE was written by python -m benchmarks.network --json FILE. error: of the prediction, relative to what
was measured. Messages of up to about 256 kB pass the virtual cluster's links at once (tc's tbf), and there a
message's latency is that of processes that share cores; so small messages at a low rate are faster than
predicted, and at a high rate slower.
"""

import argparse
import json
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.command import DocstringFormatter
from sage.network import LATENCY_SECONDS, parse_seconds
from sage.report.advisor import Comparison, compare_with_measured
from sage.report.tables import format_number


def read_comparisons(path: Path, latency_seconds: float) -> list[Comparison]:
    content = json.loads(path.read_text())
    rows = content if isinstance(content, list) else content["rows"]
    return compare_with_measured(rows, latency_seconds)


def print_table(comparisons: list[Comparison]) -> None:
    table = Table("what")
    for name in ("predicted ms", "measured ms", "error"):
        table.add_column(name, justify="right")
    for one in comparisons:
        times = (one.predicted_seconds, one.measured_seconds)
        table.add_row(one.what, *(format_number(1000 * seconds) for seconds in times), f"{one.error:+.1%}")
    Console().print(table)
    long = [abs(one.error) for one in comparisons if one.measured_seconds > 0.1]
    if long:
        print(
            f"of {len(long)} that take over 100 ms: error {median(long):.1%} (median), {max(long):.1%} (most)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=DocstringFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", type=Path)
    parser.add_argument("--latency", type=parse_seconds, default=LATENCY_SECONDS, metavar="TIME")
    arguments = parser.parse_args()
    print_table([one for path in arguments.files for one in read_comparisons(path, arguments.latency)])


if __name__ == "__main__":
    main()

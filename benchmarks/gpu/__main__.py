"""Everything that needs a GPU, in one command: right first, then how fast.

    python -m benchmarks.gpu [--sections NAME,...] [--seconds 460] [--results runs/gpu]

Runs tests/test_gpu.py, measures reducers, steps of training and collectives, counts where the host waits
for the device, and makes whole runs. Leaves a dated JSON file and a page in the folder of results, to be
copied to benchmarks/results/. Each section has a time of its own, each check fails by itself, and what there
was no time for is named. On a machine without a GPU everything runs small on the CPU: its figures mean
nothing, but the checks themselves are tried. Exit code 1: something failed.
"""

import argparse
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from benchmarks.command import make_parser
from benchmarks.gpu import collectives, facts, kernels, programs, selection, training
from benchmarks.gpu.checks import Row, Setup
from benchmarks.gpu.page import format_value, write_results
from benchmarks.gpu.runner import run_sections
from benchmarks.machine import load_average, machine

SECTIONS = [
    facts.SECTION,
    programs.TESTS,
    selection.SECTION,
    kernels.SECTION,
    training.WAITS,
    training.STEPS,
    collectives.SECTION,
    programs.RUNS,
]
"""In the order of worth."""


def show(started: float, section: str, rows: Sequence[Row]) -> None:
    """Print rows in one short line each, with the seconds since the start."""
    passed = time.monotonic() - started
    for row in rows:
        cells = (f"{name} {format_value(value)}" for name, value in row.items() if value not in (None, ""))
        print(f"{passed:4.0f} s  {section}: {', '.join(cells)}"[:200], flush=True)


def processor() -> str:
    """What the figures are of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"No GPU: everything small on a CPU ({platform.machine()})"


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    known = [section.name for section in SECTIONS]
    parser.add_argument("--sections", default=",".join(known), metavar="NAME,...", help="default: all")
    parser.add_argument("--seconds", type=float, default=460, help="for all sections together (default: 460)")
    parser.add_argument("--results", type=Path, default=Path("runs/gpu"), metavar="DIR")
    arguments = parser.parse_args()
    arguments.sections = arguments.sections.split(",")
    if unknown := set(arguments.sections) - set(known):
        parser.error(f"--sections: expected some of {','.join(known)}, got {','.join(sorted(unknown))}")
    return arguments


def main() -> int:
    arguments, started = parse_arguments(), time.monotonic()
    description = {"processor": processor(), **machine()}
    print(description["processor"], flush=True)
    sections = [section for section in SECTIONS if section.name in arguments.sections]
    has_gpu = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(torch.device("cuda", 0) if has_gpu else torch.device("cpu"), Path(folder), not has_gpu)
        limit = setup.patience * arguments.seconds
        rows = run_sections(sections, setup, limit, partial(show, started))
    description |= {"load_average_after": load_average(), "wall_seconds": time.monotonic() - started}
    device = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()) if has_gpu else "no-gpu"
    name = f"{datetime.now(UTC):%Y-%m-%d}-gpu-{device}"
    page = write_results(arguments.results, name, description, sections, rows)
    failed = sum("failed" in row for those in rows.values() for row in those)
    print(f"{page}: {failed} checks failed, {description['wall_seconds']:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

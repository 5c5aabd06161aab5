"""What logging costs: whole steps of training that write a line each, beside steps that write none.

    python -m benchmarks.log [--rounds 8] [--steps 40] [--json FILE]

Digits in one process, as rank 0 of two workers of which the other is only pretended: so nothing waits for
another process, and a step is what one worker computes. The ways of logging take turns in rounds of so many
steps, each of a new run. Medians over all steps of the seconds on the wall and of processor time (of all
threads). A step's line holds norms, which exact runs compute for logging alone.
"""

import argparse
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.command import make_parser
from benchmarks.gpu.checks import Setup
from benchmarks.gpu.training import NEVER, Measured, run_steps
from benchmarks.machine import load_average, machine
from sage.exchange.clock import Clock
from sage.files import write_json

WAYS = {
    "never": [f"log.every={NEVER}"],
    "every step": ["log.every=1"],
    "every step, TensorBoard": ["log.every=1", "log.tensorboard=true"],
}
"""The settings of each way to log; the first is what the others are compared with."""
NUM_WARM_UP = 3


@dataclass(frozen=True)
class Row:
    way: str
    step_seconds: float
    processor_seconds: float
    """Both of a step, medians."""
    ratio: float
    """Of the seconds, to those of a step that is not logged."""
    processor_ratio: float


class StepTimes:
    """The seconds of each step of a run, on the wall and of the processor; the run ends after so many."""

    def __init__(self, num_steps: int) -> None:
        self._last_step = NUM_WARM_UP + num_steps
        self._before = (0.0, 0.0)
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def __call__(self, step: int, clock: Clock) -> None:
        now = (time.perf_counter(), time.process_time())
        if step > NUM_WARM_UP:
            self.seconds.append(now[0] - self._before[0])
            self.processor_seconds.append(now[1] - self._before[1])
        if step == self._last_step:
            raise Measured
        self._before = now


def measure(arguments: argparse.Namespace) -> list[Row]:
    """Run all ways in turn; returns a row for each."""
    times: dict[str, list[StepTimes]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as temporary:
        setup = Setup(torch.device("cpu"), Path(temporary), small=True)
        for _ in range(arguments.rounds):
            for way, changes in WAYS.items():
                times[way].append(StepTimes(arguments.steps))
                run_steps("resnet18", changes, setup, times[way][-1])
    return rows_of(times)


def rows_of(times: dict[str, list[StepTimes]]) -> list[Row]:
    """times: of each way the runs', those of the first way first."""
    wall = {way: median(x for run in runs for x in run.seconds) for way, runs in times.items()}
    used = {way: median(x for run in runs for x in run.processor_seconds) for way, runs in times.items()}
    plain = next(iter(times))
    return [Row(way, wall[way], used[way], wall[way] / wall[plain], used[way] / used[plain]) for way in times]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="runs of each way to log (default: 8)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run that count (default: 40)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine()
    rows = measure(arguments)
    print(f"{'log':<26}{'step, ms':>10}{'ratio':>8}{'processor, ms':>16}{'ratio':>8}")
    for row in rows:
        times = f"{1000 * row.step_seconds:>10.2f}{row.ratio:>8.2f}{1000 * row.processor_seconds:>16.2f}"
        print(f"{row.way:<26}{times}{row.processor_ratio:>8.2f}")
    if arguments.json:
        content = {**facts, "load_average_after": load_average(), "rows": [asdict(row) for row in rows]}
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()

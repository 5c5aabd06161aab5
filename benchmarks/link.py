"""Scaling by time while the link changes: one training on two hosts of the virtual cluster (tests/cluster).

    python -m benchmarks.link [--config python_docs] [--reducer global_topk] [--share 0.2] [--steps 80]
                              [--rates 1gbit 100mbit 1gbit 10gbit] [--json FILE] [--picture FILE]
                              [--changes KEY=VALUE ...]

Needs root and what tests/cluster/virtual-cluster names. Each host runs one worker with one thread. After each
--steps steps worker 0 gives all links the next rate. The exchange's and the step's milliseconds are those
that the workers agree on (the slowest worker's), so they hold what other work on this machine costs; a
measurement of one step is read in the next. A step is within its share where exchange <= share * step.
--changes are of the configuration, as for run.py: task.units=650 makes the model larger.
"""

import argparse
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import reducers
from benchmarks.command import make_parser
from benchmarks.data import endless_batches
from benchmarks.group import add_worker_options, process_group, return_rows, run_workers
from benchmarks.machine import load_average, machine
from benchmarks.network import CLUSTER, link_rate, on_host, virtual_cluster
from benchmarks.network_worker import bits_a_second
from benchmarks.published import CONFIGS
from reducers import REDUCERS
from run import TABLES
from sage import config
from sage.exchange.comm import DistComm
from sage.files import write_json
from sage.interfaces import Place, Seeds
from sage.training.optim import build_optimizer, clip_norm
from sage.training.settings import RunSettings
from tasks import TASKS

NUM_HOSTS = 2
PORT = 23480
SETTLED = 20
"""Steps after the start, or after a change, that may be outside of the share."""


@dataclass(frozen=True)
class Row:
    """A step."""

    rate: str
    """Of the links."""
    loss: float
    """Of worker 0."""
    density: float
    target_density: float
    dense: float
    exchange_ms: float
    step_ms: float
    allowed_ms: float
    link_megabits: float
    """As estimated."""


def run_worker(arguments: argparse.Namespace) -> None:
    """Train in one process of a group, on its host."""
    settings = config.load(CONFIGS / f"{arguments.config}.yaml", arguments.changes, RunSettings, TABLES)
    place, seeds = Place(arguments.rank, NUM_HOSTS), Seeds.derive(1, arguments.rank)
    with process_group(arguments, f"10.77.0.1:{PORT}", minutes=10):
        section, device = settings.task, torch.device("cpu")
        task = TASKS[section.name](section, arguments.data, place, seeds=seeds, device=device)
        scaling = {"name": "time", "share": arguments.share, "highest": 1.0, "dense": arguments.dense}
        given: dict[str, Any] = {"scaling": scaling, "density": arguments.density, "comm": DistComm()}
        exchange = reducers.attach(task.model, arguments.reducer, **given)
        optimizer, rows = build_optimizer(settings.optimizer, task.model), list[Row]()
        batches = endless_batches(task)
        for rate in arguments.rates:
            change_rate(rate)
            for _ in range(arguments.steps):
                exchange.zero_grad()
                loss = task.loss(next(batches))
                loss.backward()
                exchange.step()
                if settings.clip.norm is not None:
                    clip_norm(exchange.gradient.flat, settings.clip.norm)
                optimizer.step()
                shown = {name: float(value) for name, value in exchange.exchange.metrics().items()}
                rows.append(row_of(rate, loss.item(), exchange.density, shown))
    return_rows(arguments, rows)


def change_rate(rate: str) -> None:
    """Give all links a rate, while no worker sends."""
    dist.barrier()
    if dist.get_rank() == 0:
        subprocess.run([CLUSTER, "rate", rate], check=True)
        time.sleep(0.2)
    dist.barrier()


def row_of(rate: str, loss: float, density: float, shown: dict[str, float]) -> Row:
    times = {f"{name}_ms": shown.get(f"{name}_milliseconds", 0.0) for name in ("exchange", "step", "allowed")}
    found = {name: shown[name] for name in ("target_density", "dense")}
    return Row(rate, loss, density, **found, **times, link_megabits=shown.get("link_megabits", 0.0))


def shares_within(rows: list[Row], share: float, steps: int) -> tuple[float, float]:
    """The share of the steps within their share: after the first ones of the run, and of each phase. What a
    row says of times is the step before's."""
    within = [after.exchange_ms <= share * after.step_ms for after in rows[1:]]
    settled = [is_in for index, is_in in enumerate(within) if index % steps >= SETTLED]
    late = within[SETTLED:]
    return sum(late) / len(late), sum(settled) / len(settled)


def draw(rows: list[Row], file: Path) -> None:
    figure = Figure(figsize=(7, 6))
    density, milliseconds, rate = figure.subplots(3, 1, sharex=True)
    steps = range(len(rows))
    density.plot(steps, [row.density for row in rows])
    density.set(ylabel="density sent", yscale="log")
    milliseconds.plot(steps[:-1], [row.exchange_ms for row in rows[1:]], label="exchange")
    milliseconds.plot(steps, [row.allowed_ms for row in rows], label="allowed")
    milliseconds.set(ylabel="milliseconds", yscale="log")
    rate.plot(steps, [bits_a_second(row.rate) / 1e6 for row in rows], label="link")
    rate.plot(steps, [row.link_megabits or float("nan") for row in rows], ":", label="estimated")
    rate.set(ylabel="Mbit/s", yscale="log", xlabel="step")
    for panel in (milliseconds, rate):
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--config", default="python_docs", help="of the training (default: python_docs)")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets")
    parser.add_argument("--reducer", choices=REDUCERS, default="global_topk", metavar="NAME")
    parser.add_argument("--density", type=float, default=0.01, help="at the start")
    parser.add_argument("--share", type=float, default=0.2, help="of a step, that the exchange may take")
    parser.add_argument("--dense", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--steps", type=int, default=80, help="of each rate (default: 80)")
    default = ["1gbit", "100mbit", "1gbit", "10gbit"]
    parser.add_argument("--rates", nargs="+", default=default, metavar="RATE", type=link_rate)
    parser.add_argument("--picture", type=Path, metavar="FILE")
    parser.add_argument("--changes", nargs="*", default=[], metavar="KEY=VALUE", help="of the configuration")
    add_worker_options(parser)
    arguments = parser.parse_args()
    if arguments.rank is not None:
        run_worker(arguments)
        return
    facts, rows = machine(), measure(arguments)
    whole, phases = shares_within(rows, arguments.share, arguments.steps)
    print(f"within {arguments.share:g} of the step: {whole:.1%} of the steps after the first {SETTLED},")
    print(f"{phases:.1%} of those that are {SETTLED} or more after a change of the rate")
    if arguments.json:
        given = {key: getattr(arguments, key) for key in ("config", "reducer", "share", "steps", "changes")}
        found = {
            "within_after_start": whole,
            "within_after_changes": phases,
            "load_average_after": load_average(),
        }
        write_json(arguments.json, {**facts, **given, **found, "rows": [asdict(row) for row in rows]})
    if arguments.picture:
        draw(rows, arguments.picture)


def measure(arguments: argparse.Namespace) -> list[Row]:
    options = ["--config", arguments.config, "--data", str(arguments.data), "--reducer", arguments.reducer]
    options += ["--share", str(arguments.share), "--density", str(arguments.density)]
    options += ["--dense", arguments.dense, "--steps", str(arguments.steps)]
    options += ["--rates", *arguments.rates, "--changes", *arguments.changes]
    with virtual_cluster(NUM_HOSTS):
        return run_workers("benchmarks.link", options, NUM_HOSTS, Row, prefix=on_host)


if __name__ == "__main__":
    main()

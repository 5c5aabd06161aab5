"""How well sparsifiers keep their density on real gradients, step by step.

    python -m benchmarks.density --data DIR [--configs NAME,...] [--steps N] [--workers W] [--densities D,...]
                                 [--json FILE] [--picture FILE] [KEY.PATH=VALUE ...]

A JSON file that is there keeps its rows of other configurations.

Each family's model is trained exactly, once, with W workers' batches in turn and a learning rate that falls
to a tenth after two thirds of the steps. Every sparsifier, at every density, with and without error feedback,
gets the workers' gradients of each step and has residual memories of its own, one a worker: so what it
selects from is what it would have to select from. It is not trained with, so all of them see the same
gradients. d is the density of a step, the mean over workers, and t the target:

- error: |d / t - 1|, mean and 99th percentile over steps, and its mean over the first 20
- bias: mean(d) / t - 1
- counts: the share of steps in which every worker selects exactly what the reducer promises
- padding: the most that a worker selects / the mean, which a gather sends
- union: selected by at least one worker / n;  energy: ||sent||^2 / ||send||^2, the mean over workers

SAGE has three rows: its own first threshold (auto), one that fits the first gradient, and one 10 times as
high. The threshold `auto` of `threshold` knows the target only, not the gradient.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import reducers
from benchmarks.command import make_parser
from benchmarks.data import endless_batches
from benchmarks.machine import load_average, machine
from benchmarks.published import CONFIGS
from reducers import REDUCERS
from run import TABLES
from sage import config
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Feedback, NoFeedback, NoFeedbackSettings, Residual, ResidualSettings
from sage.exchange.gradient import GradientBuffer
from sage.files import write_json
from sage.interfaces import Place, Progress, Seeds, Slot, Task
from sage.report.looks import look_of
from sage.training.optim import build_optimizer, clip_norm
from sage.training.settings import RunSettings
from tasks import TASKS

FIRST_STEPS = 20
"""Whose error is also given by itself."""
METHODS: dict[str, tuple[str, float | None]] = {
    "global_topk": ("global_topk", None),
    "topk": ("topk", None),
    "sage": ("sage", None),
    "sage, fitted": ("sage", 1.0),
    "sage, 10 x fitted": ("sage", 10.0),
    "threshold auto": ("threshold", None),
    "random_k": ("random_k", None),
    "random_block": ("random_block", None),
}
"""A row's label: the reducer, and its first threshold / the one that fits the first gradient; None: auto."""
DRAWN = ("global_topk", "topk", "sage", "sage, 10 x fitted", "threshold auto")
"""What the picture shows."""


@dataclass(frozen=True)
class Row:
    config: str
    n: int
    workers: int
    overrides: list[str]
    """Of the configuration."""
    method: str
    target: float
    feedback: str
    steps: int
    error_mean: float
    error_p99: float
    error_first_steps: float
    largest_first_steps: float
    """The largest d / t of the first steps."""
    bias: float
    counts: float
    padding: float
    union: float
    energy: float
    densities: list[float]
    """Of every step."""


@dataclass
class Entry:
    """A method under measurement: one exchange a worker, each as if it were alone."""

    method: str
    target: float
    feedback: str
    exchanges: list[Exchange]
    densities: list[float] = field(default_factory=list)
    paddings: list[float] = field(default_factory=list)
    unions: list[float] = field(default_factory=list)
    energies: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)

    def take_step(self, gradients: list[Tensor], progress: Progress) -> None:
        n, kept, sent = len(gradients[0]), [], []
        for exchange, grad in zip(self.exchanges, gradients, strict=True):
            norms = exchange.average(grad.clone(), progress, measure=True)
            assert norms is not None
            kept.append(1 - norms.read()["compression_error"])
            sent.append(exchange.reducer.sent_indices())
        counts = [len(indices) for indices in sent]
        self.densities.append(statistics.mean(counts) / n)
        self.paddings.append(max(counts) / max(1.0, statistics.mean(counts)))
        self.unions.append(len(torch.cat(sent).unique()) / n)
        self.energies.append(statistics.mean(kept))
        promised = round(self.exchanges[0].reducer.expected_payload_bytes(2) / bytes_each(self.method))
        self.exact.append(set(counts) == {promised})

    def row(self, name: str, n: int, overrides: list[str]) -> Row:
        errors = torch.tensor([abs(density / self.target - 1) for density in self.densities])
        return Row(
            config=name,
            n=n,
            workers=len(self.exchanges),
            overrides=overrides,
            method=self.method,
            target=self.target,
            feedback=self.feedback,
            steps=len(errors),
            error_mean=errors.mean().item(),
            error_p99=errors.quantile(0.99).item(),
            error_first_steps=errors[:FIRST_STEPS].mean().item(),
            largest_first_steps=max(self.densities[:FIRST_STEPS]) / self.target,
            bias=statistics.mean(self.densities) / self.target - 1,
            counts=statistics.mean(self.exact),
            padding=statistics.mean(self.paddings),
            union=statistics.mean(self.unions),
            energy=statistics.mean(self.energies),
            densities=[float(f"{density:.4g}") for density in self.densities],
        )


def bytes_each(method: str) -> int:
    """What an element costs in a message: an index travels where it is not drawn."""
    return 4 if method.startswith("random") else 8


def make_entry(
    method: str,
    target: float,
    feedback: str,
    layout: list[Slot],
    gradients: list[Tensor],
    forgetting: Feedback,
) -> Entry:
    """forgetting: which all share that have no feedback, since it keeps nothing."""
    name, times = METHODS[method]
    settings: dict[str, Any] = {"density": target}
    if times is not None:
        k = max(1, int(target * len(gradients[0])))
        settings["threshold"] = times * gradients[0].abs().topk(k).values[-1].item()
    exchanges = []
    for rank, grad in enumerate(gradients):
        built = REDUCERS[name].Settings.model_validate({"name": name, **settings})
        reducer = reducers.build(built, layout, seeds=Seeds.derive(1, rank), device=grad.device)
        memory = forgetting if feedback == "none" else Residual(ResidualSettings(), grad)
        exchanges.append(Exchange(memory, reducer, LocalComm.alone(), layout))
    return Entry(method, target, feedback, exchanges)


class Stream:
    """The workers' gradients of an exact training, step by step."""

    def __init__(self, name: str, overrides: list[str], data: Path, num_workers: int, num_steps: int) -> None:
        self.settings = config.load(CONFIGS / f"{name}.yaml", overrides, RunSettings, TABLES)
        self.num_steps, section = num_steps, self.settings.task
        torch.manual_seed(1)
        self.tasks: list[Task] = []
        for rank in range(num_workers):
            place, seeds = Place(rank, num_workers), Seeds.derive(1, rank)
            made = TASKS[section.name](section, data, place, seeds=seeds, device=torch.device("cpu"))
            for ours, mine in zip(
                (self.tasks or [made])[0].model.parameters(), made.model.parameters(), strict=True
            ):
                mine.data = ours.data
            self.tasks.append(made)
        self.buffers = [GradientBuffer(task.model) for task in self.tasks]
        self.layout = self.buffers[0].layout
        self.optimizer = build_optimizer(self.settings.optimizer, self.tasks[0].model)

    def __iter__(self) -> Iterator[tuple[Progress, list[Tensor]]]:
        batches = [endless_batches(task) for task in self.tasks]
        for step in range(self.num_steps):
            if step == 2 * self.num_steps // 3:
                for group in self.optimizer.param_groups:
                    group["lr"] /= 10
            gradients = [
                self._gradient(task, buffer, next(own))
                for task, buffer, own in zip(self.tasks, self.buffers, batches, strict=True)
            ]
            yield Progress(0.0, step, self.optimizer.param_groups[0]["lr"], self.num_steps), gradients
            self.buffers[0].flat.copy_(torch.stack(gradients).mean(0))
            self.buffers[0].distribute([True] * len(self.layout))
            self.optimizer.step()

    def _gradient(self, task: Task, buffer: GradientBuffer, batch: Any) -> Tensor:
        """(n,): a worker's own, clipped as its configuration says."""
        buffer.zero()
        task.loss(batch).backward()
        buffer.collect()
        if self.settings.clip.norm is not None:
            clip_norm(buffer.flat, self.settings.clip.norm)
        return buffer.flat.clone()


def measure(name: str, arguments: argparse.Namespace) -> list[Row]:
    stream = Stream(name, arguments.overrides, arguments.data, arguments.workers, arguments.steps)
    entries: list[Entry] = []
    for progress, gradients in stream:
        if not entries:
            forgetting = NoFeedback(NoFeedbackSettings(), gradients[0])
            entries = [
                make_entry(method, target, feedback, stream.layout, gradients, forgetting)
                for method in METHODS
                for target in arguments.densities
                for feedback in ("residual", "none")
            ]
        for entry in entries:
            entry.take_step(gradients, progress)
    return [entry.row(name, len(gradients[0]), arguments.overrides) for entry in entries]


def print_table(rows: list[Row]) -> None:
    names = ("error", "p99", "first 20", "bias", "counts", "padding", "union", "energy")
    table = Table("configuration", "method", "target", "feedback", *names)
    for row in rows:
        errors = (row.error_mean, row.error_p99, row.error_first_steps, row.bias, row.counts)
        others = (f"{row.padding:.2f}", f"{row.union:.2g}", f"{row.energy:.3f}")
        shown = (row.config, row.method, f"{row.target:g}", row.feedback)
        table.add_row(*shown, *(f"{100 * value:.1f} %" for value in errors), *others)
    Console(width=150).print(table)


def draw(rows: list[Row], file: Path) -> None:
    """Density over steps with feedback, at the middle target that all have: one panel a configuration."""
    names = list(dict.fromkeys(row.config for row in rows))
    of_all = set.intersection(*({row.target for row in rows if row.config == name} for name in names))
    target = sorted(of_all)[(len(of_all) - 1) // 2]
    figure = Figure(figsize=(max(5, 4 * len(names)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for row in rows:
            if (row.config, row.target, row.feedback) == (name, target, "residual") and row.method in DRAWN:
                dash = ":" if row.method == "sage, 10 x fitted" else "-"
                colour = look_of(METHODS[row.method][0]).colour
                panel.plot(row.densities, dash, color=colour, label=row.method, linewidth=1.2)
        panel.axhline(target, color="grey", linewidth=0.6)
        panel.set(title=name, xlabel="step", yscale="log")
    panels[0][0].set_ylabel(f"density, target {target:g}")
    handles, labels = panels[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(file, dpi=100)


def rows_of(file: Path | None) -> list[Row]:
    """What an earlier run has written: what is not measured anew stays."""
    if file is None or not file.exists():
        return []
    return [Row(**row) for row in json.loads(file.read_text())["rows"]]


def main() -> None:
    parser = make_parser(__doc__)
    small = "cifar10_small,wikitext2_small,ncf_ml-100k_small"
    parser.add_argument("--configs", default=small, metavar="NAME,...", help=f"default: {small}")
    parser.add_argument("--data", type=Path, default=Path("data"), metavar="DIR", help="prepared data sets")
    parser.add_argument("--steps", type=int, default=120, help="of each (default: 120)")
    parser.add_argument("--workers", type=int, default=4, help="whose gradients are taken (default: 4)")
    parser.add_argument("--densities", default="0.1,0.01,0.001,0.0001", metavar="D,...", help="targets")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw densities over steps into a PNG")
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE", help="of the configurations")
    arguments = parser.parse_args()
    arguments.densities = [float(text) for text in arguments.densities.split(",")]
    names = arguments.configs.split(",")
    facts, rows = machine(), [row for row in rows_of(arguments.json) if row.config not in names]
    for name in names:
        rows += measure(name, arguments)
        print_table([row for row in rows if row.config == name])
        if arguments.json:  # after each, since all together take a while
            given = {**facts, "load_average_after": load_average()}
            write_json(arguments.json, {**given, "rows": [asdict(row) for row in rows]})
    if arguments.picture:
        draw(rows, arguments.picture)


if __name__ == "__main__":
    main()

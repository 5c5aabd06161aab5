"""Whole steps of the published networks: seconds by phase, and where the host waits."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch

import run
from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.gpu.waits import counted_waits
from benchmarks.made import PLACES, find_or_make
from benchmarks.published import CONFIGS, PHASES
from sage.config import Settings
from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm
from sage.exchange.echo import EchoComm
from sage.interfaces import Place
from sage.training.experiment import RunPlan, run_worker
from sage.training.precision import set_up_arithmetic
from sage.training.settings import RunSettings
from sage.training.simulate import WorkerContext
from sage.workers.group import connect
from sage.workers.rendezvous import Rendezvous
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

TIMEOUT_SECONDS = 30.0
PUBLISHED = {"resnet18": "cifar10_resnet18", "lstm": "wikitext2_lstm", "ncf": "ncf_ml-1m"}
SMALL = {"resnet18": "digits", "lstm": "python_docs", "ncf": "synthetic_ratings"}
"""What stands for them on a machine without a GPU."""
REDUCERS = ("exact", "sage", "global_topk", "topk", "powersgd")
LOG_EVERY = 8
NEVER = 10**9
NO_FILES = ["log.tensorboard=false", "checkpoint.every_minutes=1000"]


class Measured(Exception):  # noqa: N818  no error: how a run is left after the steps that count
    """All steps have been made."""


class StepStore(RendezvousStore):
    """Tells a benchmark which step is about to be made. The worker has no others to exchange texts with."""

    def __init__(self, on_step: Callable[[int], None]) -> None:
        super().__init__(Place(0, 1), None)
        self._on_step = on_step

    def set_step(self, step: int) -> None:
        self._on_step(step)


class TwinContext(WorkerContext):
    """Gives a worker a twin."""

    clock: Clock | None = None
    """The run's."""

    def connect(self, world_size: int, clock: Clock | None = None) -> CountingComm:
        self.clock = self.clock or clock
        return EchoComm(clock=clock)


OnStep = Callable[[int, Clock], None]
"""Called before each step of a run, with the run's clock; raises Measured after the last."""


def run_steps(name: str, changes: list[str], setup: Setup, on_step: OnStep) -> None:
    """Train a configuration as one of two workers, whose twin sends the same, until on_step raises Measured.

    name: of PUBLISHED; the data are made, of the published shapes. What a run sets in its process stays set.
    """
    config = (SMALL if setup.small else PUBLISHED)[name]
    settings = run.LOAD_SETTINGS(CONFIGS / f"{config}.yaml", ["epochs=1000", *NO_FILES, *changes])
    data = setup.folder
    if settings.task.name in PLACES:
        data, _ = find_or_make(settings.task.name, setup.folder, setup.folder)
    rendezvous = Rendezvous(Place(0, 1), 0, 1, launched=True)
    worker = Worker(rendezvous, setup.device, "gloo", torch.get_num_threads(), data)
    context = TwinContext()

    def tell(step: int) -> None:
        assert context.clock is not None
        on_step(step, context.clock)

    torch.use_deterministic_algorithms(False)  # else what the last run set would stay
    set_up_arithmetic(settings.deterministic)
    with connect(worker, TIMEOUT_SECONDS, deterministic=settings.deterministic), suppress(Measured):
        run_worker(RunPlan(settings, setup.folder / "steps"), run.build, worker, StepStore(tell), context)


# --- seconds by phase -----------------------------------------------------------------------------


@dataclass
class Stopwatch:
    """Takes the time of the steps in [first, last)."""

    first: int
    last: int
    device: torch.device
    started: float = 0.0
    seconds: float = 0.0
    """Of all steps together, on the wall."""
    phases: dict[str, float] = field(default_factory=dict)

    def __call__(self, step: int, clock: Clock) -> None:
        if step not in (self.first, self.last):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        phases, now = clock.take(), time.perf_counter()
        if step == self.last:
            self.phases, self.seconds = phases, now - self.started
            raise Measured
        self.started = now


def measure_step(name: str, changes: list[str], setup: Setup) -> Iterator[Row]:
    first, count = (2, 2) if setup.small else (8, 20)
    watch = Stopwatch(first, first + count, setup.device)
    if setup.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    run_steps(name, [f"log.every={NEVER}", *changes], setup, watch)
    phases = {f"{phase}, ms": 1000 * watch.phases.get(phase, 0.0) / count for phase in PHASES}
    memory = torch.cuda.max_memory_allocated() / 2**30 if setup.on_gpu else None
    yield {
        "network": name,
        "settings": " ".join(changes),
        "step, ms": 1000 * watch.seconds / count,
        **phases,
        "memory, GiB": memory,
    }


def options_of(name: str, setup: Setup) -> list[list[str]]:
    """What else the settings offer, beside the reducer, for a network: whatever fields there are."""
    config = (SMALL if setup.small else PUBLISHED)[name]
    settings = run.LOAD_SETTINGS(CONFIGS / f"{config}.yaml", [])
    found = [["deterministic=false"]]
    found += [[f"precision={value}"] for value in _choices(RunSettings, "precision") if value != "float32"]
    for owner, prefix in ((RunSettings, ""), (type(settings.task), "task.")):
        if "channels_last" in _choices(owner, "memory_format"):
            layout = f"{prefix}memory_format=channels_last"
            found += [[layout], [layout, "precision=bfloat16", "deterministic=false"]]
    if "compile" in RunSettings.model_fields and not setup.small:  # on a CPU it takes a minute
        found.append(["compile=true"])
    return found


def _choices(owner: type[Settings], field: str) -> tuple[Any, ...]:
    """The values that a setting may have; () where there is no such setting."""
    return get_args(owner.model_fields[field].annotation) if field in owner.model_fields else ()


def step_checks(setup: Setup) -> list[Check]:
    """The networks in turn, so that where time runs out all have their first variants; what compiles last."""
    variants = {name: _variants(name, setup) for name in PUBLISHED}
    in_turn = [
        (name, changes)
        for number in range(max(len(changes) for changes in variants.values()))
        for name, all_changes in variants.items()
        for changes in all_changes[number : number + 1]
    ]
    return [
        Check(
            f"{name}: {' '.join(changes)}",
            partial(measure_step, name, changes, setup),
            seconds=100 if "compile=true" in changes else 40,
        )
        for name, changes in sorted(in_turn, key=lambda pair: "compile=true" in pair[1])
    ]


def _variants(name: str, setup: Setup) -> list[list[str]]:
    """The changes of settings with which a network's step is measured."""
    options = options_of(name, setup)
    plain = [["reducer.name=exact"], *(["reducer.name=exact", *option] for option in options)]
    if setup.small:
        return plain if name == "resnet18" else plain[:1]
    others = [[f"reducer.name={reducer}"] for reducer in REDUCERS[1:]]
    return [plain[0], *others, *plain[1:], *(["reducer.name=global_topk", *option] for option in options)]


# --- waits ----------------------------------------------------------------------------------------


class WaitCounter:
    """Counts the host's waits in a plain step and in a logging step."""

    plain_step, logging_step = LOG_EVERY + 3, 2 * LOG_EVERY

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.found: dict[str, Counter[str]] = {}
        self._counting: AbstractContextManager[Counter[str]] | None = None

    def __call__(self, step: int, clock: Clock) -> None:
        if self._counting is not None:
            self._counting.__exit__(None, None, None)
            self._counting = None
        kind = {self.plain_step: "plain", self.logging_step: "logging"}.get(step)
        if kind is not None:
            self._counting = counted_waits(self._device)
            self.found[kind] = self._counting.__enter__()
        if step > self.logging_step:
            raise Measured


def count_waits(name: str, reducer: str, changes: list[str], setup: Setup) -> Iterator[Row]:
    counter = WaitCounter(setup.device)
    run_steps(name, [f"log.every={LOG_EVERY}", f"reducer.name={reducer}", *changes], setup, counter)
    for kind, lines in counter.found.items():
        yield {
            "network": name,
            "reducer": reducer,
            "settings": " ".join(changes),
            "step": kind,
            "waits": lines.total(),
            "where": ", ".join(f"{line} x {count}" if count > 1 else line for line, count in lines.items()),
        }


def wait_checks(setup: Setup) -> list[Check]:
    # The votes have no error to feed back.
    names = [name for name in run.REDUCERS if not run.REDUCERS[name].takes_feedback]
    cases = [(reducer, ["feedback.name=none"] if reducer in names else []) for reducer in run.REDUCERS]
    cases += [("topk", ["reducer.exchange=union"]), ("exact", ["on_nonfinite=skip"])]
    few = ("exact", "sage", "topk", "powersgd")
    return [
        Check(
            f"{name}: waits of {' '.join([reducer, *changes])}",
            partial(count_waits, name, reducer, changes, setup),
        )
        for name in (["lstm"] if setup.small else ["lstm", "resnet18"])
        for reducer, changes in cases
        if reducer in few or not (setup.small or name == "resnet18")
    ]


STEPS = Section(
    "steps",
    "A step of training by phase, in milliseconds, means over 20 steps without a log line: ResNet-18 (batch "
    "256), the LSTM (128 columns of 30 tokens) and NeuMF (MovieLens 1M, batch 65,536), on made data of the "
    "published shapes; communicate is a part of reduce, of a twin that sends the same. step: wall time.",
    90,
    step_checks,
    fresh=True,
)
WAITS = Section(
    "waits",
    "How often the host waits for the device in a step of training, and at which lines of code: as torch "
    "reports them (torch.cuda.set_sync_debug_mode). On a CPU: operations that would wait on a GPU, without "
    "copies to the host.",
    40,
    wait_checks,
    fresh=True,
)

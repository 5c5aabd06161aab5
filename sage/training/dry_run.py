"""--dry-run: how large a run is, what a worker holds, how long a simulated step takes."""

from itertools import repeat
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sage.config import Named
from sage.console import readable_bytes
from sage.exchange.clock import Clock
from sage.exchange.comm import LocalComm
from sage.exchange.echo import EchoComm
from sage.interfaces import Place, Progress, Reducer
from sage.network import Call, Link, exact_calls
from sage.runfolder.record import Recorder
from sage.training.settings import RunSettings
from sage.training.train import RunServices, Trainer, TrainingParts
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

SPEEDS = {"100mbit": 100e6, "1gbit": 1e9, "10gbit": 10e9, "100gbit": 100e9}
"""Of the links that a dry run predicts for."""
ASSUMED_WORKERS = 16
"""How many it predicts for where the user gives no number."""
NAME_WIDTH = 12
"""Characters that the name of an item takes, before what is said of it."""
TIMED_STEPS = 3
"""Gradients that are timed, after one that is not; their median is shown."""


def describe_run(settings: RunSettings, parts: TrainingParts, worker: Worker) -> str:
    """Describe what a run would be, line by line.

    A single worker makes a step with learning rate 0 on a zero gradient, which fills what is made when it is
    first needed (the optimizer's state, a reducer's buffers); of a simulation it also times a real one.
    """
    torch.set_num_threads(worker.num_threads)
    trainer = _single_trainer(settings, parts)
    _make_step(trainer)
    held, world_size = held_bytes(parts), worker.place.world_size
    total = sum(held.values())
    listed = ", ".join(f"{name} {count:,}" for name, count in held.items())
    lines = [
        describe_size(parts, settings, worker.place),
        *describe_network(parts, settings.reducer, world_size),
        f"memory      {total:,} B a worker: {listed}; data and activations not counted",
    ]
    if settings.scaling.name != "constant":
        lines.append(f"scaling     {settings.scaling.name}; the lines above are of the reducer's own density")
    if worker.simulated:
        once = held["parameters"] + held["optimizer"]
        in_all = once + world_size * (total - once)
        lines.append(f"simulated   {in_all:,} B for {world_size}: parameters and optimizer are held once")
        lines.append(
            f"time        {_describe_time(_time_step(trainer), world_size, trainer.steps_per_epoch)}"
        )
    return "\n".join(lines)


def break_even_density(world_size: int, dense_bytes: int) -> float:
    """The density at which a gather of values and indices sends as much as the dense all-reduce.

    8 d n (W - 1) = 2 (W - 1) / W * dense_bytes * n, under the ring algorithm; 8: a value and an int32 index.
    """
    return 2 * dense_bytes / (8 * world_size)


def describe_size(parts: TrainingParts, settings: RunSettings, place: Place) -> str:
    """Parameters, workers, batches, steps and bytes of a run, line by line."""
    task, gradient, epochs, count = parts.task, parts.gradient, settings.epochs, settings.accumulate_steps
    num_elements, steps = gradient.flat.numel(), settings.steps_of(task.steps_per_epoch)
    batches = f", {count} batches a step, {task.batch_per_worker * place.world_size * count} in all"
    payload, dense = parts.compression.reducer.expected_payload_bytes(place.world_size), gradient.flat.nbytes
    share = f", {payload / dense:.3%} of the dense gradient's {readable_bytes(dense)}" if payload else ""
    lines = [
        f"parameters  {num_elements:,} in {len(gradient.layout)} tensors",
        f"workers     {place.world_size}",
        f"batch       {task.batch_per_worker} a worker, {task.batch_per_worker * place.world_size} in all"
        + (batches if count > 1 else ""),
        f"steps       {steps:,} an epoch, {steps * epochs:,} in {epochs} epochs",
        f"payload     {readable_bytes(payload)} a worker and step at the target density{share}",
    ]
    if settings.overlap is not None:
        lines.append(
            f"overlap     in buckets of {settings.overlap.bucket_mb:g} MiB; what follows is the same run's "
            "without overlap"
        )
    if place.world_size > 1:
        full, half = (f"{break_even_density(place.world_size, size):.3g}" for size in (4, 2))
        lines.append(f"break-even  below density {full} a gather sends less than exact does; 16-bit: {half}")
    return "\n".join(lines)


def describe_network(parts: TrainingParts, config: Named, world_size: int) -> list[str]:
    """How long a step's collectives take over links of several speeds, a line each: predicted for the exact
    average in 32 and 16 bits, and for this reducer, which pays where its compression takes less than what it
    saves. world_size: 1 where the user has not chosen one."""
    given = "" if world_size > 1 else " (--workers gives another number)"
    world_size = world_size if world_size > 1 else ASSUMED_WORKERS
    flat = parts.gradient.flat
    n, calls = flat.numel(), expected_calls(parts.compression.reducer, flat, config, world_size)
    lines = [
        f"network     ms of a step's collectives, predicted, 50 µs a message, {world_size} workers{given}"
    ]
    for name, speed in SPEEDS.items():
        link = Link(speed)
        full, half = (link.total_seconds(exact_calls(n, size), world_size) for size in (4, 2))
        mine = link.total_seconds(calls, world_size)
        times = f"exact {1e3 * full:.3g}, bfloat16 {1e3 * half:.3g}, this {1e3 * mine:.3g}"
        saved = f"saves {1e3 * (half - mine):.3g} on bfloat16" if mine < half else "saves nothing on bfloat16"
        lines.append(f"{name:<11} {times}; {saved}")
    return lines


def expected_calls(reducer: Reducer, flat: Tensor, config: Named, world_size: int) -> list[Call]:
    """The collectives of a step, of the kinds that the reducer makes and of as many bytes as it expects.

    A step on drawn numbers, with another worker that has the same, says the kinds. A sparsifier that reduces
    what it has gathered the indices of is expected to meet no index twice, though these workers both select
    the same.
    """
    calls = _echoed_calls(reducer, flat, 2)
    if any(call.kind == "all_to_all" for call in calls):  # whose messages depend on the number of workers
        calls = _echoed_calls(reducer, flat, world_size)
    kinds = {call.kind for call in calls}
    is_union = type(reducer).is_sparsifier(config) and kinds == {"all_gather", "all_reduce"}
    made = [
        Call(kind, size * (world_size if is_union and kind == "all_reduce" else 1)) for kind, size in calls
    ]
    in_all = sum(call.payload_bytes for call in made)
    factor = reducer.expected_payload_bytes(world_size) / in_all if in_all else 0.0
    return [Call(kind, size * factor) for kind, size in made]


def _echoed_calls(reducer: Reducer, flat: Tensor, world_size: int) -> list[Call]:
    """Those of a step on drawn numbers among workers that all have the same."""
    comm = EchoComm(world_size)
    send, mean = torch.randn(flat.shape, device=flat.device), torch.zeros_like(flat)
    reducer.accumulate(send, mean)
    reducer.reduce(send, mean, comm)
    return comm.calls


def _single_trainer(settings: RunSettings, parts: TrainingParts) -> Trainer:
    device = parts.gradient.flat.device
    clock, recorder, store = (
        Clock(device),
        Recorder(None, 0, settings.log),
        RendezvousStore(Place(0, 1), None),
    )
    services = RunServices(LocalComm.alone(clock), LocalComm.alone(), clock, recorder, store)
    return Trainer(settings, parts, services)


def _make_step(trainer: Trainer) -> None:
    progress = Progress(0.0, 0, trainer.base_lrs[0], trainer.steps_per_epoch)
    every_slot = [True] * len(trainer.gradient.layout)
    trainer.exchange_gradient(progress, every_slot, measure=False)
    trainer.apply(0.0)


def _time_step(trainer: Trainer) -> dict[str, float]:
    """Seconds by phase of one worker's step; forward and backward together, on one batch several times, are
    "gradient"."""
    batch, gradients = next(trainer.task.train_batches(0)), []
    for _ in range(1 + TIMED_STEPS):
        trainer.clock.take()
        trainer.compute_gradient(repeat(batch))
        taken = trainer.clock.take()
        gradients.append(taken["forward"] + taken["backward"])
    _make_step(trainer)
    return trainer.clock.take() | {"gradient": median(gradients[1:])}


def _describe_time(seconds: dict[str, float], world_size: int, steps_per_epoch: int) -> str:
    # every worker's gradient and exchange, one after the other; one optimizer
    step = world_size * (seconds["gradient"] + seconds["reduce"]) + seconds["optimizer"]
    return (
        f"{1000 * seconds['gradient']:.3g} ms a worker's gradient step, measured; so about "
        f"{1000 * step:.3g} ms a step of all {world_size}, {step * steps_per_epoch:.3g} s an epoch"
    )


def held_bytes(parts: TrainingParts) -> dict[str, int]:
    """Bytes of what a worker holds, by name; memory that two of them share counts for the first."""
    owners = {
        "parameters": [parameter.data for parameter in parts.task.model.parameters()],
        "buffers": list(parts.task.model.buffers()),
        "gradient": parts.gradient.flat,
        "residual": parts.compression.feedback,
        "optimizer": dict(parts.optimizer.state),
        "reducer": parts.compression.reducer,
    }
    found: dict[int, int] = {}
    held: dict[str, int] = {}
    for name, owner in owners.items():
        before = sum(found.values())
        found |= _storages(owner)
        held[name] = sum(found.values()) - before
    return held


def bytes_of(root: Any) -> int:
    """Bytes of the tensors and arrays that can be reached from an object, each storage once."""
    return sum(_storages(root).values())


def _storages(root: Any) -> dict[int, int]:
    """address -> bytes."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, np.ndarray):
            found[item.ctypes.data] = item.nbytes
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple | set):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()
    return found

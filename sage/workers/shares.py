"""Divide a machine among jobs that run side by side: its cores and its GPUs.

Imports torch only when the GPUs are counted.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


def share(slot: int, num_jobs: int, cpus: Sequence[int], gpus: Sequence[str]) -> tuple[list[int], list[str]]:
    """The cores and GPUs of job number slot of num_jobs, which is in [0, num_jobs)."""
    return _part(slot, num_jobs, cpus), _part(slot, num_jobs, gpus)


def _part(slot: int, num_parts: int, items: Sequence[Item]) -> list[Item]:
    """Neighbours, about as many for each part; one that other parts have too where there are too few."""
    if not items:
        return []
    if len(items) < num_parts:
        return [items[slot % len(items)]]
    return list(items[slot * len(items) // num_parts : (slot + 1) * len(items) // num_parts])


def own_cpus() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def own_gpus() -> list[str]:
    """The GPUs that this process sees, by their names in CUDA_VISIBLE_DEVICES. Does not initialise CUDA."""
    import torch

    return name_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count())


def name_gpus(visible: str | None, count: int) -> list[str]:
    """The names of count GPUs in view: those in CUDA_VISIBLE_DEVICES, else their numbers.

    Of a list with a bad name CUDA sees only what comes before it. Of several MIG instances a process sees
    the first only, but other processes may have the others: all count.
    """
    if visible is None or count == 0:
        return [str(number) for number in range(count)]
    names = [name.strip() for name in visible.split(",")]
    return [name for name in names if name] if names[0].startswith("MIG-") else names[:count]


def environment(gpus: Sequence[str]) -> dict[str, str]:
    """The environment of a process that sees only these GPUs; of none: this process's environment."""
    return os.environ | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


@contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """A process that this thread starts in here may use only these cores; of none: all of this process.

    It inherits them, so that they hold before its first thread: torch and sage/workers/launch.py count them.
    """
    if not cpus:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

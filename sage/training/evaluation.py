"""What a model scores, over all workers' shares of the data."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sage.interfaces import Communicator, Task

Evaluate = Callable[[], dict[str, tuple[float, float]] | None]
"""A task's evaluate or evaluate_at_end: sum and count by name; None: there is nothing to evaluate."""


def values_over_workers(
    task: Task, evaluate: Evaluate, side: Communicator, device: torch.device
) -> dict[str, float]:
    """The values over all workers' shares, with rank 0's buffers (BatchNorm's) on all of them; empty where
    there is nothing to evaluate."""
    broadcast(task.model.buffers(), side)
    sums = evaluate()
    if sums is None:
        return {}
    packed = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
    side.all_reduce(packed)  # (values, 2)
    values = dict(zip(sums, side.read(packed[:, 0] / packed[:, 1]).tolist(), strict=True))
    return task.derive(values)


def broadcast(tensors: Iterable[Tensor], side: Communicator) -> None:
    """Replace tensors by rank 0's, in place."""
    for tensor in tensors:
        side.broadcast(tensor)

"""What reducers of several families share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reducers.kernels import add_share, take
from sage.config import Named
from sage.interfaces import Communicator, Reducer


def average(send: Tensor, mean: Tensor, comm: Communicator) -> None:
    """mean = sum_i (send_i 1/W) by one all-reduce; send: zeros. Both (n,)."""
    _average(send, mean, comm)
    send.zero_()


def average_in_place(mean: Tensor, comm: Communicator) -> None:
    """mean = sum_i (mean_i 1/W) by one all-reduce. (n,)."""
    _average(mean, mean, comm)


def _average(values: Tensor, mean: Tensor, comm: Communicator) -> None:
    # Multiplied by 1/W before it is added, as DistributedDataParallel does: the same bits.
    torch.mul(values, 1 / comm.world_size, out=mean)
    comm.all_reduce(mean)


def average_at(
    indices: Tensor, send: Tensor, mean: Tensor, comm: Communicator, *, mean_is_zero: bool = False
) -> None:
    """mean = sum_i send_i / W at indices (k,), the same on all workers, and 0 elsewhere; send: 0 there.

    One all-reduce of the k values. send, mean (n,); the indices are unique. mean_is_zero: it holds zeros.
    """
    values = send.new_empty(len(indices))
    take(send, indices, values)
    comm.all_reduce(values)
    if not mean_is_zero:
        mean.zero_()
    add_share(mean, indices, values, comm.world_size)


class Leveled(Reducer):
    """A reducer whose compression can be set per tensor, while it runs."""

    @abstractmethod
    def set_levels(self, levels: Sequence[Any]) -> None:
        """Use these densities, or ranks, one per slot, from now on."""


class WrapperSettings(Named):
    """The settings of a reducer that works through another one.

    `reducers.build` builds the inner reducer first and passes it to the wrapper's constructor as `inner=`.
    """

    @abstractmethod
    def inner_section(self) -> dict[str, Any]:
        """The inner reducer as a section of a configuration: its name, and what differs from its defaults."""

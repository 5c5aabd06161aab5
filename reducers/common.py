"""What reducers of several families share."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sage.interfaces import Communicator, Reducer


def average(send: Tensor, mean: Tensor, comm: Communicator) -> None:
    """mean = sum_i send_i / W by one all-reduce; send: zeros. Both (n,)."""
    mean.copy_(send)
    comm.all_reduce(mean)
    if comm.world_size > 1:
        mean.div_(comm.world_size)
    send.zero_()


class Leveled(Reducer):
    """A reducer whose compression can be set a tensor, while it runs."""

    @abstractmethod
    def set_levels(self, levels: Sequence[Any]) -> None:
        """One density, or one rank, a slot from now on."""

"""A step without other workers: one worker among several that all have what it has."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm
from sage.exchange.exchange import Exchange
from sage.interfaces import Communicator, Progress, Slot, lay_out
from sage.network import Call

Build = Callable[[list[Slot], Tensor, Communicator], Exchange]
"""Makes the Exchange of a layout, of a tensor (n,) like its flat gradient, over a communicator."""


class EchoComm(CountingComm):
    """As rank 0 of workers that all send the same: messages are packed and decoded, and nothing travels."""

    def __init__(self, world_size: int = 2, clock: Clock | None = None) -> None:
        super().__init__(0, world_size, clock)
        self.calls: list[Call] = []
        """The collectives so far."""

    def another(self, clock: Clock | None = None) -> "EchoComm":
        return EchoComm(self.world_size, clock)

    def _all_reduce(self, x: Tensor, op: str) -> None:
        self.calls.append(Call("all_reduce", x.nbytes))
        if op == "sum":
            x.mul_(self.world_size)

    def _all_gather(self, x: Tensor) -> Tensor:
        self.calls.append(Call("all_gather", x.nbytes))
        return torch.stack([x] * self.world_size)

    def _all_to_all(self, x: Tensor) -> Tensor:
        self.calls.append(Call("all_to_all", x.nbytes))
        return torch.stack([x[0]] * self.world_size)

    def _broadcast(self, x: Tensor, source: int) -> None:
        self.calls.append(Call("broadcast", x.nbytes))


def warm_up(build: Build, layout: Sequence[Slot], like: Tensor, world_size: int) -> None:
    """Make a step that leaves nothing behind, so that no step of the run is the first of its kind: kernels
    are compiled for it, or loaded from disk.

    build: makes the run's exchange; here that of the smallest parameter in layout alone. like: a tensor of
    the gradient's type and device. Two workers stand for any larger number of them.
    """
    slots = [slot for slot in layout if slot.size]
    if not slots:
        return
    slot = min(slots, key=lambda slot: slot.size)
    exchange = build(
        lay_out([(slot.name, slot.shape)]), like.new_zeros(slot.size), EchoComm(min(world_size, 2))
    )
    progress = Progress(epoch=0.0, step=0, lr=1.0, steps_per_epoch=1)
    exchange.average(like.new_ones(slot.size), progress)

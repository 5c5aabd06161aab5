"""What the workers do together or not at all: skip a step, write a checkpoint, end early; and what they
watch for: numbers that are not finite, replicas that differ."""

from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from signal import Signals

import torch
from torch import Tensor

from sage.exchange.exchange import agree_on_step
from sage.interfaces import Communicator
from sage.workers.signals import WATCH


class Request(IntEnum):
    """What a worker asks for. All do the largest request; one that is not carried out is repeated."""

    NOTHING = 0
    SAVE = 1
    """A checkpoint."""
    STOP = 2
    """A checkpoint and the end; the run is to be resumed."""
    QUIT = 3
    """A checkpoint and the end, after Ctrl-C."""
    SKIP = 4
    """Not to use this step's gradient."""


def requested_by_signal() -> Request:
    """What the signal that this process received asks for."""
    if WATCH.received is None:
        return Request.NOTHING
    return Request.QUIT if WATCH.received == Signals.SIGINT else Request.STOP


class Agreement:
    """Lets all workers do what one of them asks for: one small all-reduce a step, and on a GPU one host
    synchronisation."""

    def __init__(self, side: Communicator, device: torch.device, is_due: Callable[[], bool]) -> None:
        """side: a communicator that does not count. is_due: whether this worker wants a checkpoint."""
        self.requested = requested_by_signal
        self._side, self._device, self._is_due = side, device, is_due

    def agree(self, total: Tensor, used: Sequence[bool]) -> tuple[Request, list[bool]]:
        """What all workers do, and which slots have a gradient on any of them. total: a scalar; where a
        worker's is not finite, all skip the step. used: which slots have one on this worker."""
        agreed, used = agree_on_step(self._side, total, used, self._request(), Request.SKIP)
        return Request(agreed), used

    def agree_between_steps(self) -> Request:
        """What all workers do at the end of an epoch."""
        agreed, _ = agree_on_step(self._side, torch.zeros((), device=self._device), [], self._request())
        return Request(agreed)

    def _request(self) -> Request:
        """What this worker requests."""
        return self.requested() or (Request.SAVE if self._is_due() else Request.NOTHING)


def wait_for_all(side: Communicator, device: torch.device) -> None:
    """Wait until every worker has called this."""
    flag = torch.zeros(1, device=device)
    side.all_reduce(flag)
    side.read(flag)  # on a GPU the call above has only enqueued it


def find_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Name the first of the tensors that is not finite, with the first such value in it; or ""."""
    for name, values in named:
        bad = values[~values.isfinite()]  # host synchronisation
        if bad.numel():
            return f"{name} became {bad[0].item()}"
    return ""


def find_difference(named: Sequence[tuple[str, Tensor]], side: Communicator) -> str:
    """Name the first tensor whose bits are not the same on all workers, and two of these; or ""."""
    if not named:
        return ""
    own = torch.stack([_checksum(tensor) for _, tensor in named])
    checksums = side.read(side.all_gather(own))  # (W, tensors); host synchronisation
    differs = (checksums != checksums[0]).nonzero()
    if not len(differs):
        return ""
    rank, index = differs[0].tolist()
    return f"{named[index][0]} of ranks 0 and {rank}"


def _checksum(values: Tensor) -> Tensor:
    """A scalar int64: the sum, modulo 2^64, of the bits as integers times an odd weight of each place.

    An odd weight is invertible, so any single change shows; opposite changes at two places do not cancel.
    """
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    bits = values.reshape(-1).view(integers).long()
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()

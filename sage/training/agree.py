"""What the workers do together or not at all: skip a step, write a checkpoint, end early; and what they
watch for: numbers that are not finite, replicas that differ."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from signal import Signals

import torch
from torch import Tensor

from sage.exchange.exchange import read_agreement, start_agreement
from sage.exchange.late import LateValues, stream_for_reading
from sage.interfaces import Communicator, TrainingError
from sage.workers.signals import WATCH
from sage.workers.store import RendezvousStore


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


@dataclass(frozen=True)
class Evidence:
    """By what a worker knows whether the loss and gradient of a step are finite."""

    epoch: int
    step: int
    values: Tensor
    """Finite where they are. A scalar, which may be too large all the same; or, to be read after the gradient
    is gone, (1 + slots,): the loss, and the largest magnitude of each slot's gradient, by names."""
    norm: Tensor | None = None
    """The gradient's norm in the gradient's type, where it was computed."""
    names: tuple[str, ...] = ()
    """What the values are, where they are to be read later."""


class Agreement:
    """Lets all workers do what one of them asks for: one small all-reduce a step, and on a GPU one host
    synchronisation."""

    reads_late = False

    def __init__(self, side: Communicator, device: torch.device, is_due: Callable[[], bool]) -> None:
        """side: a communicator that does not count. is_due: whether this worker wants a checkpoint."""
        self.requested = requested_by_signal
        self._side, self._device, self._is_due = side, device, is_due

    def agree(self, evidence: Evidence, used: Sequence[bool], waits: bool) -> tuple[Request, list[bool]]:
        """What all workers do, and which slots have a gradient on any of them.

        evidence: where a worker's is not finite, all skip the step. used: which slots have a gradient on this
        worker. waits: whether the answer must be of this step (here it is always).
        """
        agreed, used = read_agreement(self._side, self._start(evidence, used))
        return Request(agreed), used

    def settle(self) -> Request:
        """What was agreed on in steps that have not been answered; none may be left where something of them
        is written or scored."""
        return Request.NOTHING

    def agree_between_steps(self) -> Request:
        """What all workers do at the end of an epoch."""
        is_finite = torch.ones((), dtype=torch.bool, device=self._device)
        agreed, _ = read_agreement(self._side, start_agreement(self._side, is_finite, [], self._request()))
        return Request(agreed)

    def _start(self, evidence: Evidence, used: Sequence[bool]) -> Tensor:
        """The agreed flags (1 + slots,) of a step, on the device."""
        is_finite = evidence.values.isfinite().all()
        return start_agreement(self._side, is_finite, used, self._request(), Request.SKIP)

    def _request(self) -> Request:
        """What this worker requests."""
        return self.requested() or (Request.SAVE if self._is_due() else Request.NOTHING)


class LateAgreement(Agreement):
    """Answers a step later, so that no step waits for the device.

    For runs that end at a number that is not finite: such a step is found out one step later, before
    anything of it is written or scored. A worker without a gradient in some slot waits, to learn whether
    another has one there; to one that has a gradient in all slots the others' make no difference.
    """

    reads_late = True

    def __init__(
        self,
        side: Communicator,
        device: torch.device,
        is_due: Callable[[], bool],
        fail: Callable[[Evidence], None],
    ) -> None:
        """fail: raises the error of a step that is not finite on some worker; called on all of them."""
        super().__init__(side, device, is_due)
        self._fail = fail
        self._waiting: list[tuple[Evidence, LateValues]] = []
        self._stream = stream_for_reading(device)

    def agree(self, evidence: Evidence, used: Sequence[bool], waits: bool) -> tuple[Request, list[bool]]:
        """What all workers do, as agreed on a step before where this does not wait."""
        flags = self._start(evidence, used)
        self._waiting.append((evidence, LateValues(flags[0], self._stream)))
        if not all(used):
            _, used = read_agreement(self._side, flags)
        if waits:
            return self.settle(), list(used)
        if len(self._waiting) == 1:
            return Request.NOTHING, list(used)
        earlier, number = self._waiting.pop(0)  # of the step before
        return self._answer([earlier], [int(number.read(self._side))]), list(used)

    def settle(self) -> Request:
        if not self._waiting:
            return Request.NOTHING
        steps, numbers = zip(*self._waiting, strict=True)
        self._waiting = []
        return self._answer(
            steps, self._side.read(torch.stack([number.values for number in numbers])).tolist()
        )

    def _answer(self, steps: Sequence[Evidence], agreed: Sequence[int]) -> Request:
        """The largest of the requests that were agreed on in these steps."""
        for evidence, request in zip(steps, agreed, strict=True):
            if request == Request.SKIP:
                self._fail(evidence)
        return Request(max(agreed))


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
    checksums = side.read(side.all_gather(torch.stack([_checksum(tensor) for _, tensor in named])))
    differs = (checksums != checksums[0]).nonzero()  # checksums (W, tensors)
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


def on_all_workers(name: str, call: Callable[[], object], store: RendezvousStore) -> None:
    """Make a call on every worker; raise TrainingError on all of them where it failed on one. name: new for
    each call, the same on all workers."""
    error = ""
    try:
        call()
    except (ValueError, OSError) as failure:
        error = str(failure)
    raise_on_all_workers(name, error, store)


def raise_on_all_workers(name: str, error: str, store: RendezvousStore) -> None:
    """Raise TrainingError on all workers where one of them has an error."""
    for rank, message in enumerate(store.collect(name, error)):
        if message:
            raise TrainingError(f"rank {rank}: {message}")

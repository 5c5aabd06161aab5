"""What both hooks have: an Exchange for each bucket of the gradient that DDP or FSDP hands over."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sage.exchange.comm import DistComm
from sage.exchange.echo import Build, warm_up
from sage.exchange.exchange import Exchange, State, mean_density
from sage.exchange.gradient import HALVES
from sage.exchange.progress import StepCounter
from sage.interfaces import Progress, Slot


class BucketGradient:
    """A bucket as an Exchange takes it: flat is its buffer, or a float32 copy where that has 16 bits."""

    def __init__(self, layout: list[Slot], buffer: Tensor, finds_unused: bool) -> None:
        """finds_unused: a parameter whose gradient is zero everywhere may be one that was not used."""
        self._layout, self._finds_unused = layout, finds_unused
        self._buffer = self.flat = buffer  # (n,)
        self._wide = buffer.new_zeros(buffer.shape, dtype=torch.float32) if buffer.dtype in HALVES else None

    def hold(self, buffer: Tensor) -> None:
        """Take this step's buffer (n,)."""
        self._buffer = buffer
        self.flat = buffer if self._wide is None else self._wide

    def collect(self, read: Callable[[Tensor], Tensor] = Tensor.cpu) -> list[bool]:
        """Bring the gradients into flat; for each slot, whether its parameter has one. Where parameters may
        be unused this waits for the device, by read."""
        if self._wide is not None:
            self._wide.copy_(self._buffer)
        if not self._finds_unused:
            return [True] * len(self._layout)
        parts = [self._buffer[slot.start : slot.stop].any() for slot in self._layout]
        return [bool(is_used) for is_used in read(torch.stack(parts)).tolist()]

    def distribute(self, used: Sequence[bool]) -> None:
        """Bring flat into the buffer; DDP knows itself which parameters are not used."""
        if self._wide is not None:
            self._buffer.copy_(self._wide)


@dataclass
class Part:
    """What one bucket has."""

    names: tuple[str, ...]
    gradient: BucketGradient
    exchange: Exchange


@dataclass
class Step:
    """One backward."""

    progress: Progress
    measure: bool = False
    is_usable: bool = True
    nonfinite: tuple[str, Tensor] | None = None
    parts: list[Part] = field(default_factory=list)
    """Of the buckets so far."""
    moved: list[Exchange] = field(default_factory=list)
    """Those that have a state to put back where a later bucket cannot be used."""
    results: list[tuple[torch.futures.Future[Tensor], Tensor]] = field(default_factory=list)
    """What DDP waits for: each bucket's future and buffer."""
    done: threading.Event = field(default_factory=threading.Event)

    def exchange(self, part: Part, scaler: torch.amp.GradScaler | None, *, keeps: bool) -> None:
        """Exchange a part. All workers agree whether it can be used: if not, the step cannot. keeps: keep
        what is to be put back where a later part cannot be used."""
        if keeps:
            part.exchange.back_up()
        self.is_usable = part.exchange.step(part.gradient, self.progress, scaler=scaler, measure=self.measure)
        if not self.is_usable:
            self.nonfinite = part.exchange.nonfinite
        elif keeps:
            self.moved.append(part.exchange)

    def put_back(self) -> None:
        """Undo what parts have moved that were exchanged before one that cannot be used."""
        for exchange in self.moved:
            exchange.restore()


def merge(parts: Iterable[Part]) -> State:
    """The states of all buckets as one."""
    states = [part.exchange.state_dict() for part in parts]
    return {
        "parameters": {name: values for state in states for name, values in state["parameters"].items()},
        "buckets": [bucket for state in states for bucket in state["buckets"]],
    }


class BucketHook(ABC):
    """Exchanges a gradient bucket by bucket."""

    def __init__(
        self, comm: DistComm, *, scaler: torch.amp.GradScaler | None, steps_per_epoch: int | None
    ) -> None:
        self.comm, self._scaler = comm, scaler
        self.steps = StepCounter(steps_per_epoch)
        self.is_usable = True
        """Whether the last backward's gradients can be used: the same on all workers."""
        self._parts: dict[tuple[str, ...], Part] = {}
        """By the names of their parameters."""
        self._step: Step | None = None
        """The backward that goes on."""
        self._error: BaseException | None = None
        """Ends the hook: what the others have moved meanwhile is not known."""

    def set_progress(self, *, epoch: float | None = None, lr: float | None = None) -> None:
        """Say where training stands, before backward: for schedules that follow the epoch (it may be a
        fraction) or the learning rate. What was given last stays."""
        self.steps.set(epoch, lr)

    @property
    def exchanges(self) -> list[Exchange]:
        """One a bucket. DDP's: in the order of the last backward."""
        return [part.exchange for part in self._parts.values()]

    @property
    def density(self) -> float:
        """Elements a worker sent in the last step / n, mean over the workers that exchange."""
        return mean_density(self.exchanges)

    @abstractmethod
    def state_dict(self) -> State:
        """All that the next step depends on, by parameter name and by bucket; each worker's is its own."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Take a state_dict. Raises ValueError where it is another model's."""

    def _warm_up(self, build: Build, layout: Sequence[Slot], like: Tensor) -> None:
        """Compile here, and not in the first backward, what an exchange needs. like: of the gradient's type
        and device."""
        dtype = torch.float32 if like.dtype in HALVES else like.dtype
        warm_up(build, layout, like.new_empty(0, dtype=dtype), self.comm.world_size)

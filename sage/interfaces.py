"""The architecture on one screen: what a communicator, a reducer and a task are.

Data flows one way: task.loss > gradient.flat > Exchange(feedback, reducer, communicator) > optimizer >
metrics. This file imports nothing of ours, and every other part may import it.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slot:
    """One parameter's place in the flat gradient."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def stop(self) -> int:
        return self.start + self.size


def lay_out(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> list[Slot]:
    """The slots of named shapes, one after the other."""
    layout: list[Slot] = []
    for name, shape in shapes:
        layout.append(Slot(name, layout[-1].stop if layout else 0, tuple(shape)))
    return layout


@dataclass(frozen=True)
class Place:
    """Which worker this is, of how many."""

    rank: int
    world_size: int


@dataclass(frozen=True)
class Progress:
    """Where training stands. epoch is a fraction: 1.5 is half-way through the second epoch."""

    epoch: float
    step: int
    lr: float
    steps_per_epoch: int


def seed_of(*parts: int | str) -> int:
    """A seed in [0, 2^63) that depends on every part and on their order."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Seeds:
    """common is equal on all workers, worker is not."""

    common: int
    worker: int

    @classmethod
    def derive(cls, seed: int, rank: int) -> "Seeds":
        return cls(common=seed_of(seed, "common"), worker=seed_of(seed, "worker", rank))


class Stateful:
    """The base of everything whose state a checkpoint holds: the attributes named in state_names.

    They may be tensors, Python numbers, torch.Generators, or Stateful themselves, as sage.draws.Draws is.
    """

    state_names: tuple[str, ...] = ()
    worker_generators: tuple[str, ...] = ()
    """Those of them that are generators of a worker's own; the other generators are the same on all
    workers."""
    element_names: tuple[str, ...] = ()
    """Those of them that hold a number for each element of the flat gradient: (n,)."""

    held_names: tuple[str, ...] = ()
    """Those of them that stay as they are, for a parameter, in a step in which no worker uses it."""

    def slot_slices(self, name: str, layout: list[Slot]) -> list[slice] | None:
        """Where in the tensor `name` of state_names each parameter's part lies, so that a checkpoint holds it
        by the parameter's name; None for what belongs to no single parameter."""
        if name not in self.element_names:
            return None
        return [slice(slot.start, slot.stop) for slot in layout]

    def state_dict(self) -> dict[str, Any]:
        return {name: _saved(getattr(self, name)) for name in self.state_names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_names:
            value = getattr(self, name)
            if isinstance(value, Stateful):
                value.load_state_dict(state[name])
            elif isinstance(value, torch.Generator):
                value.set_state(state[name].cpu())  # where torch takes it from, on a GPU's generator too
            elif isinstance(value, Tensor):
                if (value.shape, value.dtype) != (state[name].shape, state[name].dtype):
                    raise ValueError(
                        f"{name}: expected {value.dtype} {tuple(value.shape)}, got another shape or type"
                    )
                setattr(self, name, state[name].to(value.device, copy=True))
            else:
                if not _is_like(state[name], value):
                    kind = type(value).__name__
                    raise TypeError(
                        f"{name}: expected {kind}, got {type(state[name]).__name__} or other elements"
                    )
                setattr(self, name, state[name])

    def reseed(self, seed: int) -> None:
        """Restart a worker's own generators from a seed."""
        for name in self.state_names:
            value = getattr(self, name)
            if name in self.worker_generators:
                value.manual_seed(seed_of(seed, name))
            elif isinstance(value, Stateful):
                value.reseed(seed_of(seed, name))


def _is_like(value: Any, old: Any) -> bool:
    """Whether a loaded value may take the place of a Python number, or of a list of numbers."""
    if isinstance(old, list):
        return isinstance(value, list) and all(isinstance(one, int | float) for one in value)
    return type(value) is type(old)


def _saved(value: Any) -> Any:
    if isinstance(value, Stateful):
        return value.state_dict()
    if isinstance(value, torch.Generator):
        return value.get_state()
    return value.clone() if isinstance(value, Tensor) else value


class CommunicationError(RuntimeError):
    """A collective failed: a worker died, fell behind, or called another one."""


class TrainingError(RuntimeError):
    """The run cannot continue: a number is not finite, replicas differ, a checkpoint cannot be written or
    read. What was written remains."""


class Stopped(Exception):  # noqa: N818  no error: what the user or the scheduler asked for
    """The run ends early, on all workers after the same step; a checkpoint was written where one could be."""

    def __init__(self, by_hand: bool) -> None:
        """by_hand: by Ctrl-C; otherwise the run is to be resumed."""
        super().__init__()
        self.by_hand = by_hand


class Communicator(ABC):
    """Collectives over the workers, in rank order. With one worker none takes place."""

    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        """Replace x by its sum or maximum over workers, in place; the same bits on every worker."""

    @abstractmethod
    def all_gather(self, x: Tensor) -> Tensor:
        """Every worker's x, of one shape on all of them: (world_size, *x.shape) in rank order."""

    @abstractmethod
    def all_gather_ragged(self, x: Tensor) -> list[Tensor]:
        """Every worker's x (length,), lengths differ and may be 0: world_size tensors in rank order."""

    @abstractmethod
    def all_to_all(self, x: Tensor) -> Tensor:
        """x (world_size, ...), of one shape on all workers, has a row for each: returns the rows for this
        worker, in rank order, in x's shape."""

    @abstractmethod
    def broadcast(self, x: Tensor, source: int = 0) -> None:
        """Replace x by the source worker's x, in place."""

    def read(self, x: Tensor) -> Tensor:
        """A copy of x on the host, once the device has computed it.

        Every number that the host needs from a collective is read here: where a lost peer lets a device wait
        for ever, this raises CommunicationError after the communicator's timeout.
        """
        return x.cpu()

    @abstractmethod
    def another(self) -> "Communicator":
        """A second communicator of the same worker, with a ledger of its own."""


class Reducer(Stateful, ABC):
    """Averages a flat gradient over workers, possibly lossily.

    Built from (config, layout, *, seeds, device): layout is a list of Slot in flat order. It stores no timer,
    rank, world size or process group, waits for the device at most to learn how much to send, and may run on
    any thread and stream, so that the same class works in processes, in threads, and in backward hooks.
    """

    Settings: ClassVar[type[Any]]
    takes_feedback: ClassVar[bool] = True
    """Whether what it leaves in send is an error, which can be fed back."""
    density: float = 1.0
    """Elements a worker selected in the last step / n, mean over workers. A host number: reading it costs
    nothing."""
    target_density: float = 1.0
    """What the density is meant to be from the next step on."""
    leaves_nothing: bool = False
    """Whether a step sends all of send as it is, so that nothing is left: then reduce_in_place works."""
    selects_largest: ClassVar[bool] = False
    """Whether it selects elements by their magnitude, so that measure_growth has something to measure."""
    growths: Tensor | None = None
    """After a step of which measure_growth has asked it: (world_size,) on the device, a factor a worker."""

    @abstractmethod
    def __init__(self, config: Any, layout: list[Slot], *, seeds: Seeds, device: torch.device) -> None: ...

    def begin_step(self, progress: Progress) -> None:
        """Called before each step, for schedules."""

    def accumulate(self, send: Tensor, grad: Tensor, *, grad_is_mean: bool = False) -> None:
        """send += grad. A sparsifier may fuse this with its scan; reduce must follow, with the same send.

        grad_is_mean: reduce gets this grad as mean, so that what it holds is the reducer's own from here on:
        a sparsifier zeroes it while it reads it.
        """
        send.add_(grad)

    @abstractmethod
    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        """Fill mean (n,) with the estimate of the workers' average of send; the same bits on every worker.

        send (n,) float32 (sparsifiers: float64 too): what this worker wants to send. On return it holds what
        was not sent, so the caller decides whether to keep it (error feedback). mean holds this worker's raw
        gradient on entry, unless the reducer's own accumulate has overwritten it.
        """

    def reduce_in_place(self, mean: Tensor, comm: Communicator) -> None:
        """The same without a send: mean (n,) holds what this worker wants to send on entry. Where
        leaves_nothing."""
        raise NotImplementedError

    @classmethod
    def is_sparsifier(cls, config: Any) -> bool:
        """Whether, with these settings, a step sends selected elements whole, which sent_indices names."""
        return False

    def sent_indices(self) -> Tensor:
        """A sparsifier's indices (m,) int64 that left send in the last reduce."""
        raise NotImplementedError

    @classmethod
    def why_fixed(cls, config: Any) -> str:
        """Why these settings leave no density to set, in words; empty where set_density works."""
        return f"{config.name} has no density that can be set"

    def set_density(self, density: float) -> None:
        """Select this share of the elements from the next step on."""
        raise NotImplementedError

    def measure_growth(self, share: float) -> None:
        """From now on measure in each step by which factor the density should grow, so that what is sent
        keeps this share of ||send||^2; all workers' factors travel with the step's first message."""
        raise NotImplementedError

    @abstractmethod
    def expected_payload_bytes(self, world_size: int) -> int:
        """What one worker hands to collectives in a step at the target density; at most, where it varies."""

    def notes(self) -> list[str]:
        """What the user of these settings should know, a line each; said once, before training."""
        return []

    def metrics(self) -> Mapping[str, float | Tensor]:
        """Threshold, controller terms, ...; asked for on logging steps only.

        What the device holds is a scalar tensor: the caller reads all of them at once.
        """
        return {}


class Task(Stateful, ABC):
    """A model, its data and its score. backward, clipping and the optimizer belong to the loop.

    Its state, beside the model's, are the attributes named in state_names (none, by default). A tensor
    attribute that is not named there is never changed in place: workers that are simulated in one process
    share those that have the same bits.
    """

    Settings: ClassVar[type[Any]]
    model: nn.Module
    batch_per_worker: int
    steps_per_epoch: int
    """Equal on all workers."""
    score: str
    """Which value of evaluate is the task's score."""
    higher_is_better: bool
    score_limits: tuple[float, float] = (-math.inf, math.inf)
    """The least and the greatest score there can be."""
    evaluated: str = "test"
    """What evaluate scores: the "test" data, or the "valid" data where a test follows at the end."""

    @abstractmethod
    def __init__(
        self, config: Any, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None: ...

    @classmethod
    @abstractmethod
    def check(cls, config: Any, data: Path, world_size: int) -> None:
        """Raise ValueError, in one line, where this task cannot run; cheap, before any worker starts."""

    @abstractmethod
    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """This worker's batches of an epoch, from the start-th on."""

    @abstractmethod
    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch, a scalar."""

    @abstractmethod
    def evaluate(self) -> dict[str, tuple[float, float]]:
        """name -> (sum, count) on this worker's part of the data; the value is sum / count over all workers.

        Called after each epoch, on the data that `evaluated` names.
        """

    def evaluate_at_end(self) -> dict[str, tuple[float, float]] | None:
        """The same on the test data, once after the last epoch; None where evaluate has done it."""
        return None

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """The values over all workers, and those that follow from them (a perplexity from a mean loss)."""
        return values

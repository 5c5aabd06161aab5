"""Everything that the next step depends on: what is the same on all workers, and what is each one's own."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sage.console import first_line
from sage.interfaces import Place, Stateful, Task, seed_of
from sage.runfolder.checkpoint import State, read_state
from sage.runfolder.manifest import SHARED, Checkpoint, worker_file


class Saved(Protocol):
    """What a checkpoint holds of a worker's own."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...

    def reseed(self, seed: int) -> None: ...


class Position(Stateful):
    """How far training has come; the same on all workers."""

    state_names = (
        "epoch",
        "index",
        "step",
        "steps_per_epoch",
        "scores",
        "skipped",
        "skipped_in_a_row",
        "log_due",
    )

    def __init__(self, steps_per_epoch: int) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.epoch = 0
        self.index = 0
        """The next step of the epoch."""
        self.step = 0
        """Steps done, skipped ones included."""
        self.scores: list[float] = []
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.log_due = False
        """Whether a step line was due at a step that was skipped."""

    def rescale(self, steps_per_epoch: int) -> None:
        """Move to the same part of an epoch that has another number of steps."""
        self.index = -(-self.index * steps_per_epoch // self.steps_per_epoch)  # rounded up
        self.steps_per_epoch = steps_per_epoch


class TrainingState:
    """Collects what a worker's part of a checkpoint holds, and puts it back."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        position: Position,
        parts: Mapping[str, Saved],
        device: torch.device,
    ) -> None:
        """parts: what is the worker's own, by name."""
        self.model, self.optimizer, self.position, self.device = model, optimizer, position, device
        self.parts = parts

    def shared(self) -> State:
        """Rank 0's weights, optimizer and position."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.position.state_dict(),
        }

    def own(self) -> State:
        """The worker's buffers (BatchNorm's), parts (memory, reducer, ...) and global generators."""
        return {
            "buffers": dict(self.model.named_buffers()),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
            "random": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }

    def restore(
        self, checkpoint: Checkpoint, place: Place, steps_per_epoch: int, seed: int, with_optimizer: bool
    ) -> None:
        """The worker's part of a checkpoint, also of another number of workers. steps_per_epoch, seed: this
        run's. Raises ValueError where its files cannot be used, or do not fit."""
        old = checkpoint.manifest.world_size
        try:
            self.load_shared(read_state(checkpoint, SHARED), with_optimizer)
            if old == place.world_size:
                self.load_own(read_state(checkpoint, worker_file(place.rank)))
            else:
                states = (read_state(checkpoint, worker_file(rank)) for rank in range(old))
                own_seed = seed_of(
                    seed, "worker", place.rank, "of", place.world_size, "from", self.position.step
                )
                self.reshard(states, steps_per_epoch, own_seed)
            self._check_position(checkpoint)
        except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            if str(checkpoint.folder) in str(error):  # it is about a file as a whole
                raise
            message = f"expected the state of this program's parts, got another ({first_line(error)})"
            raise ValueError(f"{checkpoint.folder}: {message}") from None
        if self.position.steps_per_epoch != steps_per_epoch:
            message = f"expected {steps_per_epoch} steps an epoch, as the data have now"
            raise ValueError(f"{checkpoint.folder}: {message}, got {self.position.steps_per_epoch}")

    def _check_position(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError where the weights are those of another step than the manifest says."""
        manifest, position = checkpoint.manifest, self.position
        if (manifest.step, manifest.epoch) != (position.step, position.epoch):
            raise ValueError(
                f"{checkpoint.folder}: expected step {manifest.step} and epoch {manifest.epoch}, as its "
                f"manifest says, got {position.step} and {position.epoch} in {SHARED}"
            )

    def load_shared(self, state: State, with_optimizer: bool) -> None:
        self.model.load_state_dict(state["model"])
        if with_optimizer:
            self.optimizer.load_state_dict(state["optimizer"])
        self.position.load_state_dict(state["position"])

    def load_own(self, state: State) -> None:
        self._load_buffers(state)
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        torch.set_rng_state(state["random"]["cpu"])
        if state["random"]["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)

    def reshard(self, states: Iterable[State], steps_per_epoch: int, seed: int) -> None:
        """The state of a worker among another number of them, from all old workers' states: the mean of
        their numbers, the first one's integers and common generators. Generators of its own and the global
        ones start anew from the seed; the task's state (a hidden state) stays as it was built."""
        first, mean = mean_of(states)
        self._load_buffers(first)
        for name, part in self.parts.items():
            if name != "task":
                part.load_state_dict(mean["parts"][name])
            part.reseed(seed)
        torch.manual_seed(seed)
        self.position.rescale(steps_per_epoch)

    def _load_buffers(self, state: State) -> None:
        for name, buffer in self.model.named_buffers():
            buffer.copy_(state["buffers"][name])


class BestWeights:
    """Keeps the weights of the epoch with the best score so far, the first of several, on the host."""

    def __init__(self, model: nn.Module, higher_is_better: bool) -> None:
        self._model, self._higher_is_better = model, higher_is_better
        self.weights: State | None = None
        """The model's state_dict as it was scored; None before the first epoch's end."""

    def consider(self, scores: Sequence[float]) -> None:
        """Keep the model's weights if the last of all scores so far, which is theirs, is the best.

        On a GPU this waits for the device."""
        if best_epoch(scores, self._higher_is_better) < len(scores) - 1:
            return
        self.weights = self._model.state_dict()
        for name, value in self.weights.items():
            self.weights[name] = value.to("cpu", copy=True)


def best_epoch(scores: Sequence[float], higher_is_better: bool) -> int:
    """The first epoch with the best score, counted from 0."""
    return scores.index(max(scores) if higher_is_better else min(scores))


class TaskSnapshot:
    """Keeps a task's state and buffers as they were before a step's forward pass."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._buffers = [(buffer, torch.empty_like(buffer)) for buffer in task.model.buffers()]
        self._state: State = {}

    def take(self) -> None:
        for buffer, kept in self._buffers:
            kept.copy_(buffer)
        self._state = self._task.state_dict()

    def put_back(self) -> None:
        for buffer, kept in self._buffers:
            buffer.copy_(kept)
        self._task.load_state_dict(self._state)


def mean_of(states: Iterable[State]) -> tuple[State, State]:
    """The first state, and the mean of all: of floating point tensors and numbers, computed in float64 and
    exact where all are equal; of anything else the first. Holds one more state at a time."""
    remaining = iter(states)
    first = mean = next(remaining)
    for count, state in enumerate(remaining, start=2):
        mean = _step(mean, state, count)
    return first, _cast(mean, first)


def _step(mean: Any, value: Any, count: int) -> Any:
    """The mean of count values, from the mean of all but the last."""
    if isinstance(value, dict):
        return {key: _step(mean[key], part, count) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_step(one, part, count) for one, part in zip(mean, value, strict=True)]
    if isinstance(value, Tensor) and value.is_floating_point():
        return mean.double() + (value.double() - mean.double()) / count
    return mean + (value - mean) / count if isinstance(value, float) else mean


def _cast(mean: Any, like: Any) -> Any:
    """A mean in the types of the first state."""
    if isinstance(like, dict):
        return {key: _cast(mean[key], part) for key, part in like.items()}
    if isinstance(like, list | tuple):
        return [_cast(one, part) for one, part in zip(mean, like, strict=True)]
    return mean.to(like.dtype) if isinstance(like, Tensor) and like.is_floating_point() else mean

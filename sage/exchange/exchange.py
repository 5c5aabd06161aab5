"""One step between backward and the optimizer: error feedback, reducer and communicator in one object."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.feedback import Feedback
from sage.interfaces import Communicator, Progress, Reducer, Slot, Stateful

State = dict[str, Any]


@dataclass(frozen=True)
class ExchangeNorms:
    """Norms of one step: scalars on the device."""

    send: Tensor
    """Of what this worker wanted to send."""
    left: Tensor
    """Of what it has not sent."""
    left_is_error: bool
    """Whether what was left is send - sent (not so where a method sends signs)."""

    def read(self) -> dict[str, float]:
        """residual_norm, and compression_error = ||send - sent||^2 / ||send||^2 where there is one. Waits for
        the device."""
        send, left = self.send.item(), self.left.item()
        if not self.left_is_error:
            return {"residual_norm": left}
        return {"residual_norm": left, "compression_error": 0.0 if send == 0 else (left / send) ** 2}


class Exchange:
    """Replaces this worker's gradient by the estimate of all workers' mean.

    The only place that knows the order of a step. Everybody who uses a reducer goes through it: the training
    loop, the examples, the benchmarks.
    """

    def __init__(
        self,
        feedback: Feedback,
        reducer: Reducer,
        comm: Communicator,
        layout: Sequence[Slot],
        clock: Clock | None = None,
    ) -> None:
        """layout: the parameters in the flat gradient. clock: counts the step as its phase "reduce"."""
        self.feedback, self.reducer, self.comm, self.layout = feedback, reducer, comm, list(layout)
        self._clock = clock or Clock(torch.device("cpu"))

    def average(self, grad: Tensor, progress: Progress, *, measure: bool = False) -> ExchangeNorms | None:
        """Replace grad by the estimate of its mean over the workers; the same bits on every worker.

        grad (n,): this worker's gradient. progress: where training stands, for schedules of density, learning
        rate and levels. What is not sent stays in the feedback's memory. measure: return the norms, too.
        Raises CommunicationError.
        """
        memory = self.feedback.memory

        # 1. schedules
        self.reducer.begin_step(progress)
        self.feedback.begin_step(progress)

        # 2. memory = what this worker wants to send
        with self._clock.phase("reduce"):
            self.feedback.compensate(self.reducer, grad)
        send_norm = memory.norm() if measure else None

        # 3. grad = the mean; memory = what was not sent
        with self._clock.phase("reduce"):
            self.reducer.reduce(memory, grad, self.comm)
            self.feedback.after_reduce(self.reducer)
        if send_norm is None:
            return None
        return ExchangeNorms(send_norm, memory.norm(), self.reducer.takes_feedback)

    # --- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """All that the next step depends on, by parameter and by bucket.

        {"parameters": {name: {"feedback.memory": (size,), ...}},
         "buckets": [{"names": [...], "feedback": {...}, "reducer": {...}}]}

        parameters holds what belongs to single parameters (memory, velocity, factors, levels), buckets what
        one exchange has once (thresholds, counters, generators). This exchange is one bucket, of all its
        parameters.
        """
        parameters: list[State] = [{} for _ in self.layout]
        bucket: State = {"names": [slot.name for slot in self.layout]}
        for prefix, owner in self._owners().items():
            bucket[prefix] = _divide(owner, owner.state_dict(), self.layout, f"{prefix}.", parameters)
        names = (slot.name for slot in self.layout)
        return {"parameters": dict(zip(names, parameters, strict=True)), "buckets": [bucket]}

    def load_state_dict(self, state: State) -> None:
        """Take a state, also one of another division of the same parameters into buckets.

        What belongs to a parameter comes by its name. The rest comes from the bucket of the same parameters;
        where there is none, from the bucket that held the most elements of this one (the first of several).
        Raises KeyError where a parameter is missing, ValueError where a shape or type is another.
        """
        parameters = [state["parameters"][slot.name] for slot in self.layout]
        bucket = max(state["buckets"], key=self._count_common)
        for prefix, owner in self._owners().items():
            owner.load_state_dict(_unite(bucket[prefix], parameters, f"{prefix}."))

    def reseed(self, seed: int) -> None:
        """Restart this worker's own generators from a seed."""
        for owner in self._owners().values():
            owner.reseed(seed)

    def _owners(self) -> dict[str, Stateful]:
        return {"feedback": self.feedback, "reducer": self.reducer}

    def _count_common(self, bucket: State) -> tuple[bool, int]:
        """Whether a saved bucket is this one, and how many elements the two have in common."""
        names = set(bucket["names"])
        common = sum(slot.size for slot in self.layout if slot.name in names)
        return bucket["names"] == [slot.name for slot in self.layout], common


def _divide(owner: Stateful, state: State, layout: list[Slot], prefix: str, parameters: list[State]) -> State:
    """Move what belongs to single parameters out of a state into theirs; returns the rest."""
    rest: State = {}
    for name, value in state.items():
        part = getattr(owner, name, None)
        slices = owner.slot_slices(name, layout)
        if isinstance(part, Stateful):
            rest[name] = _divide(part, value, layout, f"{prefix}{name}.", parameters)
        elif slices is None:
            rest[name] = value
        else:
            for parameter, where in zip(parameters, slices, strict=True):
                parameter[prefix + name] = value[where]
    return rest


def _unite(rest: State, parameters: list[State], prefix: str) -> State:
    """The reverse of _divide."""
    state = {key: _copied(value) for key, value in rest.items()}
    for key in parameters[0]:
        if key.startswith(prefix):
            *owners, name = key.removeprefix(prefix).split(".")
            target = state
            for owner in owners:
                target = target[owner]
            target[name] = torch.cat([parameter[key] for parameter in parameters])
    return state


def _copied(value: Any) -> Any:
    """A mapping that can be added to without changing the first."""
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, dict) else value

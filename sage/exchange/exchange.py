"""One step between backward and the optimizer: scaling, error feedback, reducer and communicator."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.feedback import Feedback
from sage.exchange.scaling import ConstantScaling, Scaling
from sage.interfaces import Communicator, Progress, Reducer, Slot, Stateful

State = dict[str, Any]
NUM_LISTED = 10
"""How many names an error lists."""


class Gradient(Protocol):
    """A flat gradient and where it comes from: a GradientBuffer, or a bucket of somebody else's."""

    flat: Tensor
    """(n,): valid between collect and distribute."""

    def collect(self, read: Callable[[Tensor], Tensor] = Tensor.cpu) -> list[bool]:
        """Bring the gradients into flat; returns, for each slot, whether its parameter has one. read: how
        the host learns a device's numbers."""

    def distribute(self, used: Sequence[bool]) -> None:
        """Give flat back as the parameters' gradients."""


@dataclass(frozen=True)
class ExchangeNorms:
    """Norms of one step: scalars on the device."""

    send: Tensor
    """The norm of what this worker wanted to send."""
    left: Tensor
    """The norm of what it has not sent."""
    left_is_error: bool
    """Whether what was left is send - sent (not so where a method sends signs)."""

    def values(self) -> dict[str, Tensor]:
        """residual_norm, and compression_error = ||send - sent||^2 / ||send||^2 where there is one: float64
        scalars on the device."""
        send, left = self.send.double(), self.left.double()
        if not self.left_is_error:
            return {"residual_norm": left}
        return {
            "residual_norm": left,
            "compression_error": torch.where(send == 0, 0.0, (left / send).square()),
        }

    def read(self) -> dict[str, float]:
        """The same as numbers. Waits for the device."""
        return {name: value.item() for name, value in self.values().items()}

    @classmethod
    def of_all(cls, parts: Sequence["ExchangeNorms"]) -> "ExchangeNorms":
        """The norms of several parts of one gradient, from those of each."""
        send, left = (
            torch.stack([getattr(part, name).double() for part in parts]).norm() for name in ("send", "left")
        )
        return cls(send, left, parts[0].left_is_error)


def norm(values: Tensor, found: Tensor | None = None, *, waits: bool = True) -> Tensor:
    """The 2-norm, a scalar; in float64 where the sum of squares is too large for the values' type.

    found: the norm in the values' type, where it is known. waits: look whether it is finite, which on a GPU
    waits for the device; false: compute in float64 at once.
    """
    if waits:
        narrow: Tensor = torch.linalg.vector_norm(values) if found is None else found
        if narrow.isfinite():
            return narrow
    wide: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return wide


def start_agreement(
    side: Communicator, is_finite: Tensor, used: Sequence[bool], request: int = 0, request_to_skip: int = 1
) -> Tensor:
    """Agree over all workers on a step: one all-reduce of 4 (1 + slots) bytes. Waits for no device.

    is_finite: a scalar on the device, whether this worker's gradient is. used: for each slot, whether this
    worker has a gradient of it. Returns flags (1 + slots,) int32: the largest request of all workers, where
    one whose gradient is not finite requests request_to_skip; then for each slot whether any worker uses it.
    """
    flags = torch.tensor([request, *used], dtype=torch.int32).to(is_finite.device, non_blocking=True)
    flags[0] = torch.where(is_finite, flags[0], request_to_skip)
    side.all_reduce(flags, "max")
    return flags


def read_agreement(side: Communicator, flags: Tensor) -> tuple[int, list[bool]]:
    """The request and the slots' uses of start_agreement's flags. Waits for the device."""
    agreed, *any_uses = side.read(flags).tolist()  # host synchronisation
    return agreed, [bool(flag) for flag in any_uses]


class Exchange:
    """Replaces this worker's gradient by the estimate of all workers' mean.

    The only place that knows in which order scaling, feedback, reducer and communicator are called. A loop of
    your own calls step() once between backward and the optimizer. The trainer calls average(), since it
    agrees with the other workers on signals and checkpoints in the same message as on finite gradients.
    """

    def __init__(
        self,
        feedback: Feedback,
        reducer: Reducer,
        comm: Communicator,
        layout: Sequence[Slot],
        clock: Clock | None = None,
        reads_late: bool = False,
        scaling: Scaling | None = None,
    ) -> None:
        """layout: the parameters in the flat gradient. clock: counts the step as its phase "reduce", and
        norms that are only measured as "log". reads_late: norms are computed without waiting for the device.
        scaling: of this reducer; None: its density stays."""
        self.feedback, self.reducer, self.comm, self.layout = feedback, reducer, comm, list(layout)
        self._side, self._waits = comm.another(), not reads_late
        self._backup: State = {}
        self.measured: tuple[Tensor, ExchangeNorms] | None = None
        """Of the last step, where it was to be measured: the norm of this worker's gradient, and the
        exchange's."""
        self.nonfinite: tuple[str, Tensor] | None = None
        """Of the last step that could not be used: the first parameter whose gradient was not finite on this
        worker, and a scalar, its first such element."""
        self._clock = clock or Clock(torch.device("cpu"))
        self.scaling = scaling or ConstantScaling.of(reducer)

    def step(
        self,
        gradient: Gradient,
        progress: Progress,
        *,
        scaler: torch.amp.GradScaler | None = None,
        measure: bool = False,
    ) -> bool:
        """Replace a model's gradients by the estimate of their mean over the workers.

        Call it after backward and before scaler.unscale_, clipping and the optimizer, on all workers. With a
        scaler the memory is kept in unscaled units. A parameter that no worker used has no gradient
        afterwards (None), as in torch, and what waits for it in the memory goes on waiting.

        Returns whether the step can be used. If a gradient is not finite, on any worker, it returns False on
        all: memory and reducer are as they were, and all workers' gradients are NaN, so that a GradScaler
        skips the step on all of them; without a GradScaler skip optimizer.step() yourself.

        measure: leave norms in measured. Raises CommunicationError, and RuntimeError where the parameters
        have changed, or the scaler has already unscaled the gradients.
        """
        return bool(self._step(gradient, progress, scaler, has_batch=True, measure=measure))

    def step_of_others(
        self, gradient: Gradient, progress: Progress, *, scaler: torch.amp.GradScaler | None = None
    ) -> bool | None:
        """The same for a worker that has no batch left, and no gradients; None where no worker has."""
        return self._step(gradient, progress, scaler, has_batch=False)

    def _step(
        self,
        gradient: Gradient,
        progress: Progress,
        scaler: torch.amp.GradScaler | None,
        has_batch: bool,
        measure: bool = False,
    ) -> bool | None:
        scale = _scale_of(scaler)
        used, grad = gradient.collect(self._side.read), gradient.flat
        # Both are NaN where an element is. (A norm of order infinity takes ten times as long on a CPU.)
        low, high = grad.aminmax()
        is_finite = low.isfinite() & high.isfinite()
        # All agree before anything is changed: the one time that a step waits for the device.
        flags = start_agreement(self._side, is_finite, [has_batch, *used])
        is_bad, (any_has_batch, *used) = read_agreement(self._side, flags)
        if not any_has_batch:
            return None
        if is_bad:
            self.nonfinite = self._find_nonfinite(grad)
            grad.fill_(torch.nan)
        else:
            if scale != 1:
                grad.div_(scale)
            gradient_norm = norm(grad, waits=self._waits) if measure else None
            norms = self.average(grad, progress, used=used, measure=measure)
            self.measured = None if gradient_norm is None or norms is None else (gradient_norm, norms)
            if scale != 1:
                grad.mul_(scale)
        gradient.distribute(used)
        return not is_bad

    def average(
        self,
        grad: Tensor,
        progress: Progress,
        *,
        used: Sequence[bool] | None = None,
        measure: bool = False,
    ) -> ExchangeNorms | None:
        """Replace grad by the estimate of its mean over the workers; the same bits on every worker.

        grad (n,): this worker's gradient, which all workers have found to be finite. progress: where training
        stands, for schedules of density, learning rate and levels. used: for each slot, whether any worker
        has a gradient of it (None: all); the state of the others stays as it is. What is not sent stays in
        the feedback's memory. measure: return the norms, too. Raises CommunicationError.
        """
        kept = self._kept_for_later([] if used is None else list(used))
        with self._clock.phase("reduce"), kept:
            return self._average(grad, progress, measure)

    def _average(self, grad: Tensor, progress: Progress, measure: bool) -> ExchangeNorms | None:
        # 1. the density of this step, and schedules
        self.scaling.begin_step(progress, self.comm)
        reducer = self.scaling.current
        self.reducer.begin_step(progress)
        self.feedback.begin_step(progress)

        # 2. memory = what this worker wants to send
        in_place = reducer.leaves_nothing and not self.feedback.remembers
        send = grad if in_place else self.feedback.memory
        if not in_place:
            self.feedback.compensate(reducer, grad)
        send_norm = self._norm(send) if measure else None

        # 3. grad = the mean; memory = what was not sent
        comm = self.scaling.watched(self.comm)
        if in_place:
            reducer.reduce_in_place(grad, comm)
        else:
            reducer.reduce(send, grad, comm)
            self.feedback.after_reduce(reducer)
        self.scaling.end_step(self.comm)
        if send_norm is None:
            return None
        left = torch.zeros_like(send_norm) if in_place else self._norm(send)
        return ExchangeNorms(send_norm, left, reducer.takes_feedback)

    def _norm(self, values: Tensor) -> Tensor:
        with self._clock.phase("log"):
            return norm(values, waits=self._waits)

    @property
    def density(self) -> float:
        """Elements a worker sent in the last step / n, mean over workers."""
        return self.scaling.current.density

    def metrics(self) -> Mapping[str, float | Tensor]:
        """The reducer's and the scaling's, of the last step; asked for on logging steps only."""
        return {**self.scaling.current.metrics(), **self.scaling.metrics()}

    def _find_nonfinite(self, grad: Tensor) -> tuple[str, Tensor] | None:
        """The first parameter whose gradient is not finite, and its first such element. Waits for the
        device."""
        bad = (~grad.isfinite()).nonzero()
        if not len(bad):
            return None
        first = int(bad[0])
        return next(slot.name for slot in self.layout if first < slot.stop), grad[first].clone()

    @contextmanager
    def _kept_for_later(self, used: list[bool]) -> Iterator[None]:
        """Keep what is held of unused slots (memory, velocity, momenta, factors) as it is during a step.

        What is sent and would be added up is zero meanwhile.
        """
        unused = [index for index, is_used in enumerate(used) if not is_used]
        kept = [
            (owner, name, where, getattr(owner, name)[where].clone())
            for owner, name, where in (self._held_parts(unused) if unused else ())
        ]
        for owner, name, where, _ in kept:
            if name in owner.element_names:
                getattr(owner, name)[where] = 0
        yield
        for owner, name, where, values in kept:
            part = getattr(owner, name)[where]
            if part.shape == values.shape:  # else the method has laid it out anew
                part.copy_(values)

    def _held_parts(self, slots: list[int]) -> Iterator[tuple[Stateful, str, slice]]:
        """What must stay as it is of these slots: whose attribute, and where in it."""
        waiting = list(self._owners().values())
        while waiting:
            owner = waiting.pop()
            for name in owner.state_names:
                part = getattr(owner, name)
                if isinstance(part, Stateful):
                    waiting.append(part)
                elif name in owner.held_names:
                    slices = owner.slot_slices(name, self.layout)
                    assert slices is not None
                    yield from ((owner, name, slices[slot]) for slot in slots)

    # --- state ----------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """All that the next step depends on, by parameter and by bucket.

        {"parameters": {name: {"feedback.memory": (size,), ...}},
         "buckets": [{"names": [...], "feedback": {...}, "reducer": {...}, "scaling": {...}}]}

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
        Raises ValueError where a parameter is missing, or a shape or type is another.
        """
        self._check_names(state["parameters"])
        parameters = [state["parameters"][slot.name] for slot in self.layout]
        bucket = max(state["buckets"], key=self._count_common)  # ValueError where there is none
        for prefix, owner in self._owners().items():
            owner.load_state_dict(_unite(bucket[prefix], parameters, f"{prefix}."))

    def _check_names(self, parameters: State) -> None:
        """Raise ValueError where one of the parameters is not among those of a state."""
        missing = [slot.name for slot in self.layout if slot.name not in parameters]
        if missing:
            found = _listed(list(parameters)) or "a state without any"
            raise ValueError(f"state: expected the parameter {missing[0]}, got {found}")

    def back_up(self) -> None:
        """Keep a copy of the state for restore(), in memory that is kept: as much as the state has."""
        self._backup = {
            prefix: _copy_into(self._backup.get(prefix, {}), owner)
            for prefix, owner in self._owners().items()
        }

    def restore(self) -> None:
        """Put back what the last back_up() has kept."""
        for prefix, owner in self._owners().items():
            owner.load_state_dict(self._backup[prefix])

    def reseed(self, seed: int) -> None:
        """Restart this worker's own generators from a seed."""
        for owner in self._owners().values():
            owner.reseed(seed)

    def _owners(self) -> dict[str, Stateful]:
        return {"feedback": self.feedback, "reducer": self.reducer, "scaling": self.scaling}

    def _count_common(self, bucket: State) -> tuple[bool, int]:
        """Whether a saved bucket is this one, and how many elements the two have in common."""
        names = set(bucket["names"])
        common = sum(slot.size for slot in self.layout if slot.name in names)
        return bucket["names"] == [slot.name for slot in self.layout], common


def mean_density(exchanges: Sequence[Exchange]) -> float:
    """Elements a worker sent in the last step / n, mean over workers, of several exchanges together."""
    sizes = [exchange.layout[-1].stop for exchange in exchanges]
    sent = sum(size * exchange.density for size, exchange in zip(sizes, exchanges, strict=True))
    return sent / sum(sizes) if sizes else 1.0


def _scale_of(scaler: torch.amp.GradScaler | None) -> float:
    """What a scaler has multiplied the gradients by. Raises RuntimeError where it has already divided
    them."""
    if scaler is None or not scaler.is_enabled():
        return 1.0
    # The scaler has no public way to ask for it. After unscale_ it has already recorded whether it found an
    # infinity, and would miss one that the exchange brings from another worker.
    stages = [state["stage"].name for state in scaler._per_optimizer_states.values()]
    if "UNSCALED" in stages:
        raise RuntimeError(
            "exchange.step: expected to be called before scaler.unscale_, got unscaled gradients"
        )
    return scaler.get_scale()


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


def _listed(names: list[str]) -> str:
    """Names in one line, however many."""
    rest = len(names) - NUM_LISTED
    return ", ".join(names[:NUM_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _copied(value: Any) -> Any:
    """A mapping that can be added to without changing the first."""
    return {key: _copied(part) for key, part in value.items()} if isinstance(value, dict) else value


def _copy_into(kept: State, owner: Stateful) -> State:
    """An owner's state, its tensors copied into those of kept where they have the same shapes."""
    return {name: _copy_part(kept.get(name), getattr(owner, name)) for name in owner.state_names}


def _copy_part(kept: Any, value: Any) -> Any:
    if isinstance(value, Stateful):
        return _copy_into(kept or {}, value)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, Tensor):
        is_like = isinstance(kept, Tensor) and kept.shape == value.shape
        return kept.copy_(value) if is_like else value.clone()
    return list(value) if isinstance(value, list) else value

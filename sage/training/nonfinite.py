"""Which number of a step is not finite, and on which worker."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from sage.exchange.feedback import Feedback
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Slot
from sage.training.agree import Evidence, find_nonfinite
from sage.training.state import Position
from sage.workers.store import RendezvousStore

Named = Iterable[tuple[str, Tensor]]


class StepNumbers(Protocol):
    """A step's gradient and memory, as far as it must be known whether they are finite."""

    def norm(self) -> Tensor:
        """Finite where the gradient is. A scalar, which may be too large all the same."""

    def largest(self) -> Named:
        """By name, scalars that tell whether the gradient is finite once it is gone."""

    def gradients(self) -> Named:
        """The gradient, parameter by parameter."""

    def memories(self) -> Named:
        """What was not sent, parameter by parameter."""


class FlatNumbers:
    """Those of a flat gradient, before it is exchanged."""

    def __init__(self, gradient: GradientBuffer, feedback: Feedback) -> None:
        self._gradient, self._feedback = gradient, feedback

    def norm(self) -> Tensor:
        norm: Tensor = torch.linalg.vector_norm(self._gradient.flat)
        return norm

    def largest(self) -> Named:
        slots = self._gradient.layout
        names = [f"the largest magnitude of the gradient of {slot.name}" for slot in slots]
        return zip(names, self._gradient.largest_magnitudes(), strict=True)

    def gradients(self) -> Named:
        return parts_of("the gradient", self._gradient.layout, self._gradient.flat)

    def memories(self) -> Named:
        return parts_of("what was not sent", self._gradient.layout, self._feedback.memory)


class NonFiniteFinder:
    """Names what is not finite. Its find methods are called by all workers, and return the same on all of
    them: "the loss became nan on rank 1 at epoch 0, step 3", or "" where all is finite."""

    def __init__(self, numbers: StepNumbers, position: Position, store: RendezvousStore) -> None:
        self._numbers, self._position, self._store = numbers, position, store

    def evidence(self, loss: Tensor, *, late: bool) -> Evidence:
        """By what is known whether this step is finite on this worker. late: also which slot is not, once the
        gradient is gone."""
        if late:
            named = [("the loss", loss), *self._numbers.largest()]
            values = torch.stack([value.double() for _, value in named])
            return Evidence(*self._now(), values, names=tuple(name for name, _ in named))
        norm = self._numbers.norm()
        return Evidence(*self._now(), loss + norm, norm)

    def find(self, loss: Tensor) -> str:
        """In this step's losses and, where all of them are finite, gradients."""
        return self._find("loss", [("the loss", loss)]) or self._find("gradient", self._numbers.gradients())

    def find_late(self, evidence: Evidence) -> str:
        """In the loss and gradient of an earlier step, from its late evidence."""
        loss, *gradients = zip(evidence.names, evidence.values, strict=True)
        when = evidence.epoch, evidence.step
        return self._find("loss", [loss], when) or self._find("gradient", gradients, when)

    def find_in_memory(self) -> str:
        """In the memory, which has grown beyond the largest number, as the gradients that it was made of were
        all finite."""
        return self._find("memory", self._numbers.memories())

    def _find(self, topic: str, named: Named, when: tuple[int, int] | None = None) -> str:
        """when: epoch and step; None: now."""
        epoch, step = when or self._now()
        found = self._store.collect(f"{topic}/{step}", find_nonfinite(named))
        bad = [f"{what} on rank {rank}" for rank, what in enumerate(found) if what]
        return f"{bad[0]} at epoch {epoch}, step {step}" if bad else ""

    def _now(self) -> tuple[int, int]:
        return self._position.epoch, self._position.step


def parts_of(what: str, layout: Iterable[Slot], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each parameter's part of a flat tensor (n,), as "WHAT of PARAMETER"."""
    return ((f"{what} of {slot.name}", flat[slot.start : slot.stop]) for slot in layout)

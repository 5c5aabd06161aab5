"""Which number of a step is not finite, and on which worker."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from sage.exchange.feedback import Feedback
from sage.exchange.gradient import GradientBuffer
from sage.training.agree import Evidence, find_nonfinite
from sage.training.state import Position
from sage.workers.store import RendezvousStore


class NonFiniteFinder:
    """Names what is not finite. Its find methods are called by all workers, and return the same on all of
    them: "the loss became nan on rank 1 at epoch 0, step 3", or "" where all is finite."""

    def __init__(
        self, gradient: GradientBuffer, feedback: Feedback, position: Position, store: RendezvousStore
    ) -> None:
        self._gradient, self._feedback, self._position, self._store = gradient, feedback, position, store

    def evidence(self, loss: Tensor, *, late: bool) -> Evidence:
        """By what is known whether this step is finite on this worker. late: also which slot is not, once the
        gradient is gone."""
        gradient = self._gradient
        if late:
            largest = torch.stack(gradient.largest_magnitudes()).double()  # (slots,)
            return Evidence(*self._now(), torch.cat([loss.double().view(1), largest]))
        norm: Tensor = torch.linalg.vector_norm(gradient.flat)
        return Evidence(*self._now(), loss + norm, norm)

    def find(self, loss: Tensor) -> str:
        """In this step's loss and gradient."""
        return self._find("bad", [("the loss", loss), *self._parts("the gradient", self._gradient.flat)])

    def find_late(self, evidence: Evidence) -> str:
        """In the loss and gradient of an earlier step, from its late evidence."""
        slots = self._gradient.layout
        names = ["the loss", *(f"the largest magnitude of the gradient of {slot.name}" for slot in slots)]
        named = zip(names, evidence.values, strict=True)
        return self._find("bad", named, (evidence.epoch, evidence.step))

    def find_in_memory(self) -> str:
        """In the memory, which has grown beyond the largest number, as the gradients that it was made of were
        all finite."""
        return self._find("memory", self._parts("what was not sent", self._feedback.memory))

    def _find(
        self, topic: str, named: Iterable[tuple[str, Tensor]], when: tuple[int, int] | None = None
    ) -> str:
        """when: epoch and step; None: now."""
        epoch, step = when or self._now()
        found = self._store.collect(f"{topic}/{step}", find_nonfinite(named))
        bad = [f"{what} on rank {rank}" for rank, what in enumerate(found) if what]
        return f"{bad[0]} at epoch {epoch}, step {step}" if bad else ""

    def _parts(self, what: str, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        return ((f"{what} of {slot.name}", flat[slot.start : slot.stop]) for slot in self._gradient.layout)

    def _now(self) -> tuple[int, int]:
        return self._position.epoch, self._position.step

"""Accordion: low compression for the tensors whose gradient is changing, high for the others."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor

from reducers.common import Leveled, WrapperSettings
from sage.config import Named
from sage.interfaces import Communicator, Progress, Reducer, Seeds, Slot

Density = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1)]


class AccordionSettings(WrapperSettings):
    name: Literal["accordion"] = "accordion"
    inner: Literal["topk", "powersgd"] = "topk"
    """The reducer whose levels are chosen."""
    densities: Annotated[tuple[Density, Density], Strict(False)] = (0.1, 0.01)
    """topk: the density at low and at high compression."""
    ranks: Annotated[tuple[Rank, Rank], Strict(False)] = (2, 1)
    """powersgd: the rank at low and at high compression."""
    detector: Literal["epoch", "batch"] = "epoch"
    """Whose norm shows a change: the gradient summed over an epoch (the paper), or that of an epoch's first
    batch (SAGE's published code)."""
    interval_epochs: int = Field(default=10, ge=1)
    """Epochs between two decisions."""
    change: float = Field(default=0.5, gt=0)
    """A tensor whose norm changed by this share or more is in a critical regime: low compression."""
    vectors: Literal["whole", "compressed"] = "whole"
    """topk: send all of a tensor of one dimension (the paper), or treat it as the others."""

    @model_validator(mode="after")
    def _low_compression_sends_more(self) -> Self:
        for name, (low, high) in (("densities", self.densities), ("ranks", self.ranks)):
            if low < high:
                raise ValueError(f"{name}: expected the larger one first, got {low:g} and {high:g}")
        return self

    def inner_section(self) -> dict[str, Any]:
        return {"name": self.inner}


class Accordion(Reducer):
    """Agarwal et al. 2021, arXiv 2010.16248, algorithm 1, around a reducer with a level per tensor.

    After every interval_epochs-th epoch, rank 0 compares the norm of each tensor of its raw gradient with the
    norm an interval ago: |before - now| / before >= change means low compression until the next decision. So
    do the first decision, a norm of zero, and a learning rate that is lower at the start of an epoch than at
    the start of the one before. The choice is broadcast. Where it changes, PowerSGD draws new factors. The
    inner reducer's other settings are its defaults. Without begin_step compression stays low.
    """

    Settings: ClassVar[type[Named]] = AccordionSettings
    state_names = ("levels", "previous", "total", "epoch", "lr", "inner")
    element_names = ("total",)

    def __init__(
        self,
        config: AccordionSettings,
        layout: list[Slot],
        *,
        seeds: Seeds,
        device: torch.device,
        inner: Leveled,
    ) -> None:
        self.config, self.layout, self.inner = config, layout, inner
        self.epoch, self.lr = -1, 0.0
        self.previous = torch.zeros(len(layout), device=device)  # norms at the last decision
        sums = layout[-1].stop if config.detector == "epoch" else 0
        self.total = torch.zeros(sums, device=device)  # the epoch's raw gradients so far
        self._progress: Progress | None = None
        self._applied: list[float] = []
        self.set_compression(torch.ones(len(layout), dtype=torch.uint8, device=device))

    def slot_slices(self, name: str, layout: list[Slot]) -> list[slice] | None:
        if name in ("levels", "previous"):
            return [slice(index, index + 1) for index in range(len(layout))]
        return super().slot_slices(name, layout)

    def begin_step(self, progress: Progress) -> None:
        self._progress = progress

    def accumulate(self, send: Tensor, grad: Tensor, *, grad_is_mean: bool = False) -> None:
        self.inner.accumulate(send, grad)  # reduce still reads the raw gradient in mean

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        if self._progress is not None:
            self._watch(mean, self._progress, comm)
        self.inner.reduce(send, mean, comm)
        self.density = self.inner.density

    @classmethod
    def is_sparsifier(cls, config: AccordionSettings) -> bool:
        return config.inner == "topk"

    def sent_indices(self) -> Tensor:
        return self.inner.sent_indices()

    def set_compression(self, low: Tensor) -> None:
        """Compress each tensor little or much from now on. low (tensors,) uint8: 1 for low compression."""
        self.levels = low.to(self.previous.device)
        choices = self.config.densities if self.config.inner == "topk" else self.config.ranks
        levels: list[float] = [choices[0] if is_low else choices[1] for is_low in low.tolist()]
        if self.config.inner == "topk" and self.config.vectors == "whole":
            levels = [
                level if len(slot.shape) > 1 else 1.0 for level, slot in zip(levels, self.layout, strict=True)
            ]
        if levels != self._applied:
            self._applied = levels
            self.inner.set_levels(levels)

    def _watch(self, grad: Tensor, progress: Progress, comm: Communicator) -> None:
        """Take the raw gradient (n,) of a step; at the start of an epoch, decide where a decision is due."""
        epoch, ended = int(progress.epoch), self.epoch
        by_batch = self.config.detector == "batch"
        if epoch != ended:
            fell, self.epoch, self.lr = progress.lr < self.lr, epoch, progress.lr
            judged = epoch if by_batch else ended
            if judged >= 0 and judged % self.config.interval_epochs == 0:
                self._decide(grad if by_batch else self.total, comm)
            if fell:
                self.set_compression(torch.ones_like(self.levels))
            self.total.zero_()
        if not by_batch:
            self.total.add_(grad)

    def _decide(self, gradient: Tensor, comm: Communicator) -> None:
        """1. rank 0 decides for every tensor; 2. it broadcasts its choice."""
        parts = [gradient[slot.start : slot.stop] for slot in self.layout]
        norms = torch.stack(torch._foreach_norm(parts))  # (tensors,)
        # low compression unless | ||G_before|| - ||G|| | / ||G_before|| < change
        calm = (self.previous - norms).abs() < self.config.change * self.previous
        low = (~calm).to(torch.uint8)
        comm.broadcast(low)
        comm.read(low)  # host synchronisation, with a deadline: set_compression reads it too
        self.previous = norms
        self.set_compression(comm.read(low))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The sizes of the inner reducer's state follow from the levels.
        self.set_compression(state["levels"].to(self.levels.device))
        super().load_state_dict(state)

    def expected_payload_bytes(self, world_size: int) -> int:
        return self.inner.expected_payload_bytes(world_size)

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {**self.inner.metrics(), "low_compression": self.levels.float().mean()}

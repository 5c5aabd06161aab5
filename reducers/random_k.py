"""Random-k and random-block: all workers draw the same elements to send, so no index travels."""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reducers.common import average_at
from reducers.schedule import DensitySchedule, DensitySettings, ScheduledReducer
from reducers.sparse import target_count
from sage.config import Named
from sage.interfaces import Communicator, Seeds, Slot


class SharedDrawSettings(DensitySettings):
    rank: int | None = Field(default=None, ge=1)
    """k_l = min(rank (rows + columns), n_l) instead, what a low-rank method of this rank sends; vectors go
    whole. Beside a rank the density is only a label."""

    @model_validator(mode="after")
    def _schedule_needs_a_density(self) -> Self:
        if self.rank is not None and self.density_schedule != DensitySchedule():
            raise ValueError(f"density_schedule moves the density only, got rank {self.rank}")
        return self


class RandomKSettings(SharedDrawSettings):
    name: Literal["random_k"] = "random_k"


class RandomBlockSettings(SharedDrawSettings):
    name: Literal["random_block"] = "random_block"


class SharedDraw(ScheduledReducer):
    """mean = sum_i a_i / W at S, 0 elsewhere; one all_reduce of the values at S, k_l = max(1, floor(d n_l)).

    S is drawn on the CPU, whatever the device: all workers draw the same, and no device is waited for.
    """

    state_names = ("generator",)

    def __init__(
        self, config: SharedDrawSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config)
        self.slots = [slot for slot in layout if slot.size]
        self.n = layout[-1].stop
        self.rank = config.rank
        self.generator = torch.Generator().manual_seed(seeds.common)
        self.starts = torch.tensor([slot.start for slot in self.slots])  # (tensors,)
        self.sizes = torch.tensor([slot.size for slot in self.slots])
        self.aim(config.density)

    def aim(self, density: float) -> None:
        super().aim(density)
        self.counts = torch.tensor([self._count(slot, density) for slot in self.slots])  # (tensors,)
        self.density = int(self.counts.sum()) / self.n

    def _count(self, slot: Slot, density: float) -> int:
        if self.rank is None:
            return target_count(density, slot.size)
        rows = slot.shape[0] if slot.shape else 1
        return min(self.rank * (rows + slot.size // rows), slot.size)

    @abstractmethod
    def draw(self) -> Tensor:
        """The indices S (k,) int64, on the CPU, unique, in the same order on all workers."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.draw().to(send.device, non_blocking=True)  # (k,)
        average_at(indices, send, mean, comm)
        self._sent = indices

    def expected_payload_bytes(self, world_size: int) -> int:
        count = sum(self._count(slot, self.config.density) for slot in self.slots)
        return 4 * count if world_size > 1 else 0

    def metrics(self) -> dict[str, float]:
        return {
            "target_density": self.target_density if self.rank is None else self.density,
            "union_density": self.density,
        }

    def _draw_below(self, highs: Tensor) -> Tensor:
        """One number in [0, high) for each of highs (count,), uniform up to a relative 2^-31."""
        return torch.randint(2**62, highs.shape, generator=self.generator) % highs


class RandomK(SharedDraw):
    """S_l: k_l elements of each tensor, uniform without replacement. NaN stays until it is drawn.

    Stich et al. 2018, arXiv 1809.07599 (rand_k); with a shared seed as in Vogels et al. 2019, 1905.13727,
    appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomKSettings

    def aim(self, density: float) -> None:
        super().aim(density)
        # Where more than half of a tensor travels, what stays is drawn: a draw then misses at most half the
        # time.
        self._mostly = self.counts > self.sizes // 2  # (tensors,)
        self._fewer = torch.where(self._mostly, self.sizes - self.counts, self.counts)
        self._pool = _ranges(self.starts[self._mostly], self.sizes[self._mostly])
        """Every element of those tensors."""

    def draw(self) -> Tensor:
        drawn = self._draw_distinct(self._fewer)
        if not len(self._pool):
            return drawn
        stays = torch.isin(self._pool, drawn)
        mostly = self._mostly[torch.bucketize(drawn, self.starts, right=True) - 1]
        return torch.cat([drawn[~mostly], self._pool[~stays]])

    def _draw_distinct(self, counts: Tensor) -> Tensor:
        """counts (tensors,) distinct elements of each tensor, ascending.

        What is missing is drawn and merged until none is: the first draws that are new are a sample without
        replacement, in which every subset is as likely as any other of its size.
        """
        drawn = torch.empty(0, dtype=torch.int64)
        missing = counts
        while int(missing.sum()):
            tensors = torch.arange(len(counts)).repeat_interleave(missing)
            new = self.starts[tensors] + self._draw_below(self.sizes[tensors])
            drawn = torch.cat([drawn, new]).unique()
            owners = torch.bucketize(drawn, self.starts, right=True) - 1
            missing = counts - torch.bincount(owners, minlength=len(counts))
        return drawn


class RandomBlock(SharedDraw):
    """S_l: k_l consecutive elements of each tensor from a drawn offset on, wrapping around at its end.

    Vogels et al. 2019, arXiv 1905.13727, appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomBlockSettings

    def aim(self, density: float) -> None:
        super().aim(density)
        self._tensors = torch.arange(len(self.counts)).repeat_interleave(self.counts)  # (k,)
        self._within = _ranges(torch.zeros_like(self.counts), self.counts)  # (k,): 0, 1, ..., k_l - 1

    def draw(self) -> Tensor:
        offsets = self._draw_below(self.sizes)  # (tensors,)
        places = (offsets[self._tensors] + self._within) % self.sizes[self._tensors]
        return self.starts[self._tensors] + places


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ..., start + size - 1 of every pair, one after the other."""
    firsts = sizes.cumsum(0) - sizes
    return (starts - firsts).repeat_interleave(sizes) + torch.arange(int(sizes.sum()))

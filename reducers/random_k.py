"""Random-k and random-block: which elements travel is drawn alike on all workers, so no index does."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.sparse import target_count
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot


class SharedDrawSettings(Named):
    density: float = Field(default=0.01, gt=0, le=1)
    """k_l = max(1, floor(density n_l)) elements of each tensor."""
    rank: int | None = Field(default=None, ge=1)
    """k_l = min(rank (rows + columns), n_l) instead, what a low-rank method of this rank sends; vectors go
    whole. Beside a number the density is a label only."""


class RandomKSettings(SharedDrawSettings):
    name: Literal["random_k"] = "random_k"


class RandomBlockSettings(SharedDrawSettings):
    name: Literal["random_block"] = "random_block"


class SharedDraw(Reducer):
    """mean = sum_i a_i / W at S, 0 elsewhere; one all_reduce of the values at S.

    S is drawn on the CPU, whatever the device: all workers draw the same, and no device is waited for.
    """

    state_names = ("generator",)

    def __init__(
        self, config: SharedDrawSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        slots = [slot for slot in layout if slot.size]
        self.n = layout[-1].stop
        self.target_density = config.density
        self.generator = torch.Generator().manual_seed(seeds.common)
        self.starts = torch.tensor([slot.start for slot in slots])  # (tensors,)
        self.sizes = torch.tensor([slot.size for slot in slots])
        self.counts = torch.tensor([_count(slot, config) for slot in slots])
        self.num_selected = int(self.counts.sum())
        self.density = self.num_selected / self.n

    @abstractmethod
    def draw(self) -> Tensor:
        """The indices S (k,) int64, on the CPU, unique, in the same order on all workers."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.draw().to(send.device, non_blocking=True)  # (k,)
        values = send[indices]
        comm.all_reduce(values)
        send[indices] = 0
        mean.zero_()
        mean[indices] = values / comm.world_size

    def expected_payload_bytes(self, world_size: int) -> int:
        return 4 * self.num_selected if world_size > 1 else 0

    def metrics(self) -> dict[str, float]:
        return {"target_density": self.target_density, "union_density": self.density}

    def _draw_below(self, highs: Tensor) -> Tensor:
        """One number in [0, high) for each of highs (count,), uniform up to a relative 2^-31."""
        return torch.randint(2**62, highs.shape, generator=self.generator) % highs


class RandomK(SharedDraw):
    """S_l: k_l elements of each tensor, uniform without replacement. NaN stays until it is drawn.

    Stich et al. 2018, arXiv 1809.07599 (rand_k); with a shared seed as in Vogels et al. 2019, 1905.13727,
    appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomKSettings

    def __init__(
        self, config: RandomKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, seeds=seeds, device=device)
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

    def __init__(
        self, config: RandomBlockSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, seeds=seeds, device=device)
        self._tensors = torch.arange(len(self.counts)).repeat_interleave(self.counts)  # (k,)
        self._within = _ranges(torch.zeros_like(self.counts), self.counts)  # (k,): 0, 1, ..., k_l - 1

    def draw(self) -> Tensor:
        offsets = self._draw_below(self.sizes)  # (tensors,)
        places = (offsets[self._tensors] + self._within) % self.sizes[self._tensors]
        return self.starts[self._tensors] + places


def _count(slot: Slot, config: SharedDrawSettings) -> int:
    if config.rank is None:
        return target_count(config.density, slot.size)
    rows = slot.shape[0] if slot.shape else 1
    return min(config.rank * (rows + slot.size // rows), slot.size)


def _ranges(starts: Tensor, sizes: Tensor) -> Tensor:
    """start, start + 1, ..., start + size - 1 of every pair, one after the other."""
    firsts = sizes.cumsum(0) - sizes
    return (starts - firsts).repeat_interleave(sizes) + torch.arange(int(sizes.sum()))

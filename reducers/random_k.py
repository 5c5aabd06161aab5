"""Random-k and random-block: all workers draw the same elements to send, so no index travels."""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from reducers.common import average_at
from reducers.kernels.distinct import DistinctDraw
from reducers.schedule import DensitySchedule, DensitySettings, ScheduledReducer
from reducers.sparse import target_count
from sage.config import Named
from sage.draws import Draws
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

    S is drawn where the gradient is, alike on every device and worker; no device is waited for.
    """

    state_names = ("generator",)

    def __init__(
        self, config: SharedDrawSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config)
        self.slots = [slot for slot in layout if slot.size]
        self.n = layout[-1].stop
        self.rank = config.rank
        self.generator, self.device = Draws(seeds.common), device
        self.starts = torch.tensor([slot.start for slot in self.slots], dtype=torch.int64)  # (tensors,)
        self.sizes = torch.tensor([slot.size for slot in self.slots], dtype=torch.int64)
        self.aim(config.density)

    def aim(self, density: float) -> None:
        super().aim(density)
        counts = [self._count(slot, density) for slot in self.slots]
        self.counts = torch.tensor(counts, dtype=torch.int64)  # (tensors,)
        self.density = int(self.counts.sum()) / self.n

    def _count(self, slot: Slot, density: float) -> int:
        if self.rank is None:
            return target_count(density, slot.size)
        rows = slot.shape[0] if slot.shape else 1
        return min(self.rank * (rows + slot.size // rows), slot.size)

    @abstractmethod
    def draw(self) -> Tensor:
        """The indices S (k,) int64, on the device, unique, in the same order on all workers."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.draw()  # (k,)
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


class RandomK(SharedDraw):
    """S_l: k_l elements of each tensor, uniform without replacement. NaN stays until it is drawn.

    Stich et al. 2018, arXiv 1809.07599 (rand_k); with a shared seed as in Vogels et al. 2019, 1905.13727,
    appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomKSettings

    def aim(self, density: float) -> None:
        super().aim(density)
        self._distinct = DistinctDraw(self.starts, self.sizes, self.counts)

    def draw(self) -> Tensor:
        return self._distinct.draw(self.generator.key(), self.device)


class RandomBlock(SharedDraw):
    """S_l: k_l consecutive elements of each tensor from a drawn offset on, wrapping around at its end.

    Vogels et al. 2019, arXiv 1905.13727, appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomBlockSettings

    def aim(self, density: float) -> None:
        super().aim(density)
        tensors = torch.arange(len(self.counts)).repeat_interleave(self.counts)  # (k,)
        within = (
            torch.arange(len(tensors)) - (self.counts.cumsum(0) - self.counts)[tensors]
        )  # 0, 1, ..., k_l - 1
        self._tensors, self._within = tensors.to(self.device), within.to(self.device)
        self._starts, self._sizes = self.starts[tensors].to(self.device), self.sizes[tensors].to(self.device)
        self._sizes_of_all = self.sizes.to(self.device)  # (tensors,)

    def draw(self) -> Tensor:
        offsets = self.generator.below(self._sizes_of_all)[self._tensors]  # (k,)
        return self._starts + (offsets + self._within) % self._sizes

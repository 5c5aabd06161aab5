"""Random-k and random-block: all workers draw the same elements to send, so no index travels."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.common import average_at
from reducers.density import DensityReducer, DensitySettings
from reducers.kernels.block import BlockDraw
from reducers.kernels.distinct import DistinctDraw
from reducers.kernels.parts import PartsDraw
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Communicator, Seeds, Slot


class SharedDrawSettings(DensitySettings):
    rank: int | None = Field(default=None, ge=1)
    """k_l = min(rank (rows + columns), n_l) instead, what a low-rank method of this rank sends; vectors go
    whole. Beside a rank the density is only a label."""


class RandomKSettings(SharedDrawSettings):
    name: Literal["random_k"] = "random_k"


class RandomBlockSettings(SharedDrawSettings):
    name: Literal["random_block"] = "random_block"


class SharedDraw(DensityReducer):
    """mean = sum_i a_i / W at S, 0 elsewhere; one all_reduce of the values at S, k_l = max(1, floor(d n_l)).

    S is drawn where the gradient is, alike on every device and worker; no device is waited for.
    """

    state_names = ("generator",)
    Draw: ClassVar[type[PartsDraw]]
    """How S is drawn: elements (k,) int64 on the device, unique, in the same order on all workers."""

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
        self._draw = self.Draw(self.starts, self.sizes, self._counts(config.density))
        self.density = self._draw.total / self.n

    @classmethod
    def why_fixed(cls, config: Any) -> str:
        return "" if config.rank is None else f"rank {config.rank} decides what is sent"

    def aim(self, density: float) -> None:
        super().aim(density)
        self._draw.aim(self._counts(density))
        self.density = self._draw.total / self.n

    def _counts(self, density: float) -> Tensor:
        """k_l (tensors,) int64, by target_count's rule."""
        if self.rank is None:
            return (self.sizes.double() * density).long().clamp_(min=1).minimum(self.sizes)
        rows = torch.tensor([slot.shape[0] if slot.shape else 1 for slot in self.slots])
        return (self.rank * (rows + self.sizes // rows)).minimum(self.sizes)

    def draw(self) -> Tensor:
        """The next indices S (k,) int64."""
        return self._draw.draw(self.generator.key(), self.device)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.draw()  # (k,)
        average_at(indices, send, mean, comm)
        self._sent = indices

    def expected_payload_bytes(self, world_size: int) -> int:
        count = int(self._counts(self.config.density).sum())
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
    Draw = DistinctDraw


class RandomBlock(SharedDraw):
    """S_l: k_l consecutive elements of each tensor from a drawn offset on, wrapping around at its end.

    Vogels et al. 2019, arXiv 1905.13727, appendix G.
    """

    Settings: ClassVar[type[Named]] = RandomBlockSettings
    Draw = BlockDraw

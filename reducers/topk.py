"""Top-k per tensor: of each layer the k elements of largest magnitude."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch

from reducers.common import Leveled
from reducers.largest import LargestSparsifier
from reducers.search import Part
from reducers.sparse import SparsifierSettings, target_count
from sage.config import Named
from sage.interfaces import Seeds, Slot


class TopKSettings(SparsifierSettings):
    name: Literal["topk"] = "topk"


class TopK(LargestSparsifier, Leveled):
    """k_l = max(1, floor(density n_l)); S_l = argtop_{k_l} |a_l|. NaN counts as the largest and is sent.

    Aji and Heafield 2017, arXiv 1704.05021; Stich et al. 2018, arXiv 1809.07599. At least one element of
    each tensor is sent, so with many small tensors the density is above the target.
    """

    Settings: ClassVar[type[Named]] = TopKSettings

    def __init__(
        self, config: TopKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self._levels: Sequence[float] = ()
        self._places = [(slot.start, slot.stop, slot.size) for slot in layout]
        super().__init__(config, layout, device)

    def set_levels(self, levels: Sequence[float]) -> None:
        """Use these densities, one per slot, from now on, in place of the configuration's."""
        self._levels = levels
        self.aim_anew(self.target_counts() / self.n)

    def parts(self, density: float) -> list[Part]:
        densities = self._levels or [density] * len(self._places)
        return [
            Part(start, stop, target_count(own, size))
            for (start, stop, size), own in zip(self._places, densities, strict=True)
        ]

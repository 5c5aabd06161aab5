"""Top-k per tensor: of each layer the k elements of largest magnitude."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import torch

from reducers.common import Leveled
from reducers.largest import LargestSparsifier
from reducers.search import Counts
from reducers.sparse import SparsifierSettings, counts_of_parts
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
        self._levels: np.ndarray | None = None
        super().__init__(config, layout, device)

    def set_levels(self, levels: Sequence[float]) -> None:
        """Use these densities, one per slot, from now on, in place of the configuration's."""
        self._levels = np.array(levels, np.float64)
        self.aim_anew(self.target_counts() / self.n)

    def places_in(self, layout: list[Slot]) -> list[tuple[int, int]]:
        return [(slot.start, slot.stop) for slot in layout]

    def counts(self, density: float) -> Counts:
        return super().counts(density) if self._levels is None else counts_of_parts(self._levels, self._sizes)

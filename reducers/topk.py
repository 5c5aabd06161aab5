"""Top-k per tensor: of each layer the k elements of largest magnitude."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.common import Leveled
from reducers.sparse import Sparsifier, SparsifierSettings, target_count
from sage.config import Named
from sage.interfaces import Place, Seeds, Slot


class TopKSettings(SparsifierSettings):
    name: Literal["topk"] = "topk"


class TopK(Sparsifier, Leveled):
    """k_l = max(1, floor(density n_l)); S_l = argtop_{k_l} |a_l|. NaN counts as the largest and is sent.

    Aji and Heafield 2017, arXiv 1704.05021; Stich et al. 2018, arXiv 1809.07599. At least one element a
    tensor is sent, so with many small tensors the density is above the target.
    """

    Settings: ClassVar[type[Named]] = TopKSettings

    def __init__(
        self, config: TopKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)
        self._layout = layout
        self.set_levels([config.density] * len(layout))

    def set_levels(self, levels: Sequence[float]) -> None:
        """A density for each slot from now on."""
        self._slots = [
            (slot.start, slot.stop, target_count(density, slot.size))
            for slot, density in zip(self._layout, levels, strict=True)
        ]

    def select(self, send: Tensor, place: Place) -> Tensor:
        return torch.cat(
            [
                send[start:stop].abs().topk(k, sorted=False).indices + start  # (k_l,)
                for start, stop, k in self._slots
            ]
        )

    def target_counts(self) -> int:
        return sum(k for _, _, k in self._slots)

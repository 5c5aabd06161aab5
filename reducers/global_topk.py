"""Global top-k: the k elements of largest magnitude of the whole gradient."""

from typing import ClassVar, Literal

import torch

from reducers.largest import LargestSparsifier
from reducers.sparse import SparsifierSettings
from sage.config import Named
from sage.interfaces import Seeds, Slot


class GlobalTopKSettings(SparsifierSettings):
    name: Literal["global_topk"] = "global_topk"


class GlobalTopK(LargestSparsifier):
    """S = argtop_k |a|, k = max(1, floor(density n)). NaN counts as the largest and is sent.

    Shi et al. 2019, arXiv 1901.04359, section 2 (local selection; each worker sends its own k).
    """

    Settings: ClassVar[type[Named]] = GlobalTopKSettings

    def __init__(
        self, config: GlobalTopKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, device)

    def places_in(self, layout: list[Slot]) -> list[tuple[int, int]]:
        return [(0, self.n)]

"""Global top-k: the k elements of largest magnitude of the whole gradient."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.sparse import Sparsifier, SparsifierSettings
from sage.config import Named
from sage.interfaces import Place, Seeds, Slot


class GlobalTopKSettings(SparsifierSettings):
    name: Literal["global_topk"] = "global_topk"


class GlobalTopK(Sparsifier):
    """S = argtop_k |a|, k = max(1, floor(density n)). NaN counts as the largest and is sent.

    Shi et al. 2019, arXiv 1901.04359, section 2 (local selection; each worker sends its own k).
    """

    Settings: ClassVar[type[Named]] = GlobalTopKSettings

    def __init__(
        self, config: GlobalTopKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)

    def select(self, send: Tensor, place: Place) -> Tensor:
        return send.abs().topk(self.target_counts(), sorted=False).indices

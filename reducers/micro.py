"""MiCRO: each worker selects in its own slice of the gradient, by one threshold for all."""

from typing import ClassVar, Literal

import torch

from reducers.disjoint import GlobalThresholdSettings, GlobalThresholdSparsifier
from sage.config import Named
from sage.interfaces import Place, Seeds, Slot


class MicroSettings(GlobalThresholdSettings):
    name: Literal["micro"] = "micro"


class Micro(GlobalThresholdSparsifier):
    """In step t worker i looks at slice (t + i) mod W of W slices, of which the first n mod W are longer by
    one element. All send their values wherever one selected.

    Yoon and Oh 2023, arXiv 2310.00967, algorithms 1 to 3. With one worker the published code never counts
    what is selected, so that its threshold only falls.
    """

    Settings: ClassVar[type[Named]] = MicroSettings

    def __init__(
        self, config: MicroSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)

    def own_part(self, place: Place) -> tuple[int, int]:
        number = (self.num_steps + place.rank) % place.world_size
        length, longer = divmod(self.n, place.world_size)
        start = number * length + min(number, longer)
        return start, start + length + (number < longer)

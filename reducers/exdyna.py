"""ExDyna: as MiCRO, with parts that grow and shrink until all workers select equally many."""

from collections.abc import Mapping
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.disjoint import GlobalThresholdSettings, GlobalThresholdSparsifier
from sage.config import Named
from sage.interfaces import Place, Seeds, Slot

ALIGNMENT = 32
"""A block is a multiple of so many elements. Value of the published code."""
MORE, LESS = 1.05, 0.95238
"""A part that selected more than MORE times the mean hands a block to a neighbour with less than LESS times
the mean. Values of the published code."""
SHARE_KEPT = 4
"""No part shrinks below a quarter of the blocks that it has at first."""


class ExDynaSettings(GlobalThresholdSettings):
    name: Literal["exdyna"] = "exdyna"
    blocks: int = Field(default=1024, ge=1)
    """Into how many blocks the gradient is cut; fewer where they would have fewer than 32 elements."""


def balanced(blocks: list[int], counts: list[int], of_a_block: int, least: float) -> list[int]:
    """The parts' numbers of blocks, after what they selected (W,) with these. of_a_block: how many elements
    are expected to move with a block; least: what a part keeps."""
    blocks, counts, mean = list(blocks), list(counts), sum(counts) // len(counts)
    for part in range(len(blocks) - 1 if mean else 0):
        moved = direction(counts[part] / mean, counts[part + 1] / mean)
        giver = part if moved == 1 else part + 1
        if moved and blocks[giver] - 1 >= least:
            blocks[part] -= moved
            blocks[part + 1] += moved
            counts[part] -= moved * of_a_block
            counts[part + 1] += moved * of_a_block
    return blocks


def direction(left: float, right: float) -> int:
    """1: a block moves to the right, from a part with this share of the mean; -1: to the left; 0: none."""
    if left > MORE and right < LESS:
        return 1
    return -1 if left < LESS and right > MORE else 0


class ExDyna(GlobalThresholdSparsifier):
    """W parts of consecutive blocks; in step t worker i looks at part (t + i) mod W. Before each step, from
    the last step's counts c_p, for p = 0, ..., W - 2: where c_p is above 1.05 and c_{p+1} below 0.952 times
    their mean, a block moves from part p to p + 1, and the other way round.

    Yoon and Oh 2024, arXiv 2402.13781, algorithms 2 to 5. The published code fails where a gradient has
    fewer than 32 elements for each block, and with one worker.
    """

    Settings: ClassVar[type[Named]] = ExDynaSettings
    state_names = (*GlobalThresholdSparsifier.state_names, "num_blocks")

    def __init__(
        self, config: ExDynaSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)
        alignment = ALIGNMENT if self.n >= ALIGNMENT else 1
        self._in_all = min(config.blocks, self.n // alignment)
        self._block = self.n // self._in_all // alignment * alignment  # elements
        self.num_blocks: list[int] = []
        """Of each part."""

    def own_part(self, place: Place) -> tuple[int, int]:
        world_size = place.world_size
        if len(self.num_blocks) != world_size:
            length, longer = divmod(self._in_all, world_size)
            self.num_blocks = [length + (part < longer) for part in range(world_size)]
        elif self.num_steps > 0:
            self._move_blocks(world_size)
        number = (self.num_steps + place.rank) % world_size
        edges = [self._block * blocks for blocks in accumulate(self.num_blocks, initial=0)]
        edges[-1] = self.n  # the rest goes to the last part
        return edges[number], edges[number + 1]

    def _move_blocks(self, world_size: int) -> None:
        # c_p: of part p, which worker (p - t) mod W had in step t.
        last = self.num_steps - 1
        counts = [self.counts[(part - last) % world_size] for part in range(world_size)]
        of_a_block = int(self._block * sum(counts) / self.n)
        least = self._in_all / (SHARE_KEPT * world_size)
        self.num_blocks = balanced(self.num_blocks, counts, of_a_block, least)

    def metrics(self) -> Mapping[str, float | Tensor]:
        """imbalance: by how much the largest of the workers' counts exceeds their mean."""
        most, total = max(self.counts, default=0), sum(self.counts)
        imbalance = most * len(self.counts) / total - 1 if total else 0.0
        return {**super().metrics(), "imbalance": imbalance}

"""Consecutive elements of each part of a vector, from a drawn one on, without waiting for the device."""

import torch
from torch import Tensor

from reducers.kernels.parts import Draw, PartsDraw
from sage.draws import bits_at, modulo


class BlockDraw(PartsDraw):
    """Consecutive elements of each part; the first is drawn, uniform, and at the part's end a block wraps
    around to its start."""

    cpu_module = "reducers.kernels.block_cpu"

    def plain(self, device: torch.device) -> Draw:
        return PlainBlockDraw(self, device)


class PlainBlockDraw:
    """The form for any device, in torch operations."""

    def __init__(self, parts: BlockDraw, device: torch.device) -> None:
        facts = torch.stack([parts.counts, parts.starts, parts.sizes])
        counts, starts, self._sizes_of_all = facts.to(device, non_blocking=True)  # (parts,) each
        self._indices = torch.arange(len(counts), device=device)
        owners = self._owners = self._indices.repeat_interleave(counts, output_size=parts.total)  # (total,)
        self._starts, self._sizes = starts[owners], self._sizes_of_all[owners]
        firsts = counts.cumsum(0) - counts
        self._within = torch.arange(parts.total, device=device) - firsts[owners]  # 0, 1, ..., count - 1

    def __call__(self, key: int) -> Tensor:
        """The elements (total,) int64."""
        offsets = modulo(bits_at(key, self._indices), self._sizes_of_all)[self._owners]  # (total,)
        drawn: Tensor = self._starts + (offsets + self._within) % self._sizes
        return drawn

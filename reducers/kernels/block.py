"""Consecutive elements of each part of a vector, from a drawn one on, without waiting for the device."""

from importlib import import_module

import torch
from torch import Tensor

from sage.draws import bits_at, modulo


class BlockDraw:
    """count consecutive elements of each part [start, start + size) of a vector.

    The first is drawn, uniform; at the part's end a block wraps around to its start.
    """

    def __init__(self, starts: Tensor, sizes: Tensor, counts: Tensor) -> None:
        """starts, sizes, counts (parts,) int64, on the CPU; 0 <= count <= size, 0 < size."""
        self.starts, self.sizes = starts, sizes
        self.aim(counts)

    def aim(self, counts: Tensor) -> None:
        """Draw so many (parts,) of each part from now on."""
        self.counts = counts
        self.total = int(counts.sum())
        self._plain: dict[torch.device, PlainBlockDraw] = {}

    def draw(self, key: int, device: torch.device) -> Tensor:
        """The elements (total,) int64, part by part. key: of a draw (sage.draws)."""
        if device.type == "cpu":
            drawn: Tensor = import_module("reducers.kernels.block_cpu").draw(self, key)
            return drawn
        if device not in self._plain:
            self._plain[device] = PlainBlockDraw(self, device)
        return self._plain[device](key)


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

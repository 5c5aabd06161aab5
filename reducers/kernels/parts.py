"""What draws of elements of a vector's parts share: how many, and the form for a device."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

Draw = Callable[[int], Tensor]
"""The elements (total,) int64 that follow from a key."""


class PartsDraw(ABC):
    """count elements of each part [start, start + size) of a vector."""

    cpu_module: ClassVar[str]
    """Whose draw(self, key) is the form for the CPU. It imports numba, so it is imported when asked for."""

    def __init__(self, starts: Tensor, sizes: Tensor, counts: Tensor) -> None:
        """starts, sizes, counts (parts,) int64, on the CPU; 0 <= count <= size, 0 < size."""
        self.starts, self.sizes = starts, sizes
        self.aim(counts)

    def aim(self, counts: Tensor) -> None:
        """Draw so many (parts,) of each part from now on."""
        self.counts = counts
        self.total = int(counts.sum())
        self._plain: dict[torch.device, Draw] = {}

    def draw(self, key: int, device: torch.device) -> Tensor:
        """The elements (total,) int64, part by part. key: of a draw (sage.draws)."""
        if device.type == "cpu":
            drawn: Tensor = import_module(self.cpu_module).draw(self, key)
            return drawn
        if device not in self._plain:
            self._plain[device] = self.plain(device)
        return self._plain[device](key)

    @abstractmethod
    def plain(self, device: torch.device) -> Draw:
        """The form for any device."""

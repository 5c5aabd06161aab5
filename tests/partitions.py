"""Whose elements are whose under MiCRO, ExDyna and DEFT, worked out in numpy."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from sage.interfaces import Slot


def slices(n: int, world_size: int) -> list[np.ndarray]:
    """MiCRO's slices, as indices."""
    return np.array_split(np.arange(n), world_size)


class Blocks:
    """ExDyna's parts, from the counts of the steps before."""

    def __init__(self, n: int, num_blocks: int, world_size: int) -> None:
        self.n, self.size = n, n // num_blocks // 32 * 32
        self.owned = [len(own) for own in np.array_split(np.arange(num_blocks), world_size)]
        self.least = num_blocks / 4 / world_size

    def parts(self) -> list[np.ndarray]:
        edges = np.cumsum([0, *self.owned]) * self.size
        edges[-1] = self.n
        return [np.arange(start, stop) for start, stop in pairwise(edges)]

    def move(self, counts: Sequence[int]) -> None:
        """counts: of each part, in the step before."""
        counts, total, num_parts = list(counts), sum(counts), len(counts)
        mean, block = total // num_parts, int(self.size * total / self.n)
        for left in range(num_parts - 1 if mean else 0):
            right = left + 1
            for giver, taker in ((left, right), (right, left)):
                is_uneven = counts[giver] > 1.05 * mean and counts[taker] < 0.95238 * mean
                if is_uneven and self.owned[giver] - 1 >= self.least:
                    self.owned[giver] -= 1
                    self.owned[taker] += 1
                    counts[giver] -= block
                    counts[taker] += block
                    break


def layers(layout: list[Slot], world_size: int) -> list[np.ndarray]:
    """DEFT's layers, as indices."""
    n, found = layout[-1].stop, []
    for slot in layout:
        pieces = world_size if slot.size > n / world_size else 1
        found += np.array_split(np.arange(slot.start, slot.stop), pieces)
    return [layer for layer in found if len(layer)]


def layer_counts(send: np.ndarray, of: list[np.ndarray], k: int) -> list[int]:
    """How many DEFT selects of each layer of send (n,)."""
    norms = [float(np.sqrt((send[layer].astype(np.float64) ** 2).sum())) for layer in of]
    counts, rest, norm = [0] * len(of), k, sum(norms)
    for layer in np.argsort(norms)[::-1]:
        counts[layer] = min(len(of[layer]), max(1, int(rest * (norms[layer] / norm)))) if norm > 0 else 1
        rest -= counts[layer]
        norm -= norms[layer]
    return counts


def layer_bins(of: list[np.ndarray], counts: list[int], world_size: int) -> list[int]:
    """Which of DEFT's bins each layer is in; -1: it is common."""
    costs = [
        len(layer) * (np.log2(count) if count > 1 else 1) for layer, count in zip(of, counts, strict=True)
    ]
    bins, loads = [-1] * len(of), [0.0] * world_size
    for layer in np.argsort(-np.array(costs), kind="stable"):
        if counts[layer] < len(of[layer]):
            bins[layer] = int(np.argmin(loads))
            loads[bins[layer]] += costs[layer]
    return bins

"""DistinctDraw for the CPU: draws until there are enough, and marks what has been drawn."""

import numpy as np
import torch
from torch import Tensor

from reducers.kernels.compiled import compiled
from reducers.kernels.distinct import DistinctDraw
from sage.draws import FIRST_FACTOR, SECOND_FACTOR, STEP

STEP_64, FIRST_64, SECOND_64 = np.uint64(STEP), np.uint64(FIRST_FACTOR), np.uint64(SECOND_FACTOR)
S1, S27, S30, S31 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31)


def draw(parts: DistinctDraw, key: int) -> Tensor:
    """The elements (total,) int64."""
    found = np.empty(parts.total, np.int64)
    given = (parts.starts.numpy(), parts.sizes.numpy(), parts.counts.numpy())
    _draw(np.uint64(key), *given, parts.marks, found)
    return torch.from_numpy(found)


@compiled
def bits_at(key: np.uint64, index: int) -> np.uint64:
    x = key + np.uint64(index) * STEP_64
    x = (x ^ (x >> S30)) * FIRST_64
    x = (x ^ (x >> S27)) * SECOND_64
    return x ^ (x >> S31)


@compiled
def _draw_different(key: np.uint64, size: int, marks: np.ndarray, drawn: np.ndarray) -> None:
    """Fill drawn with the first different numbers below size of a sequence, and mark them."""
    number = count = 0
    while count < len(drawn):
        place = np.int64((bits_at(key, number) >> S1) % np.uint64(size))
        number += 1
        if not marks[place]:
            marks[place] = True
            drawn[count] = place
            count += 1


@compiled
def _draw(
    key: np.uint64,
    starts: np.ndarray,
    sizes: np.ndarray,
    counts: np.ndarray,
    marks: np.ndarray,
    found: np.ndarray,
) -> None:
    end = 0
    for part in range(len(sizes)):
        start, size, count = starts[part], sizes[part], counts[part]
        is_few = count <= size - count
        drawn = found[end : end + count] if is_few else np.empty(size - count, np.int64)
        _draw_different(bits_at(key, part), size, marks, drawn)
        if not is_few:
            found[end : end + count] = np.flatnonzero(~marks[:size])
        marks[drawn] = False
        found[end : end + count] += start
        end += count

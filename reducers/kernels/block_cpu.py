"""BlockDraw for the CPU: nothing is kept from one draw to the next."""

import numpy as np
import torch
from torch import Tensor

from reducers.kernels.block import BlockDraw
from reducers.kernels.compiled import compiled
from reducers.kernels.distinct_cpu import S1, bits_at


def draw(parts: BlockDraw, key: int) -> Tensor:
    """The elements (total,) int64."""
    found = np.empty(parts.total, np.int64)
    _draw(np.uint64(key), parts.starts.numpy(), parts.sizes.numpy(), parts.counts.numpy(), found)
    return torch.from_numpy(found)


@compiled
def _draw(
    key: np.uint64, starts: np.ndarray, sizes: np.ndarray, counts: np.ndarray, found: np.ndarray
) -> None:
    end = 0
    for part in range(len(sizes)):
        first = np.int64((bits_at(key, part) >> S1) % np.uint64(sizes[part]))  # modulo of sage.draws
        place, stop = starts[part] + first, starts[part] + sizes[part]
        for _ in range(counts[part]):
            found[end] = place
            end += 1
            place += 1
            if place == stop:
                place = starts[part]

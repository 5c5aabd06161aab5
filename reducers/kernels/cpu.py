"""The forms for the CPU, compiled by numba on the tensors' own memory. They compute as torch does: additions
and divisions are rounded one by one, infinities and NaN are values like others.
"""

import numpy as np
import torch
from torch import Tensor

from reducers.kernels import Division, Found
from reducers.kernels.compiled import compiled

CHUNK = 4096
"""Elements per step of the scan: send, gradient and mask of a chunk stay in a core's first cache."""
WORD = 8
"""Elements of the mask that are looked at together."""


def scan(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    selects_nan: bool,
    zeroes_grad: bool,
) -> Found:
    added = (send[:0] if grad is None else grad).numpy()
    edges = division.edges.numpy()
    found = _scan(send.numpy(), added, bounds.numpy(), edges, selects_nan, zeroes_grad)
    return Found(*map(torch.from_numpy, found))


def keep_largest(found: Found, thresholds: Tensor, ks: Tensor) -> Tensor:
    return torch.from_numpy(_keep_largest(*(x.numpy() for x in (*found, thresholds, ks))))


def take(send: Tensor, indices: Tensor, values: Tensor) -> None:
    _take(send.numpy(), indices.numpy(), values.numpy())


def add_share(mean: Tensor, indices: Tensor, values: Tensor, world_size: int) -> None:
    _add_share(mean.numpy(), indices.numpy(), values.numpy(), mean.numpy().dtype.type(world_size))


# --- compiled -------------------------------------------------------------------------------------


@compiled
def _add(send: np.ndarray, grad: np.ndarray, zeroes_grad: bool) -> None:
    for i in range(len(send)):
        send[i] += grad[i]
    if zeroes_grad:
        grad[:] = 0


@compiled
def _mark(send: np.ndarray, bound: float, selects_nan: bool, mask: np.ndarray) -> None:
    """mask: what reaches the bound; False from there to the end of the last word."""
    if selects_nan:
        for i in range(len(send)):
            mask[i] = not abs(send[i]) < bound
    else:
        for i in range(len(send)):
            mask[i] = abs(send[i]) >= bound
    mask[len(send) : len(send) + WORD] = False


@compiled
def _list(
    send: np.ndarray, start: int, mask: np.ndarray, indices: np.ndarray, magnitudes: np.ndarray, total: int
) -> int:
    """Append the index, start + i, and magnitude of every marked element i; returns how many there are
    then."""
    words = mask.view(np.uint64)
    for word in range((len(send) + WORD - 1) // WORD):
        if words[word] != 0:  # most are 0
            for i in range(WORD * word, min(WORD * word + WORD, len(send))):
                indices[total] = start + i
                magnitudes[total] = abs(send[i])
                total += mask[i]  # else the next one takes this one's place
    return total


@compiled
def _with_room(found: np.ndarray, total: int) -> np.ndarray:
    """found, or a larger copy, with room for one more chunk, and one element, behind the first total."""
    if total + CHUNK < len(found):
        return found
    larger = np.empty(2 * len(found), found.dtype)
    larger[:total] = found[:total]
    return larger


@compiled
def _scan(
    send: np.ndarray,
    grad: np.ndarray,
    bounds: np.ndarray,
    edges: np.ndarray,
    selects_nan: bool,
    zeroes_grad: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """grad (n,), or (0,): nothing is added."""
    indices = np.empty(2 * CHUNK + len(send) // 64, np.int64)
    magnitudes = np.empty(len(indices), send.dtype)
    counts = np.zeros(len(bounds), np.int64)
    mask = np.zeros(CHUNK + WORD, np.bool_)
    total = 0
    for part in range(len(bounds)):
        before = total
        for start in range(edges[part], edges[part + 1], CHUNK):
            chunk = slice(start, min(start + CHUNK, edges[part + 1]))
            if len(grad) != 0:
                _add(send[chunk], grad[chunk], zeroes_grad)
            _mark(send[chunk], bounds[part], selects_nan, mask)
            indices, magnitudes = _with_room(indices, total), _with_room(magnitudes, total)
            total = _list(send[chunk], start, mask, indices, magnitudes, total)
        counts[part] = total - before
    return indices[:total], magnitudes[:total], counts


@compiled
def _is_above(magnitude: float, threshold: float) -> bool:
    return magnitude > threshold or (np.isnan(magnitude) and not np.isnan(threshold))


@compiled
def _is_equal(magnitude: float, threshold: float) -> bool:
    return magnitude == threshold or (np.isnan(magnitude) and np.isnan(threshold))


@compiled
def _keep_largest(
    indices: np.ndarray, magnitudes: np.ndarray, counts: np.ndarray, thresholds: np.ndarray, ks: np.ndarray
) -> np.ndarray:
    kept = np.empty(ks.sum(), np.int64)
    total = stop = 0
    for part in range(len(ks)):
        start, stop, threshold = stop, stop + counts[part], thresholds[part]
        num_equal = ks[part]  # how many equal ones are kept
        for j in range(start, stop):
            num_equal -= _is_above(magnitudes[j], threshold)
        for j in range(start, stop):
            is_equal = num_equal > 0 and _is_equal(magnitudes[j], threshold)
            if is_equal or _is_above(magnitudes[j], threshold):
                kept[total] = indices[j]
                total += 1
                num_equal -= is_equal
    return kept


@compiled
def _take(send: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    for j in range(len(indices)):
        index = indices[j]
        if index < 0 or index >= len(send):
            raise IndexError("expected indices of the gradient's elements")
        values[j] = send[index]
        send[index] = 0


@compiled
def _add_share(mean: np.ndarray, indices: np.ndarray, values: np.ndarray, world_size: float) -> None:
    for j in range(len(indices)):
        index = indices[j]
        if index < 0 or index >= len(mean):
            raise IndexError("expected indices of the gradient's elements")
        mean[index] += values[j] / world_size

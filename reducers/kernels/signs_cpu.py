"""The forms of signs for the CPU, in chunks that stay in a core's cache."""

import numpy as np
import torch
from torch import Tensor

from reducers.kernels.compiled import compiled
from reducers.kernels.signs import GROUP

CHUNK = 131_072
"""Elements that pack takes at a time, a multiple of 8."""
BYTES = 256
"""Bytes of each worker's signs that average takes at a time."""


def pack(x: Tensor, out: Tensor) -> None:
    flat, packed = x.numpy(), out.numpy()
    for start in range(0, len(flat), CHUNK):
        bits = np.packbits(flat[start : start + CHUNK] >= 0, bitorder="little")
        packed[start // 8 : start // 8 + len(bits)] = bits


def unpack(packed: Tensor, out: Tensor) -> None:
    _unpack(packed.numpy(), out.numpy())


def norms(x: Tensor, edges: Tensor) -> Tensor:
    return torch.from_numpy(_norms(x.numpy(), edges.numpy()))


def average(packed: Tensor, scales: Tensor, edges: Tensor, rank: int, send: Tensor, mean: Tensor) -> None:
    _average(packed.numpy(), scales.numpy(), edges.numpy(), rank, send.numpy(), mean.numpy())


@compiled
def _unpack(packed: np.ndarray, out: np.ndarray) -> None:
    one = out.dtype.type(1)
    for byte in range(len(out) // 8):
        for bit in range(8):
            out[8 * byte + bit] = one * (packed[byte] >> bit & 1) * 2 - one
    for index in range(len(out) // 8 * 8, len(out)):
        out[index] = one * (packed[index // 8] >> (index % 8) & 1) * 2 - one


@compiled
def _norms(x: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Eight sums in float64, so that the processor adds several numbers at once."""
    found = np.empty(len(edges) - 1, np.float32)
    for part in range(len(found)):
        values = x[edges[part] : edges[part + 1]]
        sums = np.zeros(8)
        for start in range(0, len(values) - 7, 8):
            for lane in range(8):
                sums[lane] += abs(values[start + lane])
        for index in range(len(values) // 8 * 8, len(values)):
            sums[index % 8] += abs(values[index])
        found[part] = sums.sum()
    return found


@compiled
def _average(
    packed: np.ndarray,
    scales: np.ndarray,
    edges: np.ndarray,
    rank: int,
    send: np.ndarray,
    mean: np.ndarray,
) -> None:
    """For each element the signs of a group of workers are a byte; a table has what that byte adds up to."""
    num_groups, part = -(-len(packed) // GROUP), 0
    columns = np.empty((num_groups, BYTES), np.uint64)  # a byte an element
    tables = np.empty((num_groups, 256), mean.dtype)
    tables_of = -1
    for start in range(0, len(mean), 8 * BYTES):
        _transpose(packed[:, start // 8 : start // 8 + BYTES], columns)
        position, stop = start, min(start + 8 * BYTES, len(mean))
        while position < stop:
            while edges[part + 1] <= position:
                part += 1
            if tables_of != part:
                _tabulate(scales[:, part], tables)
                tables_of = part
            end = min(stop, edges[part + 1])
            _add_up(columns, position - start, tables, len(packed), mean[position:end])
            _subtract(
                columns[rank // GROUP], position - start, rank % GROUP, scales[rank, part], send[position:end]
            )
            position = end


@compiled
def _transpose(packed: np.ndarray, columns: np.ndarray) -> None:
    """Bit i of byte j of a group's w-th row becomes bit w of byte i of its column j. packed (W, c)."""
    columns[:] = 0
    for worker in range(len(packed)):
        row, shift = packed[worker], np.uint64(8 * (worker % GROUP))
        column = columns[worker // GROUP]
        for index in range(len(row)):
            column[index] |= np.uint64(row[index]) << shift
    # Of 8 x 8 bits: Warren 2012, Hacker's Delight, section 7-3.
    for column in columns:
        for index in range(packed.shape[1]):
            x = column[index]
            swapped = (x ^ (x >> np.uint64(7))) & np.uint64(0x00AA00AA00AA00AA)
            x ^= swapped ^ (swapped << np.uint64(7))
            swapped = (x ^ (x >> np.uint64(14))) & np.uint64(0x0000CCCC0000CCCC)
            x ^= swapped ^ (swapped << np.uint64(14))
            swapped = (x ^ (x >> np.uint64(28))) & np.uint64(0x00000000F0F0F0F0)
            column[index] = x ^ swapped ^ (swapped << np.uint64(28))


@compiled
def _tabulate(scales: np.ndarray, tables: np.ndarray) -> None:
    """tables (groups, 256): the sum of a group's scales (W,) in rank order, each with its bit's sign."""
    tables[:] = 0
    for worker in range(len(scales)):
        table, scale = tables[worker // GROUP], scales[worker]
        for byte in range(256):
            table[byte] += scale if byte >> (worker % GROUP) & 1 else -scale


@compiled
def _add_up(columns: np.ndarray, first: int, tables: np.ndarray, world_size: int, mean: np.ndarray) -> None:
    mean[:] = 0
    for group in range(len(columns)):
        table, signs = tables[group], columns[group].view(np.uint8)[first : first + len(mean)]
        for index in range(len(mean)):
            mean[index] += table[signs[index]]
    divisor = mean.dtype.type(world_size)
    for index in range(len(mean)):
        mean[index] /= divisor


@compiled
def _subtract(column: np.ndarray, first: int, bit: int, scale: np.float32, send: np.ndarray) -> None:
    signs = column.view(np.uint8)[first : first + len(send)]
    for index in range(len(send)):
        send[index] -= scale if signs[index] >> bit & 1 else -scale

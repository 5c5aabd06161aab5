"""The forms for a GPU, in Triton. They round as torch does on a CPU, and write every element once: the same
bits in every run, whether torch is asked for deterministic algorithms or not.

A scan is three steps: mark reads everything once and leaves one bit an element and the number of marked
elements of each block; torch adds these numbers up; place reads the bits and writes the indices.

Triton starts a kernel on the current device, which need not be that of the tensors. It compiles a kernel anew
for numbers and addresses that are multiples of 16, and for the number 1, unless it is told not to: the length
of a message, and where one begins among others, change from step to step.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reducers.kernels import Division, Found
from reducers.kernels.plain import keep_largest as keep_largest

BLOCK = 4096
"""Elements of a program of mark and place."""
WORD = 32
"""Elements whose bits are one number."""
SMALL_BLOCK = 1024
"""Elements of a program of take and add_share."""


class Blocks(NamedTuple):
    """A division cut into blocks, none of which reaches into another part: (blocks,) each."""

    starts: Tensor  # int32
    stops: Tensor  # int32
    parts: Tensor  # int64


def scan(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    selects_nan: bool,
    zeroes_grad: bool,
) -> Found:
    blocks = _blocks_of(division, send.device)
    bits, marked = _mark(send, grad, bounds, blocks, selects_nan, zeroes_grad)
    ends = marked.cumsum(0)  # (blocks,)
    total = int(ends[-1]) if len(ends) else 0  # host synchronisation: how many there are
    indices = torch.empty(total, dtype=torch.int64, device=send.device)
    _place(bits, marked, blocks, ends - marked, ends, indices)
    return Found(indices, send[indices].abs(), _sum_by_part(marked, blocks, division))


def scan_into(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    rooms: Division,
    zeroes_grad: bool,
) -> tuple[Tensor, Tensor]:
    blocks = _blocks_of(division, send.device)
    bits, marked = _mark(send, grad, bounds, blocks, True, zeroes_grad)
    counts = _sum_by_part(marked, blocks, division)
    edges = rooms.edges_on(send.device)
    slots = torch.full((rooms.n,), -1, device=send.device)
    # A block's first index goes behind those of its part's blocks before it.
    before = (marked.cumsum(0) - marked) - (counts.cumsum(0) - counts)[blocks.parts]
    _place(bits, marked, blocks, edges[blocks.parts] + before, edges[blocks.parts + 1], slots)
    return slots, counts


def take(send: Tensor, indices: Tensor, values: Tensor) -> None:
    if len(indices):
        with torch.cuda.device_of(send):
            _take_kernel[_grid(indices)](send, indices, values, len(indices), SMALL_BLOCK)


def add_share(mean: Tensor, indices: Tensor, values: Tensor, world_size: int) -> None:
    if len(indices):
        divisor = torch.full((1,), world_size, dtype=mean.dtype, device=mean.device)
        with torch.cuda.device_of(mean):
            _add_share_kernel[_grid(indices)](mean, indices, values, divisor, len(indices), SMALL_BLOCK)


def _grid(indices: Tensor) -> tuple[int]:
    return (triton.cdiv(len(indices), SMALL_BLOCK),)


def _blocks_of(division: Division, device: torch.device) -> Blocks:
    key = ("blocks", device)
    if key not in division.tables:
        sizes = division.edges.diff()
        per_part = (sizes + BLOCK - 1) // BLOCK
        parts = torch.arange(division.num_parts).repeat_interleave(per_part)
        rank = torch.arange(len(parts)) - (per_part.cumsum(0) - per_part)[parts]
        starts = division.edges[parts] + BLOCK * rank
        stops = division.edges[parts + 1].minimum(starts + BLOCK)
        division.tables[key] = Blocks(
            starts.to(device, torch.int32), stops.to(device, torch.int32), parts.to(device)
        )
    found: Blocks = division.tables[key]
    return found


def _sum_by_part(marked: Tensor, blocks: Blocks, division: Division) -> Tensor:
    """(parts,) int64 from numbers of the blocks (blocks,)."""
    ends = torch.cat([marked.new_zeros(1), marked.cumsum(0)])
    parts = torch.arange(division.num_parts + 1, device=marked.device)
    return ends[torch.searchsorted(blocks.parts, parts)].diff()


def _mark(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    blocks: Blocks,
    selects_nan: bool,
    zeroes_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The marked elements' bits (blocks, words) int32, and how many a block has (blocks,) int64."""
    num_blocks = len(blocks.starts)
    bits = torch.empty((num_blocks, BLOCK // WORD), dtype=torch.int32, device=send.device)
    marked = torch.empty(num_blocks, dtype=torch.int64, device=send.device)
    if num_blocks:
        has_grad, added = grad is not None, send if grad is None else grad
        tables = (bounds, *blocks, bits, marked)
        choices = (has_grad, zeroes_grad, selects_nan)
        with torch.cuda.device_of(send):
            _mark_kernel[(num_blocks,)](send, added, *tables, *choices, BLOCK, WORD)
    return bits, marked


def _place(bits: Tensor, marked: Tensor, blocks: Blocks, firsts: Tensor, ends: Tensor, slots: Tensor) -> None:
    """Write each block's marked indices into slots from its first place on, and none at its end or behind."""
    if len(marked):
        with torch.cuda.device_of(slots):
            _place_kernel[(len(marked),)](bits, marked, blocks.starts, firsts, ends, slots, BLOCK, WORD)


@triton.jit
def _mark_kernel(  # type: ignore[no-untyped-def]
    send,
    grad,
    bounds,
    starts,
    stops,
    parts,
    bits,
    marked,
    HAS_GRAD: tl.constexpr,  # noqa: N803
    ZEROES_GRAD: tl.constexpr,  # noqa: N803
    SELECTS_NAN: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WORD: tl.constexpr,  # noqa: N803
):
    block = tl.program_id(0)
    start, lane = tl.load(starts + block), tl.arange(0, BLOCK)
    inside = lane < tl.load(stops + block) - start  # where start + lane may exceed int32
    at = start + lane
    value = tl.load(send + at, inside, 0.0)
    if HAS_GRAD:
        value += tl.load(grad + at, inside, 0.0)
        tl.store(send + at, value, inside)
        if ZEROES_GRAD:
            tl.store(grad + at, tl.zeros_like(value), inside)
    bound = tl.load(bounds + tl.load(parts + block))
    reached = (tl.abs(value) < bound) == 0 if SELECTS_NAN else tl.abs(value) >= bound
    reached = (reached & inside).to(tl.int32)
    tl.store(marked + block, tl.sum(reached, 0).to(tl.int64))
    shifted = tl.reshape(reached, (BLOCK // WORD, WORD)) << tl.arange(0, WORD)[None, :]
    words = tl.sum(shifted, 1)  # different bits: their sum is their union
    tl.store(bits + block * (BLOCK // WORD) + tl.arange(0, BLOCK // WORD), words)


@triton.jit
def _place_kernel(  # type: ignore[no-untyped-def]
    bits,
    marked,
    starts,
    firsts,
    ends,
    slots,
    BLOCK: tl.constexpr,  # noqa: N803
    WORD: tl.constexpr,  # noqa: N803
):
    block = tl.program_id(0)
    if tl.load(marked + block) > 0:
        lane = tl.arange(0, BLOCK)
        word = tl.load(bits + block * (BLOCK // WORD) + lane // WORD)
        is_marked = (word >> (lane % WORD)) & 1
        end = tl.load(ends + block)
        place = tl.load(firsts + block) + tl.cumsum(is_marked, 0) - is_marked
        index = (tl.load(starts + block) + lane).to(tl.int64)
        tl.store(slots + place, index, (is_marked != 0) & (place < end))


@triton.jit(do_not_specialize=["indices", "values", "k"])
def _take_kernel(send, indices, values, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < k
    index = tl.load(indices + at, inside, 0)
    value = tl.load(send + index, inside, 0.0)
    tl.store(values + at, value, inside)
    tl.store(send + index, tl.zeros_like(value), inside)


@triton.jit(do_not_specialize=["indices", "values", "k"])
def _add_share_kernel(mean, indices, values, divisor, k, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < k
    index = tl.load(indices + at, inside, 0)
    value, world_size = tl.load(values + at, inside, 0.0), tl.load(divisor)
    # Of float32, "/" is only nearly the quotient.
    share = tl.div_rn(value, world_size) if value.dtype == tl.float32 else value / world_size
    tl.store(mean + index, tl.load(mean + index, inside, 0.0) + share, inside)

"""What the sign methods share: signs packed eight to a byte, and the majority vote on them."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sage.interfaces import Communicator

CHUNK = 131_072
"""Elements per step on the CPU, a multiple of 8: what a step reads and writes stays in a core's cache."""

SPREAD = 0x0102040810204080
"""Eight bytes of 0 or 1 times this, modulo 2^64, have byte i as bit i of the top byte: 2^(8i) 2^(56-7j) is
2^(56+i) for j = i, outside the top byte for every other j, and no two products coincide, so none carries."""

SIGNS = 2.0 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1  # (256, 8): a byte's signs, +1 or -1


def spans(n: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Consecutive elements, and the bytes that hold their signs: in pieces on the CPU, else all at once."""
    size = CHUNK if device.type == "cpu" else n
    for start in range(0, n, size):
        stop = min(start + size, n)
        yield slice(start, stop), slice(start // 8, num_bytes(stop))


def num_bytes(n: int) -> int:
    """The bytes that n signs take."""
    return -(-n // 8)


def pack(x: Tensor) -> Tensor:
    """Bit i of byte j is x[8 j + i] >= 0, so that the sign of 0 is +1 and of NaN -1; spare bits are 0.

    x (n,) -> (ceil(n / 8),) uint8. On the CPU by numpy, elsewhere by torch; both give the same bits.
    """
    return pack_by_numpy(x) if x.device.type == "cpu" else pack_by_torch(x)


def pack_by_numpy(x: Tensor) -> Tensor:
    """The form of pack for the CPU, five times as fast there."""
    return torch.from_numpy(np.packbits(x.numpy() >= 0, bitorder="little"))


def pack_by_torch(x: Tensor) -> Tensor:
    """The form of pack for any device."""
    positive = torch.nn.functional.pad(x >= 0, (0, -x.numel() % 8))
    return (positive.view(torch.int64) * SPREAD).view(torch.uint8)[7::8]  # the top bytes


def unpack(packed: Tensor, n: int) -> Tensor:
    """+1 or -1 (n,) float32 of the signs in packed (ceil(n / 8),)."""
    return SIGNS.to(packed.device).index_select(0, packed.int()).view(-1)[:n]


def vote(x: Tensor, mean: Tensor, comm: Communicator) -> None:
    """mean: +1 or -1, what at least half of the workers' x (n,) have as their sign; a tie is +1."""
    packed = torch.empty(num_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    for elements, places in spans(x.numel(), x.device):
        packed[places] = pack(x[elements])
    elected = majority(comm.all_gather(packed))
    for elements, places in spans(x.numel(), x.device):
        mean[elements] = unpack(elected[places], elements.stop - elements.start)


def majority(votes: Tensor) -> Tensor:
    """votes (W, bytes) -> (bytes,): a bit is set where at least half of the W have set it; a tie is +1.

    Every bit has a binary counter, digit by digit in planes of packed bits, so that a vote costs a few
    operations on n / 8 bytes. It starts at 2^digits - ceil(W / 2): it overflows where the votes suffice.
    """
    world_size = len(votes)
    digits = world_size.bit_length()
    start = 2**digits - (world_size + 1) // 2
    planes = [torch.full_like(votes[0], 255 * (start >> digit & 1)) for digit in range(digits)]
    elected = torch.zeros_like(votes[0])
    for carry in votes:
        for digit, plane in enumerate(planes):
            planes[digit], carry = plane ^ carry, plane & carry
        elected |= carry
    return elected

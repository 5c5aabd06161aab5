"""Signed integers of 2, 4 or 8 bits, several to a byte: packed and unpacked by operations on whole words."""

import torch
from torch import Tensor
from torch.nn.functional import pad

WORDS = {2: torch.int32, 4: torch.int16}
"""As many bytes as there are codes of so many bits in a byte."""


def num_bytes(n: int, bits: int) -> int:
    """The bytes that n codes take."""
    return -(-n * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The lowest bits of codes (n,) int8, as two's complement, the first code lowest: (num_bytes,) uint8."""
    if bits == 8:
        return codes.view(torch.uint8)
    count, mask = 8 // bits, 2**bits - 1
    words = pad(codes, (0, -len(codes) % count)).view(WORDS[bits])
    # code j is in byte j of a word, and goes to bits j of its lowest byte
    packed: Tensor = words & mask
    for place in range(1, count):
        packed |= words >> (8 - bits) * place & mask << bits * place
    return packed.byte()


def unpack(packed: Tensor, n: int, bits: int) -> Tensor:
    """The codes (n,) int8 in packed (num_bytes,) uint8."""
    if bits == 8:
        return packed.view(torch.int8)
    count, mask = 8 // bits, 2**bits - 1
    given = packed.to(WORDS[bits])
    # code j goes to the highest bits of byte j, from where a shift of the byte brings its sign along
    words: Tensor = (given & mask) << 8 - bits
    for place in range(1, count):
        words |= (given & mask << bits * place) << (8 - bits) * (place + 1)
    return words.view(torch.int8)[:n].bitwise_right_shift(8 - bits)

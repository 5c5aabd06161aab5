"""What the sign methods share: the majority vote on packed signs."""

import torch
from torch import Tensor

from reducers.kernels.signs import num_bytes, pack, unpack
from sage.interfaces import Communicator


def vote(x: Tensor, mean: Tensor, comm: Communicator) -> None:
    """mean: +1 or -1, what at least half of the workers' x (n,) have as their sign; a tie is +1."""
    packed = torch.empty(num_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    pack(x, packed)
    unpack(majority(comm.all_gather(packed)), mean)


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

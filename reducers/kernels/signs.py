"""Signs, eight to a byte: packed, unpacked, averaged over workers; and their forms for any device."""

from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

SPREAD = 0x0102040810204080
"""Eight bytes of 0 or 1 times this, modulo 2^64, have byte i as bit i of the top byte: 2^(8i) 2^(56-7j) is
2^(56+i) for j = i, outside the top byte for every other j, and no two products coincide, so none carries."""
GROUP = 8
"""Workers whose signs are added up before they are added to the others': for each element a byte."""


def num_bytes(n: int) -> int:
    """The bytes that n signs take."""
    return -(-n // 8)


def _cpu() -> Any:
    """The forms for the CPU. They import numba, so they are imported when they are asked for."""
    return import_module("reducers.kernels.signs_cpu")


def pack(x: Tensor, out: Tensor) -> None:
    """Bit i of byte j of out is x[8 j + i] >= 0: the sign of 0 is +1, of NaN -1; spare bits are 0.

    x (n,), out (ceil(n / 8),) uint8. Every form gives the same bits.
    """
    if x.device.type == "cpu":
        _cpu().pack(x, out)
    else:
        plain_pack(x, out)


def plain_pack(x: Tensor, out: Tensor) -> None:
    positive = pad(x >= 0, (0, -x.numel() % 8))
    out.copy_((positive.view(torch.int64) * SPREAD).view(torch.uint8)[7::8])  # the top bytes


def unpack(packed: Tensor, out: Tensor) -> None:
    """out (n,): +1 or -1, the signs in packed (ceil(n / 8),)."""
    if out.device.type == "cpu":
        _cpu().unpack(packed, out)
    else:
        plain_unpack(packed, out)


def plain_unpack(packed: Tensor, out: Tensor) -> None:
    # 2 bit - 1
    out.copy_(_bits(packed, out.numel())).mul_(2).sub_(1)


def _bits(packed: Tensor, n: int) -> Tensor:
    """(n,) uint8 of 0 and 1."""
    return (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1).view(-1)[:n]


class ScaledSigns:
    """The signs of a flat vector (n,), times a scale for each of its consecutive parts; some may be empty."""

    def __init__(self, edges: Sequence[int]) -> None:
        """edges: 0, where each other part starts, n."""
        self.edges = torch.tensor(edges, dtype=torch.int64)  # (parts + 1,)
        self._sizes = [stop - start for start, stop in pairwise(edges)]
        self._owners: dict[torch.device, Tensor] = {}

    def norms(self, x: Tensor) -> Tensor:
        """The sum of magnitudes of each part of x (n,): (parts,) float32. Forms may round it differently."""
        if x.device.type == "cpu":
            found: Tensor = _cpu().norms(x, self.edges)
            return found
        return self.plain_norms(x)

    def plain_norms(self, x: Tensor) -> Tensor:
        return torch.stack(torch._foreach_norm(x.split(self._sizes), 1)).float()

    def average(self, packed: Tensor, scales: Tensor, rank: int, send: Tensor, mean: Tensor) -> None:
        """mean = sum_r scales_r signs_r / W, then send -= scales_rank signs_rank.

        packed (W, ceil(n / 8)) uint8, scales (W, parts) float32; send, mean (n,). The workers are added in
        rank order, in groups of 8; every form gives the same bits.
        """
        if mean.device.type == "cpu":
            _cpu().average(packed, scales, self.edges, rank, send, mean)
        else:
            self.plain_average(packed, scales, rank, send, mean)

    def plain_average(self, packed: Tensor, scales: Tensor, rank: int, send: Tensor, mean: Tensor) -> None:
        owners, world_size = self._owners_on(mean.device), len(packed)
        mean.zero_()
        decoded = torch.empty_like(mean)
        for first in range(0, world_size, GROUP):
            total = torch.zeros_like(mean)
            for worker in range(first, min(first + GROUP, world_size)):
                plain_unpack(packed[worker], decoded)
                decoded.mul_(scales[worker].index_select(0, owners))
                total.add_(decoded)
                if worker == rank:
                    send.sub_(decoded)
            mean.add_(total)
        mean.div_(world_size)

    def _owners_on(self, device: torch.device) -> Tensor:
        """The part of each element (n,) int32, there."""
        if device not in self._owners:
            sizes = self.edges.diff()
            owners = torch.arange(len(sizes), dtype=torch.int32).repeat_interleave(sizes)
            self._owners[device] = owners.to(device)
        return self._owners[device]

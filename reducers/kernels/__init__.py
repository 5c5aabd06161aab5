"""What a sparsifier does to whole gradients: functions in several forms that give the same bits.

A function here is a door: it states the contract and takes the form of the tensors' device. The forms are
three modules with functions of the same names: `plain` (torch operations, for any device: the reference),
`cpu` (compiled by numba) and `gpu` (Triton). Vectors are contiguous, of float32 or float64.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

MODULES = {"cpu": "reducers.kernels.cpu", "cuda": "reducers.kernels.gpu"}
"""The form of a device; plain on every other."""


class Division:
    """[0, n) cut into consecutive parts, which may be empty."""

    def __init__(self, edges: Sequence[int]) -> None:
        """edges: 0, where each other part starts, n."""
        self.edges = torch.tensor(edges)  # (parts + 1,) int64
        self.n, self.num_parts = edges[-1], len(edges) - 1
        self._copies: dict[torch.device, Tensor] = {}
        self.tables: dict[object, Any] = {}
        """What a form has made of the edges, once."""

    def edges_on(self, device: torch.device) -> Tensor:
        """The edges (parts + 1,) int64 there."""
        if device not in self._copies:
            self._copies[device] = self.edges.to(device, non_blocking=True)
        return self._copies[device]


class Found(NamedTuple):
    """What a scan has found."""

    indices: Tensor  # (c,) int64, ascending
    magnitudes: Tensor  # (c,)
    counts: Tensor  # (parts,) int64: how many of them are in each part


def form_for(device: torch.device) -> Any:
    """The module whose functions serve a device. It is imported when it is asked for."""
    return import_module(MODULES.get(device.type, "reducers.kernels.plain"))


def scan(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    *,
    selects_nan: bool = False,
    zeroes_grad: bool = False,
) -> Found:
    """send += grad (where one is given), and what then reaches the bound of its part: |send| >= bound.

    send, grad (n,); bounds (parts,) of their type and device. NaN reaches nothing; selects_nan: whatever is
    not below its bound reaches it, so NaN does. zeroes_grad: grad becomes 0. On a GPU it waits for the
    device, to learn how many there are.
    """
    form = form_for(send.device)
    found: Found = form.scan(send, grad, bounds, division, selects_nan, zeroes_grad)
    return found


def scan_into(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    rooms: Division,
    *,
    zeroes_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """As scan with selects_nan, without waiting for the device: into as much room as each part is given.

    Returns slots (room,) int64: the first indices of each part, and -1 where there are fewer than its room;
    and how many reach the bound in each part (parts,) int64, also beyond its room.
    """
    form = form_for(send.device)
    found: tuple[Tensor, Tensor] = form.scan_into(send, grad, bounds, division, rooms, zeroes_grad)
    return found


def keep_largest(found: Found, thresholds: Tensor, ks: Tensor) -> Tensor:
    """Of each part's candidates the k largest, whose smallest is the part's threshold: (sum of ks,) int64.

    thresholds, ks (parts,). What is above the threshold is kept, then the first that equal it. NaN is the
    largest.
    """
    kept: Tensor = form_for(found.indices.device).keep_largest(found, thresholds, ks)
    return kept


def take(send: Tensor, indices: Tensor, values: Tensor) -> None:
    """values (k,) = send at indices (k,), which are unique; send: 0 there."""
    form_for(send.device).take(send, indices, values)


def add_share(mean: Tensor, indices: Tensor, values: Tensor, world_size: int) -> None:
    """mean += values (k,) / world_size at indices (k,) int32 or int64, which are unique."""
    form_for(mean.device).add_share(mean, indices, values, world_size)

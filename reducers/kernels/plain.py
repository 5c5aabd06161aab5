"""The forms for any device: operations on whole tensors, the reference of the others."""

import torch
from torch import Tensor

from reducers.kernels import Division, Found


def scan(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    selects_nan: bool,
    zeroes_grad: bool,
) -> Found:
    reached = _add_and_compare(send, grad, bounds, division, selects_nan, zeroes_grad)
    indices = reached.nonzero().view(-1)  # host synchronisation: how many there are
    counts = torch.searchsorted(indices, division.edges_on(send.device)).diff()
    return Found(indices, send[indices].abs(), counts)


def scan_into(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    rooms: Division,
    zeroes_grad: bool,
) -> tuple[Tensor, Tensor]:
    reached = _add_and_compare(send, grad, bounds, division, True, zeroes_grad)
    ends = reached.cumsum(0)  # (n,): how many up to here
    edges, room_edges = division.edges_on(send.device), rooms.edges_on(send.device)
    before = torch.cat([ends.new_zeros(1), ends])[edges]  # (parts + 1,)
    part = _part_of_each(division, send.device)
    slot = ends - 1 - before[part] + room_edges[part]  # (n,)
    slot = torch.where(reached & (slot < room_edges[part + 1]), slot, rooms.n)  # the rest: behind the last
    slots = torch.full((rooms.n + 1,), -1, device=send.device)
    slots.scatter_(0, slot, torch.arange(len(send), device=send.device))
    return slots[:-1], before.diff()


def keep_largest(found: Found, thresholds: Tensor, ks: Tensor) -> Tensor:
    kept, sizes = [], found.counts.tolist()
    pieces = found.indices.split(sizes), found.magnitudes.split(sizes)
    for own, magnitude, threshold, k in zip(*pieces, thresholds, ks.tolist(), strict=True):
        is_nan = magnitude.isnan()
        above = (magnitude > threshold) | (is_nan & ~threshold.isnan())
        equal = (magnitude == threshold) | (is_nan & threshold.isnan())
        kept.append(own[above | (equal & (equal.cumsum(0) <= k - above.sum()))])
    return torch.cat(kept)


def take(send: Tensor, indices: Tensor, values: Tensor) -> None:
    torch.index_select(send, 0, indices, out=values)
    send[indices] = 0


def add_share(mean: Tensor, indices: Tensor, values: Tensor, world_size: int) -> None:
    # A tensor, since a GPU multiplies by the inverse of a number.
    mean.index_add_(0, indices, values / torch.full_like(values, world_size))


def _add_and_compare(
    send: Tensor,
    grad: Tensor | None,
    bounds: Tensor,
    division: Division,
    selects_nan: bool,
    zeroes_grad: bool,
) -> Tensor:
    """(n,) bool: what reaches its bound after the addition."""
    if grad is not None:
        send.add_(grad)
        if zeroes_grad:
            grad.zero_()
    magnitude, bound = send.abs(), bounds[_part_of_each(division, send.device)]
    return (magnitude < bound).logical_not_() if selects_nan else magnitude >= bound


def _part_of_each(division: Division, device: torch.device) -> Tensor:
    """(n,) int64: the part that each element is in."""
    sizes = division.edges_on(device).diff()
    parts = torch.arange(division.num_parts, device=device)
    return parts.repeat_interleave(sizes, output_size=division.n)

"""DEFT: layers get shares of k by their norms, and are dealt out to the workers."""

from math import isfinite, log2
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.common import average_at
from reducers.density import DensityReducer
from reducers.disjoint import disjoint_payload_bytes
from reducers.search import Part, search_for
from reducers.sparse import UnionSettings, indexable, target_count
from sage.config import Named
from sage.interfaces import Communicator, Place, Seeds, Slot

COMMON = -1
"""Stands for a worker's number where a layer is sent whole, by all."""


class DeftSettings(UnionSettings):
    name: Literal["deft"] = "deft"


def cut(layout: list[Slot], world_size: int) -> list[tuple[int, int]]:
    """Where each layer starts and stops: the tensors, those with more than n / W elements in W pieces."""
    n, layers = layout[-1].stop, list[tuple[int, int]]()
    for slot in layout:
        pieces = world_size if slot.size > n / world_size else 1
        length, longer = divmod(slot.size, pieces)
        start = slot.start
        for piece in range(pieces):
            stop = start + length + (piece < longer)
            if stop > start:
                layers.append((start, stop))
            start = stop
    return layers


def allot(k: int, norms: list[float], sizes: list[int]) -> list[int]:
    """k_l of each layer, from the largest norm on: int(k_rest norm / norm_rest), within [1, n_l]."""
    rest, norm_rest = k, sum(norms)
    counts = [1] * len(norms)
    for layer in sorted(range(len(norms)), key=lambda layer: -norms[layer]):
        share = int(rest * (norms[layer] / norm_rest)) if norm_rest > 0 and isfinite(norm_rest) else 0
        counts[layer] = min(max(1, share), sizes[layer])
        rest -= counts[layer]
        norm_rest -= norms[layer]
    return counts


def deal(counts: list[int], sizes: list[int], world_size: int) -> list[int]:
    """The bin of each layer: the most expensive first, each into the lightest bin; COMMON where all of it is
    sent. Its cost is n_l log2(k_l), n_l where k_l is 1."""
    costs = [size * (log2(k) if k > 1 else 1.0) for size, k in zip(sizes, counts, strict=True)]
    loads, bins = [0.0] * world_size, [COMMON] * len(sizes)
    for layer in sorted(range(len(sizes)), key=lambda layer: -costs[layer]):
        if counts[layer] < sizes[layer]:
            lightest = bins[layer] = loads.index(min(loads))
            loads[lightest] += costs[layer]
    return bins


class Deft(DensityReducer):
    """In step t, worker t mod W deals the layers into W bins; worker i takes bin (t + i) mod W and selects
    k_l of each layer in it, by its own norms. All send their values wherever one selected, and the layers
    that are common.

    Yoon and Oh 2023, arXiv 2307.03500, algorithms 1 to 4. The leader's message is each layer's bin, which
    says in L numbers what the published one says in L + W. With one worker the published code never sends
    the common layers. The target is the union's density; a worker's own is that of what it has selected,
    without the common layers.
    """

    Settings: ClassVar[type[Named]] = DeftSettings
    state_names = ("num_steps",)

    def __init__(
        self, config: DeftSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config)
        self.n, self._layout = indexable(layout), layout
        self.num_steps = 0
        self._union_density = 0.0

    def layer_norms(self, send: Tensor, layers: list[tuple[int, int]]) -> list[float]:
        norms = torch._foreach_norm([send[start:stop] for start, stop in layers])
        found: list[float] = torch.stack(norms).tolist()  # host synchronisation
        return found

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        place = Place(comm.rank, comm.world_size)
        layers = cut(self._layout, place.world_size)
        sizes = [stop - start for start, stop in layers]
        # 1. How many of each layer, by this worker's norms.
        k = target_count(self.target_density, self.n)
        counts = allot(k, self.layer_norms(send, layers), sizes)
        # 2. The leader says whose each layer is.
        leader = self.num_steps % place.world_size
        bins = deal(counts, sizes, place.world_size) if place.rank == leader else [COMMON] * len(layers)
        message = torch.tensor(bins, dtype=torch.int32, device=send.device)
        comm.broadcast(message, leader)
        bins = comm.read(message).tolist()
        # 3. The largest of this worker's layers.
        mine = (self.num_steps + place.rank) % place.world_size
        own = [(*layer, k) for layer, k, bin_ in zip(layers, counts, bins, strict=True) if bin_ == mine]
        gathered = list(comm.all_gather_ragged(self._largest(send, own).to(torch.int32)))
        # 4. Everybody's values there, and in the common layers.
        common = [layer for layer, bin_ in zip(layers, bins, strict=True) if bin_ == COMMON]
        whole = [torch.arange(*layer, dtype=torch.int32, device=send.device) for layer in common]
        self._sent = torch.cat([*gathered, *whole]).long()  # all different
        average_at(self._sent, send, mean, comm)
        self.density = sum(map(len, gathered)) / (place.world_size * self.n)
        self._union_density = len(self._sent) / self.n
        self.num_steps += 1

    def _largest(self, send: Tensor, layers: list[tuple[int, int, int]]) -> Tensor:
        """The indices (sum of k,) int64 of the k largest of each (start, stop, k)."""
        layers = layers or [(0, 0, 0)]
        pieces = torch.cat([send[start:stop] for start, stop, _ in layers])  # a copy of size n / W
        parts, shifts, first = list[Part](), list[int](), 0
        for start, stop, k in layers:
            parts.append(Part(first, first + stop - start, k))
            shifts.append(start - first)
            first = parts[-1].stop
        search = search_for(send.device)(parts, send.device)
        search.sample.draw(self.num_steps)
        found = search.finish(pieces, search.begin(pieces, None, False))
        moved = torch.tensor(shifts, device=send.device)
        return found + moved.repeat_interleave(search.ks, output_size=len(found))

    def expected_payload_bytes(self, world_size: int) -> int:
        if world_size == 1:
            return 0
        k = target_count(self.config.density, self.n)
        return 4 * len(cut(self._layout, world_size)) + disjoint_payload_bytes(k, world_size)

    def metrics(self) -> dict[str, float]:
        return {"target_density": self.target_density, "union_density": self._union_density}

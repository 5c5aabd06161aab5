"""How the k largest magnitudes of each part of a gradient are found: exactly, among few candidates.

A sample of a part gives a bound a little below its k-th largest magnitude. One pass, which also adds the
gradient, lists what reaches the bound, and the k largest of that list are the part's. So the sample decides
how long it takes, not what is selected: where a list is shorter than k, the CPU searches the part whole. On
a GPU the host would have to wait to find that out: see FixedSearch.
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import numpy as np
import torch
from torch import Tensor

from reducers.kernels import Division, Found, keep_largest, scan, scan_into
from reducers.sparse import Candidates
from sage.draws import Draws

NUM_ABOVE = 8
"""A part's sample is so large that this many of the part's k largest, or of its 4 sqrt(size) largest where
these are more, are expected in it ..."""
NUM_DEVIATIONS = 4.0
"""... and the bound is so many standard deviations of that binomial count below the k-th largest: there are
too few candidates in about 1 step of 4,000."""
MOST_SAMPLED, MOST_SELECTED = 1 / 4, 1 / 4
"""Parts of which a larger share would be sampled or is selected are searched whole, without a sample."""
ROOM_DEVIATIONS = 5.0
"""Where the number of candidates is limited beforehand: so many standard deviations more than expected."""


MOST_CHANGE = 2.0
"""A sample serves for other k too, until K is by this factor another one than it was drawn for."""


Counts = np.ndarray
"""(parts,) int64, one number for each part."""


def num_aimed_at(ks: Any, sizes: Any) -> Any:
    """K = max(k, 4 sqrt n), of numbers or of arrays.

    For a smaller K a larger sample would cost more than the fewer candidates above its bound save.
    """
    return np.maximum(ks, 4 * np.sqrt(sizes))


def ranks_of_bounds(ks: Any, sizes: Any, nums_sampled: Any) -> Any:
    """r = mu + 4 sqrt(mu), of numbers or of arrays: which of the sampled magnitudes, from the largest, is the
    bound. nums_sampled: m, of samples that may have been drawn for other k."""
    expected = nums_sampled * num_aimed_at(ks, sizes) / sizes  # mu = m K / n
    return np.ceil(expected + NUM_DEVIATIONS * np.sqrt(expected)).astype(np.int64)


def selects_few(ks: Any, sizes: Any) -> Any:
    return ks <= MOST_SELECTED * sizes


@dataclass(frozen=True)
class Part:
    """Of the elements [start, stop) of the flat gradient k are selected."""

    start: int
    stop: int
    k: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def num_sampled(self) -> int:
        """m = max(8 n / K, (k n)^(1/3))."""
        cube_root: float = (self.k * self.size) ** (1 / 3)
        return math.ceil(max(NUM_ABOVE * self.size / float(num_aimed_at(self.k, self.size)), cube_root))

    def is_worth_a_sample(self) -> bool:
        few = self.size > 0 and selects_few(self.k, self.size)
        return few and self.num_sampled() <= MOST_SAMPLED * self.size

    def rank_of_bound(self) -> int:
        """Of its own sample."""
        return int(ranks_of_bounds(self.k, self.size, self.num_sampled()))

    def room(self, num_sampled: int | None = None) -> int:
        """For how many candidates there is room, where that must be known beforehand. num_sampled: m of a
        sample that was drawn for another k; None: of its own; 0: there is no sample."""
        if num_sampled == 0 or (num_sampled is None and not self.is_worth_a_sample()):
            return self.size
        sampled = self.num_sampled() if num_sampled is None else num_sampled
        rank = int(ranks_of_bounds(self.k, self.size, sampled))
        most = self.size * (rank + ROOM_DEVIATIONS * math.sqrt(rank)) / sampled
        return min(self.size, math.ceil(most))


class Segments:
    """Consecutive pieces of a vector, of lengths known beforehand."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        self.division = Division([0, *itertools.accumulate(lengths)])
        self.firsts = self.division.edges_on(device)  # (pieces + 1,)
        self.lengths = self.firsts.diff()
        owners = torch.arange(len(lengths), device=device)
        self.owners = owners.repeat_interleave(self.lengths, output_size=self.division.n)  # (total,)
        self.ranks = torch.arange(self.division.n, device=device) - self.firsts[self.owners]  # (total,)

    def order(self, magnitudes: Tensor) -> Tensor:
        """(total,): where the largest, second largest, ... of each piece are; of equal ones the first comes
        first, NaN before all."""
        order = magnitudes.sort(descending=True, stable=True).indices
        return order[self.owners[order].sort(stable=True).indices] if self.division.num_parts > 1 else order


class Sample:
    """Positions in those parts that are worth it: one drawn in each of as many equal blocks as the part's
    sample is large, so that no period in the gradient can fall in step with them."""

    def __init__(self, parts: list[Part], device: torch.device) -> None:
        self.parts = [part for part in parts if part.is_worth_a_sample()]
        self.sizes = [part.num_sampled() for part in self.parts]
        self.pieces = Segments(self.sizes, device)
        facts = [(part.start, part.size / part.num_sampled(), part.stop - 1) for part in self.parts]
        table = torch.tensor(facts, dtype=torch.float64, device=device).view(-1, 3)
        starts, self._widths, self._lasts = table[self.pieces.owners].unbind(1)  # (sampled,) each
        self._blocks = starts + self.pieces.ranks * self._widths  # where each block starts

    def draw(self, number: int) -> None:
        """Draw the number-th set of positions (sampled,): the same in every process, and on every device."""
        within = Draws(number).uniform(self._widths.shape, self._widths.device)
        self.positions = (self._blocks + within * self._widths).minimum(self._lasts).long()

    def magnitudes(self, send: Tensor, grad: Tensor | None) -> Tensor:
        """|send + grad| at the positions (sampled,), one part after the other."""
        values = send.index_select(0, self.positions)  # on a CPU several times as fast as send[positions]
        if grad is not None:
            values.add_(grad.index_select(0, self.positions))
        return values.abs_()


class Search(ABC, Generic[Candidates]):
    """How the parts of a gradient, in ascending order, are searched: begin, then finish, once a step."""

    may_miss: ClassVar[bool] = False
    """Whether there may be steps in which other elements are selected than the largest."""
    ks: Tensor
    """(parts,) int64, on the device."""

    def __init__(self, parts: list[Part], device: torch.device) -> None:
        self.division = Division([0, *(part.stop for part in parts)])
        self.sample = Sample(parts, device)
        numbers = {part: number for number, part in enumerate(self.sample.parts)}
        of_parts = [numbers.get(part, len(numbers)) for part in parts]
        self._bound_of_part = torch.tensor(of_parts, device=device)  # (parts,)
        self.needs_new_sample = False
        """After finish: whether the next step is to look at other positions."""
        self.has_missed = torch.zeros((), dtype=torch.bool, device=device)
        """After begin: whether this may be such a step."""
        self._device = device
        self._places = [(part.start, part.stop) for part in parts]
        self._sizes = np.array([part.size for part in parts], np.int64)
        self._drawn_for = np.array([part.k for part in parts], np.int64)
        nums_sampled = [part.num_sampled() if part.is_worth_a_sample() else 0 for part in parts]
        self._nums_sampled = np.array(nums_sampled, np.int64)  # 0: of the part there is no sample
        self.aim(self._drawn_for)

    def can_aim(self, ks: Counts) -> bool:
        """Whether what was drawn, or not drawn, does for other k of the same parts."""
        sizes, before = self._sizes, self._drawn_for
        aimed, was = (np.maximum(num_aimed_at(k, sizes), 1) for k in (ks, before))  # 0 of no elements
        as_few = selects_few(ks, sizes) == selects_few(before, sizes)
        return bool((as_few & (aimed < MOST_CHANGE * was) & (was < MOST_CHANGE * aimed)).all())

    def aim(self, ks: Counts) -> None:
        """Search for other k, in the same parts and with the same sample."""
        self._counts = ks.tolist()
        sampled = self._nums_sampled > 0
        facts = (ks[sampled], self._sizes[sampled], self._nums_sampled[sampled])
        self._prepare(ranks_of_bounds(*facts).tolist())

    @abstractmethod
    def _prepare(self, ranks: list[int]) -> None:
        """Make what depends on the k. ranks: of the sampled parts' bounds."""

    @abstractmethod
    def begin(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Candidates:
        """send += grad, where one is given; the candidates that finish takes."""

    @abstractmethod
    def finish(self, send: Tensor, candidates: Candidates) -> Tensor:
        """The indices (sum of k,) int64 of the largest of every part, ascending."""

    def bounds_of_all(self, sampled: Tensor) -> Tensor:
        """(parts,) from the bounds of the sampled parts, positive, so that zeros are no candidates; 0, which
        everything reaches, for the others."""
        least = torch.finfo(sampled.dtype).tiny
        bounds = torch.cat([sampled.clamp(min=least), sampled.new_zeros(1)])[self._bound_of_part]
        return torch.where(bounds.isnan(), torch.inf, bounds)  # which NaN reaches


class SampledSearch(Search[Found]):
    """For the CPU: where a part has too few candidates, it is searched whole."""

    def _prepare(self, ranks: list[int]) -> None:
        self.ks = torch.tensor(self._counts, dtype=torch.int64)  # (parts,)
        self._ranks = ranks

    def begin(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Found:
        pieces = self.sample.magnitudes(send, grad).split(self.sample.sizes)
        sampled = [_kth_largest(own, rank) for own, rank in zip(pieces, self._ranks, strict=True)]
        bounds = self.bounds_of_all(torch.tensor(sampled, dtype=send.dtype))
        return scan(send, grad, bounds, self.division, selects_nan=True, zeroes_grad=zeroes_grad)

    def finish(self, send: Tensor, candidates: Found) -> Tensor:
        self.needs_new_sample = bool((candidates.counts < self.ks).any())
        if self.needs_new_sample:
            candidates = self._with_whole_parts(send, candidates)
        pieces = candidates.magnitudes.split(candidates.counts.tolist())
        thresholds = [
            _kth_largest(own, k) if len(own) > k else -1.0  # all of them are above it
            for own, k in zip(pieces, self._counts, strict=True)
        ]
        return keep_largest(candidates, torch.tensor(thresholds, dtype=send.dtype), self.ks)

    def _with_whole_parts(self, send: Tensor, candidates: Found) -> Found:
        """The same candidates, but all elements of a part that has fewer than k."""
        listed = candidates.indices.split(candidates.counts.tolist())
        pieces = [
            own if len(own) >= k else torch.arange(*place)
            for own, place, k in zip(listed, self._places, self._counts, strict=True)
        ]
        indices = torch.cat(pieces)
        return Found(indices, send[indices].abs(), torch.tensor([len(own) for own in pieces]))


def _kth_largest(values: Tensor, k: int) -> float:
    """NaN is the largest. numpy finds it 10 to 20 times as fast as torch."""
    at = len(values) - k
    return float(np.partition(values.numpy(), at)[at])


class FixedSearch(Search[tuple[Tensor, Tensor]]):
    """For a GPU: all lengths are known beforehand, so that the host never waits for the device.

    Each part has room for a number of candidates. In about 1 step of 4,000 the bound is too high or too low:
    where a part has fewer than k candidates, the first of its other elements are sent with them; where it has
    more than fit, the first that fit take part. What should have been sent instead stays in send, and the
    step is counted. Every step has a new sample, so that such steps do not follow one another.
    """

    may_miss = True

    def __init__(self, parts: list[Part], device: torch.device) -> None:
        super().__init__(parts, device)
        self.needs_new_sample = True
        self._edges = self.division.edges_on(device)

    def _prepare(self, ranks: list[int]) -> None:
        """Without waiting for the device."""
        last = torch.tensor(ranks, dtype=torch.int64).sub_(1).to(self._device, non_blocking=True)
        self._bound_at = self.sample.pieces.firsts[:-1] + last
        facts = zip(self._places, self._counts, self._nums_sampled.tolist(), strict=True)
        self._rooms = Segments([Part(*place, k).room(sampled) for place, k, sampled in facts], self._device)
        self._sent = Segments(self._counts, self._device)
        self._sent_at = self._rooms.firsts[self._sent.owners] + self._sent.ranks  # (sum of k,)
        self.ks = self._sent.lengths  # (parts,)

    def begin(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> tuple[Tensor, Tensor]:
        """The parts' slots (room,), -1 where one is empty, and how many candidates each has (parts,)."""
        magnitudes = self.sample.magnitudes(send, grad)
        bounds = self.bounds_of_all(magnitudes[self.sample.pieces.order(magnitudes)[self._bound_at]])
        rooms = self._rooms.division
        slots, counts = scan_into(send, grad, bounds, self.division, rooms, zeroes_grad=zeroes_grad)
        lacks = (counts < self.ks) & (bounds > torch.finfo(bounds.dtype).tiny)  # else the others are 0
        self.has_missed = (lacks | (counts > self._rooms.lengths)).any()
        return slots, counts

    def finish(self, send: Tensor, candidates: tuple[Tensor, Tensor]) -> Tensor:
        slots, counts = candidates
        magnitudes = torch.where(slots >= 0, send[slots.clamp(min=0)].abs(), -1)  # (room,)
        chosen = slots[self._rooms.order(magnitudes)[self._sent_at]]  # (sum of k,)
        return torch.where(chosen >= 0, chosen, self._others(slots, counts)).sort().values

    def _others(self, slots: Tensor, counts: Tensor) -> Tensor:
        """(sum of k,): for each index to send that no candidate gives, one that is no candidate.

        The j-th of them, of a part that starts at s, is s + j + how many candidates come before it, and t
        candidates come before it where the t-th candidate p, counted from 0, has p - t <= s + j.
        """
        rooms, sent = self._rooms, self._sent
        passed = torch.where(slots >= 0, slots - rooms.ranks, self._edges[rooms.owners + 1])  # ascending
        wanted = self._edges[sent.owners] + sent.ranks - counts[sent.owners]
        return wanted + torch.searchsorted(passed, wanted, right=True) - rooms.firsts[sent.owners]


def search_for(device: torch.device) -> type[Search[Any]]:
    return SampledSearch if device.type == "cpu" else FixedSearch

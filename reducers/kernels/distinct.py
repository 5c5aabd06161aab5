"""Different elements of each part of a vector, drawn without waiting for the device."""

from math import ceil, log, sqrt

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from reducers.kernels.parts import Draw, PartsDraw
from sage.draws import bits_at, modulo


class DistinctDraw(PartsDraw):
    """Different elements of each part, every subset as likely.

    A part has a sequence of numbers below its size, uniform and independent: the first count different ones
    are a sample without replacement. Where more than half of a part is drawn, what stays is.
    """

    cpu_module = "reducers.kernels.distinct_cpu"

    def __init__(self, starts: Tensor, sizes: Tensor, counts: Tensor) -> None:
        super().__init__(starts, sizes, counts)
        self.marks = np.zeros(int(sizes.max()) if len(sizes) else 0, np.bool_)
        """Of the form for the CPU: what it has drawn of a part; False between two calls."""

    def plain(self, device: torch.device) -> Draw:
        return PlainDraw(self, device)


class PlainDraw:
    """The form for any device, in torch operations.

    It computes a fixed number of draws. Should they not suffice (less than once in 10^15 draws of a part, see
    num_tries), the part's first element stands for what is missing, besides its other elements.
    """

    def __init__(self, parts: DistinctDraw, device: torch.device) -> None:
        drawn = torch.minimum(parts.counts, parts.sizes - parts.counts)
        pairs = zip(drawn.tolist(), parts.sizes.tolist(), strict=True)
        tries = torch.tensor([num_tries(*pair) for pair in pairs], dtype=torch.int64)  # (parts,)
        mostly = drawn < parts.counts  # (parts,)
        pooled = torch.where(mostly, parts.sizes, 0)
        num_tried, num_pooled, self._total = int(tries.sum()), int(pooled.sum()), parts.total
        # What is as long as there are parts is copied; what is longer is made where it is used.
        facts = torch.stack([tries, pooled, drawn, mostly.long(), parts.starts, parts.sizes, parts.counts])
        tries, pooled, drawn, mostly, starts, sizes, counts = facts.to(device, non_blocking=True)
        outs = counts.cumsum(0) - counts  # (parts,): where their elements go in the result
        pool_firsts = pooled.cumsum(0) - pooled  # (parts,)
        self._indices = torch.arange(len(tries), device=device)

        # The draws (m,): their parts, their numbers in them, and of each what follows from the part.
        owners = self._owners = self._indices.repeat_interleave(tries, output_size=num_tried)
        self._firsts = (tries.cumsum(0) - tries)[owners]
        self._numbers = torch.arange(num_tried, device=device) - self._firsts
        self._starts, self._sizes, self._drawn = starts[owners], sizes[owners], drawn[owners]
        self._outs, self._mostly = outs[owners], mostly[owners].bool()
        self._pool_offsets = (pool_firsts - starts)[owners]

        # The pool (p,): every element of the parts of which most are drawn.
        owners = self._indices.repeat_interleave(pooled, output_size=num_pooled)
        self._pool_firsts, self._pool_counts = pool_firsts[owners], counts[owners]
        self._pool = starts[owners] + torch.arange(num_pooled, device=device) - self._pool_firsts
        self._pool_outs = outs[owners]
        self._spare = pad(starts.repeat_interleave(counts, output_size=parts.total), (0, 1))  # (total + 1,)

    def __call__(self, key: int) -> Tensor:
        """The elements (total,) int64."""
        found = self._spare.clone()  # its last place takes what is not wanted
        # 1. The draws, and those that are new in their part and not too many.
        keys = bits_at(key, self._indices)[self._owners]
        places = self._starts + modulo(bits_at(keys, self._numbers), self._sizes)  # (m,)
        new = _is_first(places)
        ranks = _ranks(new, self._firsts)
        new &= ranks < self._drawn
        # 2. Where few are drawn, they are the result;
        targets = torch.where(new & ~self._mostly, self._outs + ranks, self._total)
        found.scatter_(0, targets, places)
        if not len(self._pool):
            return found[:-1]
        # 3. elsewhere what stays is drawn, and the result is the rest of the pool.
        goes = torch.ones(len(self._pool) + 1, dtype=torch.bool, device=found.device)
        stays = torch.where(new & self._mostly, self._pool_offsets + places, len(self._pool))
        goes = goes.scatter_(0, stays, torch.zeros_like(new))[:-1]
        ranks = _ranks(goes, self._pool_firsts)
        targets = torch.where(goes & (ranks < self._pool_counts), self._pool_outs + ranks, self._total)
        return found.scatter_(0, targets, self._pool)[:-1]


def _is_first(places: Tensor) -> Tensor:
    """Whether no earlier one of places (m,) is equal: (m,) bool."""
    ordered, origins = places.sort(stable=True)
    differs = torch.ones_like(ordered, dtype=torch.bool)
    differs[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(differs).scatter_(0, origins, differs)


def _ranks(chosen: Tensor, firsts: Tensor) -> Tensor:
    """How many are chosen before each one, from its part's first on. chosen, firsts (m,)."""
    before = pad(chosen.cumsum(0), (1, 0))  # (m + 1,)
    return before[:-1] - before[firsts]


def num_tries(count: int, size: int) -> int:
    """How many draws below size have count <= size / 2 different ones, but for less than once in 10^15 times.

    The draws between two new ones are geometric numbers. Together they have a mean of
    size ln(size / (size - count)) - count, a variance of at most twice that, and an exponential tail.
    """
    if not count:
        return 0
    repeats = size * log(size / (size - count)) - count
    return count + ceil(repeats + 10 * sqrt(2 * repeats)) + 80

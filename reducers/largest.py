"""The k largest magnitudes of each part of a gradient: an exact top-k among few candidates.

A sample of a part gives a bound a little below its k-th largest magnitude. One pass, which also adds the
gradient, lists what reaches the bound, and an exact top-k runs on that list; where the list is shorter than
k, the part is searched whole. So the sample decides how long it takes, never what is selected.
"""

import math
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from reducers.kernels.scan import scan
from reducers.sparse import CandidateSparsifier, SparsifierSettings
from sage.interfaces import Slot

NUM_ABOVE = 16
"""A part's sample is so large that this many of the part's k largest are expected in it ..."""
SHARE = 1 / 256
"""... or is this share of the part, where that is more: many candidates cost more than a sample."""
NUM_DEVIATIONS = 4.0
"""The bound is so many standard deviations of the binomial count below the k-th largest: the part is
searched whole in about 1 step of 10,000."""
MOST_SAMPLED, MOST_SELECTED = 1 / 4, 1 / 4
"""Parts of which a larger share would be sampled or is selected are searched whole, without a sample."""


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
        return math.ceil(max(NUM_ABOVE * self.size / max(self.k, 1), SHARE * self.size))

    def is_worth_a_sample(self) -> bool:
        return 0 < self.num_sampled() <= MOST_SAMPLED * self.size and self.k <= MOST_SELECTED * self.size

    def rank_of_bound(self) -> int:
        """Which of the sampled magnitudes, from the largest, is the bound."""
        expected = self.num_sampled() * self.k / self.size
        return math.ceil(expected + NUM_DEVIATIONS * math.sqrt(expected))


def spread(part: Part, rng: torch.Generator) -> Tensor:
    """Positions (num_sampled,) int64 in a part: one drawn in each of as many equal blocks, so that no period
    in the gradient can fall in step with them."""
    m = part.num_sampled()
    blocks = torch.arange(m, dtype=torch.float64) + torch.rand(m, dtype=torch.float64, generator=rng)
    return part.start + (blocks * (part.size / m)).long().clamp(max=part.size - 1)


def top(magnitudes: Tensor, k: int) -> Tensor:
    """The indices of the k largest along the last dimension. NaN is the largest; of equal ones any."""
    return magnitudes.topk(k, dim=-1, sorted=False).indices


class Search(ABC):
    """How the parts of a gradient, in ascending order, are searched: begin, then finish, once a step."""

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts

    @abstractmethod
    def begin(self, send: Tensor, grad: Tensor | None) -> list[Tensor]:
        """send += grad, where one is given; the candidates that finish takes."""

    @abstractmethod
    def finish(self, send: Tensor, candidates: list[Tensor]) -> Tensor:
        """The indices (sum of k,) int64 of the largest of every part."""


class WholeSearch(Search):
    """For any device: searches every part whole. It waits for no device, as k is fixed; the size of a list of
    candidates would have to be waited for."""

    def begin(self, send: Tensor, grad: Tensor | None) -> list[Tensor]:
        if grad is not None:
            send.add_(grad)
        return []

    def finish(self, send: Tensor, candidates: list[Tensor]) -> Tensor:
        return torch.cat(
            [part.start + top(send[part.start : part.stop].abs(), part.k) for part in self.parts]
        )


class SampledSearch(Search):
    """For the CPU: large parts among candidates above a sampled bound, small ones in batches of one size."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__(parts)
        self.sampled = [part for part in parts if part.is_worth_a_sample()]
        edges = [0, *(edge for part in self.sampled for edge in (part.start, part.stop)), parts[-1].stop]
        self.gaps = [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        """What lies between the sampled parts."""
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for part in parts:
            if not part.is_worth_a_sample():
                alike[part.size, part.k].append(part.start)
        self.batches = [
            (torch.tensor(starts).unsqueeze(1) + torch.arange(size), k) for (size, k), starts in alike.items()
        ]
        """The other parts, those of one size and k together: their elements (parts, size) int64, and k."""
        rng = torch.Generator().manual_seed(0)  # any: it changes no answer
        self.positions = torch.cat([torch.empty(0).long(), *(spread(part, rng) for part in self.sampled)])
        """What is sampled, of all parts."""

    def begin(self, send: Tensor, grad: Tensor | None) -> list[Tensor]:
        """send += grad, where one is given; the candidates of each sampled part, counted from its start."""
        candidates = []
        for part, bound in zip(self.sampled, self._bounds(send, grad), strict=True):
            own = slice(part.start, part.stop)
            added = None if grad is None else grad[own]
            candidates.append(scan(send[own], added, bound, selects_nan=True))
        if grad is not None:
            for gap in self.gaps:
                send[gap].add_(grad[gap])
        return candidates

    def _bounds(self, send: Tensor, grad: Tensor | None) -> list[Tensor]:
        """A scalar for each sampled part; positive, so that zeros are no candidates."""
        values = send[self.positions]
        sample = (values if grad is None else values.add_(grad[self.positions])).abs_()
        pieces = sample.split([part.num_sampled() for part in self.sampled])
        least = torch.finfo(send.dtype).tiny
        return [
            piece.topk(part.rank_of_bound()).values[-1].clamp(min=least)
            for piece, part in zip(pieces, self.sampled, strict=True)
        ]

    def finish(self, send: Tensor, candidates: list[Tensor]) -> Tensor:
        found = []
        for part, own in zip(self.sampled, candidates, strict=True):
            whole = send[part.start : part.stop]
            few = top(whole[own].abs(), part.k) if len(own) >= part.k else None
            found.append(part.start + (top(whole.abs(), part.k) if few is None else own[few]))
        for elements, k in self.batches:
            found.append(elements.gather(1, top(send[elements].abs(), k)).view(-1))
        return torch.cat(found)


class LargestSparsifier(CandidateSparsifier[list[Tensor]]):
    """Selects the k largest magnitudes of each part; a subclass says which parts. NaN is the largest, and is
    sent. Which of several equal magnitudes is sent is not defined, but the same input gives the same."""

    def __init__(self, config: SparsifierSettings, layout: list[Slot], device: torch.device) -> None:
        super().__init__(config, layout)
        self.layout = layout
        self._search_of = SampledSearch if device.type == "cpu" else WholeSearch
        self.aim(config.density)

    @abstractmethod
    def parts(self, density: float) -> list[Part]:
        """In ascending order, and they leave nothing out."""

    def aim(self, density: float) -> None:
        super().aim(density)
        self._search = self._search_of(self.parts(density))

    def find_candidates(self, send: Tensor, grad: Tensor | None) -> list[Tensor]:
        return self._search.begin(send, grad)

    def select_among(self, send: Tensor, candidates: list[Tensor]) -> Tensor:
        return self._search.finish(send, candidates)

    def target_counts(self) -> int:
        return sum(part.k for part in self.parts(self.config.density))

"""What the sparsifiers share whose threshold is an estimate from this step's magnitudes alone.

Such an estimate looks at the whole sum of memory and gradient, so the sum is made first, and searched then.
"""

from abc import abstractmethod
from collections.abc import Mapping
from math import isfinite, isnan, sqrt

import torch
from torch import Tensor
from torch.linalg import vector_norm

from reducers.kernels import Division, Found, scan
from reducers.sparse import CandidateSparsifier, SparsifierSettings, target_count
from sage.interfaces import Slot

BLOCK = 4096
"""Elements that are added up in float32; the blocks' sums are added up in float64."""


def block_norms(x: Tensor, order: int) -> Tensor:
    """(blocks,) float64: the norms of x (n,), cut into blocks."""
    whole = len(x) - len(x) % BLOCK
    norms = vector_norm(x[:whole].view(-1, BLOCK), order, dim=1)
    return torch.cat([norms, vector_norm(x[whole:], order).view(1)]).double()


class Magnitudes:
    """The magnitudes |a| of a vector a (n,): their statistics, and which of them reach a threshold.

    Every number that it returns is one that the host has waited for.
    """

    def __init__(self, values: Tensor) -> None:
        self.values, self.n = values, len(values)
        self._whole = Division([0, self.n])
        self._found: Found | None = None
        self._bound = 0.0

    # --- statistics ---

    def mean(self) -> float:
        return float(block_norms(self.values, 1).sum()) / self.n

    def largest(self) -> float:
        least, most = torch.stack(self.values.aminmax()).tolist()
        return float(max(-least, most))

    def mean_square(self) -> float:
        norms = block_norms(self.values, 2)
        square = float(norms.square().sum())
        if not isfinite(square):  # squares beyond float32: of a copy of size n
            square = float(block_norms(self.values.double(), 2).square().sum())
        return square / self.n

    def mean_log(self) -> tuple[float, int]:
        """Of those that are not 0: their mean logarithm, and how many there are. A copy of size n."""
        zeros = self.values == 0
        count = self.n - int(zeros.sum())
        logs = self.values.abs().log_().masked_fill_(zeros, 0.0)
        return (float(logs.sum()) / count if count else 0.0), count

    def signed_moments(self) -> tuple[float, float]:
        """The mean of a, and its standard deviation with n - 1 in the denominator (0 for one element)."""
        mean = float(self.values.sum()) / self.n
        return mean, sqrt(unbiased_variance(mean, self.mean_square(), self.n))

    # --- thresholds ---

    def reaching(self, threshold: float) -> tuple[Tensor, Tensor]:
        """The indices and the magnitudes (c,) of what reaches the threshold; NaN does not."""
        found = self._search(threshold)
        reached = found.magnitudes >= threshold
        return found.indices[reached], found.magnitudes[reached]

    def count(self, threshold: float) -> int:
        """How many reach the threshold."""
        return int((self._search(threshold).magnitudes >= threshold).sum())

    def _search(self, threshold: float) -> Found:
        """At least what reaches the threshold: by a scan, but where an earlier one has listed it."""
        if self._found is None or not threshold >= self._bound:
            bound = self.values.new_full((1,), threshold)
            self._found, self._bound = scan(self.values, None, bound, self._whole), threshold
        return self._found


def unbiased_variance(mean: float, mean_square: float, count: int) -> float:
    """count / (count - 1) (E[x^2] - E[x]^2); 0 of one number, and where rounding makes it negative."""
    return max(0.0, (mean_square - mean * mean) * count / (count - 1)) if count > 1 else 0.0


def usable(threshold: float, dtype: torch.dtype) -> float:
    """The nearest of the type's positive normal numbers; of NaN the largest."""
    limits = torch.finfo(dtype)
    return limits.max if isnan(threshold) else min(max(threshold, limits.tiny), limits.max)


class EstimatingSparsifier(CandidateSparsifier[Magnitudes]):
    """Selects |send| >= threshold, which a subclass estimates anew at each step, on each worker by itself.

    Published code selects what is above its threshold; here, as under every threshold of this package, what
    equals it is selected too, but no zeros. NaN is never sent, and while there is one, nothing else is.
    """

    def __init__(self, config: SparsifierSettings, layout: list[Slot]) -> None:
        super().__init__(config, layout)
        self.threshold = 0.0
        """The last step's."""

    @abstractmethod
    def estimate(self, magnitudes: Magnitudes, k: int) -> float:
        """The threshold that about k of the magnitudes reach."""

    def find_candidates(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Magnitudes:
        if grad is not None:
            send.add_(grad)
            if zeroes_grad:
                grad.zero_()
        return Magnitudes(send)

    def select_among(self, send: Tensor, candidates: Magnitudes) -> Tensor:
        estimated = self.estimate(candidates, target_count(self.target_density, self.n))
        self.threshold = usable(estimated, send.dtype)
        return candidates.reaching(self.threshold)[0]

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {**super().metrics(), "threshold": self.threshold}

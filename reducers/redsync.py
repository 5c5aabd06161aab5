"""RedSync: a threshold between the mean and the largest magnitude, found by bisection or by lowering."""

from typing import ClassVar, Literal

import torch

from reducers.estimate import EstimatingSparsifier, Magnitudes
from reducers.sparse import SparsifierSettings
from sage.config import Named
from sage.interfaces import Seeds, Slot

TOLERANCE = 0.2
"""Of the ratio: how long bisection goes on. Value of the published code."""
TRIMS = (0.8, 0.6, 0.4, 0.2, 0.0)
"""The ratios that are tried one after the other."""
LOWEST_BISECTED = 0.125
"""The lowest ratio that bisection to TOLERANCE can end with: the middle of [0, 0.25]."""


class RedSyncSettings(SparsifierSettings):
    name: Literal["redsync"] = "redsync"
    search: Literal["bisection", "trimmed"] = "bisection"
    """bisection: may select fewer than k, or many more. trimmed: at least k, and often many more."""


class RedSync(EstimatingSparsifier):
    """lambda = mean|a| + r (max|a| - mean|a|). r of [0, 1] is bisected until k < c < 2 k or its interval is
    at most 0.2 wide, c = #{|a_j| >= lambda}; it falls where c < k / 2, and rises elsewhere, also where
    k / 2 <= c <= k, as in the published code. Trimmed: r = 0.8, 0.6, ..., 0, until c >= k.

    Fang et al. 2019, arXiv 1808.04357, algorithms 2 and 3. Where the published trimmed search goes on below
    the mean, everything that is not 0 is sent. The published driver cuts what it has gathered into W equal
    pieces, though the workers' counts differ; here each message is added as long as it is.
    """

    Settings: ClassVar[type[Named]] = RedSyncSettings

    def __init__(
        self, config: RedSyncSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)
        self.search = config.search

    def estimate(self, magnitudes: Magnitudes, k: int) -> float:
        search = bisected if self.search == "bisection" else trimmed
        return search(magnitudes, magnitudes.mean(), magnitudes.largest(), k)


def bisected(magnitudes: Magnitudes, mean: float, largest: float, k: int) -> float:
    """The threshold of the last ratio that was tried."""
    low, high = 0.0, 1.0
    threshold = mean + LOWEST_BISECTED * (largest - mean)
    magnitudes.count(threshold)  # one scan for all ratios
    while high - low > TOLERANCE:
        ratio = (low + high) / 2
        threshold = mean + ratio * (largest - mean)
        count = magnitudes.count(threshold)
        if k < count < 2 * k:
            break
        low, high = (low, ratio) if count < k / 2 else (ratio, high)
    return threshold


def trimmed(magnitudes: Magnitudes, mean: float, largest: float, k: int) -> float:
    """The threshold of the first ratio that k or more reach; 0 where none is."""
    magnitudes.count(mean + TRIMS[-2] * (largest - mean))  # one scan for all but the last ratio
    for ratio in TRIMS:
        threshold = mean + ratio * (largest - mean)
        if magnitudes.count(threshold) >= k:
            return threshold
    return 0.0

"""Gaussian-k: the threshold that a normal distribution would have, corrected by at most two factors."""

from statistics import NormalDist
from typing import ClassVar, Literal

import torch

from reducers.estimate import EstimatingSparsifier, Magnitudes
from reducers.sparse import SparsifierSettings
from sage.config import Named
from sage.interfaces import Seeds, Slot

NUM_RESCALINGS = 2
"""The published code counts three times; what follows from the third count is never used."""


class GaussianKSettings(SparsifierSettings):
    name: Literal["gaussian_k"] = "gaussian_k"


class GaussianK(EstimatingSparsifier):
    """lambda = mu - sigma Phi^-1(d / 2), of a's mean and deviation; then twice, from c = #{|a_j| >= lambda}:

        lambda <- lambda / 2 if c < 2 k / 3, 3 lambda / 2 if c > 4 k / 3, else lambda

    Shi et al. 2019, arXiv 1911.08772, algorithm 1. The published driver cuts what it has gathered into W
    equal pieces, though the workers' counts differ; here each message is added as long as it is.
    """

    Settings: ClassVar[type[Named]] = GaussianKSettings

    def __init__(
        self, config: GaussianKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)

    def estimate(self, magnitudes: Magnitudes, k: int) -> float:
        mean, deviation = magnitudes.signed_moments()
        # lambda = mu - sigma Phi^-1(d / 2)
        threshold = mean - deviation * NormalDist().inv_cdf(self.target_density / 2)
        for _ in range(NUM_RESCALINGS):
            count = magnitudes.count(threshold)
            threshold *= 0.5 if count < 2 * k / 3 else 1.5 if count > 4 * k / 3 else 1.0
        return threshold

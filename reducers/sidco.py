"""SIDCo: the quantile of a distribution that is fitted to the magnitudes, in one or several stages."""

from collections.abc import Callable
from math import ceil, expm1, log, log2, sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.special import gammaincc

from reducers.estimate import EstimatingSparsifier, Magnitudes, unbiased_variance
from reducers.sparse import SparsifierSettings
from sage.config import Named
from sage.interfaces import Seeds, Slot

INTERVAL_STEPS, MOST_OVER, MOST_UNDER = 5, 1.2, 0.8
"""Every so many steps the mean of selected / k since the last time decides on the number of stages: above
MOST_OVER there is one less, below MOST_UNDER one more. Values of the published code."""
LEAST_SPREAD = 1e-6
"""Of gamma's q: less is the rounding of float32 logarithms, of magnitudes that are all alike."""
NUM_HALVINGS = 60
"""Of an interval that holds the gamma quantile: more than a float64 has bits."""

Distribution = Literal["exponential", "pareto", "gamma"]


class SidcoSettings(SparsifierSettings):
    name: Literal["sidco"] = "sidco"
    distribution: Distribution = "exponential"
    """exponential; pareto: generalized Pareto, by moments; gamma: the first stage, generalized Pareto in the
    others."""
    stages: Annotated[int, Field(ge=1)] | Literal["adaptive", "fixed_ratio"] = "adaptive"
    """How often the tail is fitted anew; adaptive: from 1 on, by the density that came of it; fixed_ratio: as
    many as give every stage the first ratio. (The published default is 1.)"""
    first_ratio: float = Field(default=0.25, gt=0, lt=1)
    """The share of the elements that the first of several stages is to leave."""


# --- fits: the threshold that a share of the distribution exceeds -----------------------------------


def exponential(share: float, mean: float) -> float:
    return -mean * log(share)


def pareto(share: float, mean: float, variance: float) -> float:
    """By moments: kappa = (m^2 / v - 1) / 2, s = m (m^2 / v + 1) / 2; lambda = s (1 - share^kappa) / kappa,
    of which -s ln(share) is the limit."""
    if variance <= 0:
        return mean
    ratio = mean * mean / variance
    shape, scale = (ratio - 1) / 2, mean * (ratio + 1) / 2
    return -scale * (expm1(shape * log(share)) / shape if shape else log(share))


def gamma(share: float, mean: float, mean_log: float) -> float:
    """shape = (3 - q + sqrt((q - 3)^2 + 24 q)) / (12 q), q = ln m - mean(ln x); scale = m / shape."""
    spread = log(mean) - mean_log
    if spread <= LEAST_SPREAD:
        return mean
    shape = (3 - spread + sqrt((spread - 3) ** 2 + 24 * spread)) / (12 * spread)
    return mean / shape * upper_gamma_quantile(shape, share)


def upper_gamma_quantile(shape: float, share: float) -> float:
    """x with Q(shape, x) = share, by bisection."""

    def is_below(x: float) -> bool:
        pair = torch.tensor([shape, x], dtype=torch.float64)
        return float(gammaincc(pair[0], pair[1])) > share

    low, high = 0.0, shape + 1.0
    while is_below(high):
        high *= 2
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_below(middle) else (low, middle)
    return high


# --- fits of what is there --------------------------------------------------------------------------

Fit = Callable[[Magnitudes, float], float]
"""The threshold that this share of the magnitudes should reach."""


def fit_exponential(magnitudes: Magnitudes, share: float) -> float:
    return exponential(share, magnitudes.mean())


def fit_pareto(magnitudes: Magnitudes, share: float) -> float:
    mean = magnitudes.mean()
    variance = unbiased_variance(mean, magnitudes.mean_square(), magnitudes.n)
    return pareto(share, mean, variance)


def fit_gamma(magnitudes: Magnitudes, share: float) -> float:
    """To those that are not 0, of which the same number is a larger share."""
    mean_log, count = magnitudes.mean_log()
    if share * magnitudes.n >= count:
        return 0.0
    return gamma(share * magnitudes.n / count, magnitudes.mean() * magnitudes.n / count, mean_log)


FIRST_FITS: dict[Distribution, Fit] = {
    "exponential": fit_exponential,
    "pareto": fit_pareto,
    "gamma": fit_gamma,
}


class Sidco(EstimatingSparsifier):
    """Stage 1 fits |a| and takes the threshold that a share r_1 exceeds; stage m fits what exceeds the last
    threshold, shifted by its smallest, and takes r_m: r_1 r_2 ... r_M = d, r_2 = ... = r_M. With one stage
    r_1 = d.

    Abdelmoniem et al. 2021, arXiv 2101.10761, algorithm 1. The published code divides a by its norm first,
    which changes nothing but rounding. It fits gamma to zeros as well, as if they were 2e-16, and that ruins
    the fit; here they are left out. Its driver cuts what it has gathered into W equal pieces, though the
    workers' counts differ; here each message is added as long as it is. Its default is one stage, whose
    density falls to zero under error feedback; stages: 1 restores it.
    """

    Settings: ClassVar[type[Named]] = SidcoSettings
    state_names = ("num_stages", "num_steps", "achieved")

    def __init__(
        self, config: SidcoSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout)
        self.stages, self.first_ratio = config.stages, config.first_ratio
        self._first_fit = FIRST_FITS[config.distribution]
        self._next_fit = fit_exponential if config.distribution == "exponential" else fit_pareto
        self.num_stages = config.stages if isinstance(config.stages, int) else 1
        self.num_steps = 0
        self.achieved = 0.0
        """The sum of selected / (d n) since the number of stages was looked at."""

    def shares(self) -> list[float]:
        """r_1, ..., r_M."""
        density, first = self.target_density, self.first_ratio
        if density >= first:
            return [density]
        if self.stages == "fixed_ratio":
            others = ceil(log(density / first) / log(first))
            return [first] * others + [density / first**others]
        if self.num_stages == 1:
            return [density]
        others = self.num_stages - 1
        return [first] + [(density / first) ** (1 / others)] * others

    def estimate(self, magnitudes: Magnitudes, k: int) -> float:
        first, *others = self.shares()
        threshold = self._first_fit(magnitudes, first)
        for share in others:
            _, exceeding = magnitudes.reaching(threshold)
            if not len(exceeding):
                break
            least = float(exceeding.min())
            threshold = least + self._next_fit(Magnitudes(exceeding - least), share)
        return threshold

    def select_among(self, send: Tensor, candidates: Magnitudes) -> Tensor:
        if self.stages == "adaptive":
            self._adapt()
        indices = super().select_among(send, candidates)
        self.num_steps += 1
        self.achieved += len(indices) / self.n / self.target_density
        return indices

    def _adapt(self) -> None:
        if self.num_steps == 0 or self.num_steps % INTERVAL_STEPS:
            return
        mean = self.achieved / INTERVAL_STEPS
        wanted = self.num_stages - (mean > MOST_OVER) + (mean < MOST_UNDER)
        self.num_stages = min(max(wanted, 1), max(1, ceil(log2(1 / self.target_density))))
        self.achieved = 0.0

    def metrics(self) -> dict[str, float | Tensor]:
        return {**super().metrics(), "stages": self.num_stages}

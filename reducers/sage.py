"""SAGE: a threshold that follows, every step, a target density."""

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.sparse import (
    SparsifierSettings,
    Threshold,
    ThresholdLaw,
    ThresholdSparsifier,
    resolve_threshold,
)
from sage.config import Named
from sage.draws import Draws, modulo
from sage.interfaces import Seeds, Slot

SAMPLING_ERROR = 0.05
"""Slovin's margin of error: n / (1 + n 0.05^2) elements are sampled, at most 400. Value of the published
code."""
GAMMA_LOW, GAMMA_HIGH = 0.95, 1.05
"""The correction's factors, where the examined density is below a tenth of the target, or above ten times
it."""


class SageSettings(SparsifierSettings):
    name: Literal["sage"] = "sage"
    threshold: Threshold = "auto"
    """The initial threshold, used unchanged in the first step; auto: 1 / (2 sqrt k), k = density n."""
    sampling: Literal["uniform", "by_tensor"] = "uniform"
    """uniform over the elements; by_tensor (the published code): a tensor first, then an element of it,
    which favours small tensors."""
    terms: Literal["alpha", "alpha_beta", "all"] = "all"
    """Which factors the threshold is multiplied by at every step; all: alpha, beta and gamma. The others are
    the paper's ablation."""


class Sampler:
    """Draws Slovin's number of elements of a flat vector, with replacement, in one gather."""

    def __init__(self, layout: list[Slot], sampling: str, seed: int, device: torch.device) -> None:
        self.n = layout[-1].stop
        self.size = max(1, int(self.n / (1 + self.n * SAMPLING_ERROR**2)))
        self.generator = Draws(seed)
        self._device = device
        self._starts: Tensor | None = None
        self._sizes: Tensor | None = None
        if sampling == "by_tensor":
            filled = [slot for slot in layout if slot.size]
            self._starts = torch.tensor([slot.start for slot in filled], device=device)
            self._sizes = torch.tensor([slot.size for slot in filled], device=device)

    def indices(self) -> Tensor:
        """(size,) int64."""
        if self._starts is None or self._sizes is None:
            return self._draw(self.n)
        tensors = self._draw(len(self._starts))  # (size,)
        fractions = self.generator.uniform((self.size,), self._device)
        return self._starts[tensors] + (fractions * self._sizes[tensors]).long()

    def _draw(self, high: int) -> Tensor:
        return modulo(self.generator.bits(self.size, self._device), high)


class SageLaw(ThresholdLaw):
    """The exact controller of SAGE: Yoon and Oh, J. Supercomputing 2023, doi 10.1007/s11227-023-05120-7.

    From the sampled mean s of |a| and the target d, at every step but the first:

        alpha = s / s_prev
        d_exam = #{|a_j| >= lambda alpha} / n
        beta = 2 / (1 + exp(d - d_exam))
        gamma = 0.95 if d_exam < 0.1 d, 1.05 if d_exam > 10 d, else 1
        lambda <- lambda alpha beta gamma

    Where the paper defines nothing: s_prev = 0 gives alpha = 1; s = 0 or not finite leaves lambda as it is,
    and a non-finite s is not remembered; lambda stays in the positive finite numbers. A term that the
    settings leave out is 1. All terms are scalars on the device, so no step of the controller waits for it.
    """

    state_names = ("lam", "previous_mean", "started", "generator")
    worker_generators = ("generator",)

    def __init__(self, config: SageSettings, layout: list[Slot], seed: int, device: torch.device) -> None:
        self._first = config.threshold
        self._uses_beta, self._uses_gamma = config.terms != "alpha", config.terms == "all"
        self.sampler = Sampler(layout, config.sampling, seed, device)
        self.generator = self.sampler.generator
        self.lam = torch.zeros((), device=device)
        self.previous_mean = torch.zeros((), device=device)
        self.started = False
        zero, one = torch.zeros((), device=device), torch.ones((), device=device)
        self._usable = torch.zeros((), dtype=torch.bool, device=device)
        self._terms = {"alpha": one, "beta": one, "gamma": one, "density_exam": zero}
        self.aim(config.density)

    def aim(self, density: float) -> None:
        """The target; before the first step also the initial threshold, which the law then moves itself."""
        self.target = density
        # The least beta * gamma of any examined density (beta's is at 0; gamma may be 0.95; one that is
        # left out is 1), with room for rounding.
        self._least_correction = GAMMA_LOW * self._beta(torch.zeros(())).item() * (1 - 1e-6)
        if not self.started:
            self.lam.fill_(resolve_threshold(self._first, density, self.sampler.n))

    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        indices = self.sampler.indices()
        sample = send.index_select(0, indices)  # (size,)
        if grad is not None:
            sample.add_(grad.index_select(0, indices))
        return self.begin(sample.abs().mean().float()).to(send.dtype)

    def begin(self, sampled_mean: Tensor) -> Tensor:
        """Take this step's sampled mean; return the lowest threshold that it can lead to."""
        finite = sampled_mean.isfinite()
        self._usable = finite & (sampled_mean > 0) if self.started else torch.zeros_like(finite)
        ratio = sampled_mean / self.previous_mean
        # alpha = s / s_prev
        self._terms["alpha"] = torch.where(self._usable & (self.previous_mean > 0), ratio, 1.0)
        self.previous_mean = torch.where(finite, sampled_mean, self.previous_mean)
        self.started = True
        scaled = self.lam * self._terms["alpha"]
        return torch.where(self._usable, _positive(scaled) * self._least_correction, self.lam)

    def threshold(self, magnitudes: Tensor, n: int) -> Tensor:
        scaled = self.lam * self._terms["alpha"]
        # d_exam = #{|a_j| >= lambda alpha} / n
        exam = (magnitudes >= scaled.to(magnitudes.dtype)).sum().double() / n
        ratio = exam / self.target
        beta = torch.where(self._usable & self._uses_beta, self._beta(exam).float(), 1.0)
        gamma = torch.where(ratio < 0.1, GAMMA_LOW, torch.where(ratio > 10, GAMMA_HIGH, 1.0)).float()
        gamma = torch.where(self._usable & self._uses_gamma, gamma, 1.0)
        # lambda <- lambda alpha beta gamma
        self.lam = _positive(scaled * beta * gamma)
        self._terms.update(beta=beta, gamma=gamma, density_exam=exam)
        return self.lam.to(magnitudes.dtype)

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {"threshold": self.lam, **self._terms}

    def _beta(self, exam: Tensor) -> Tensor:
        return 2 / (1 + torch.exp(self.target - exam))


def _positive(threshold: Tensor) -> Tensor:
    limits = torch.finfo(threshold.dtype)
    return threshold.clamp(limits.tiny, limits.max)


class Sage(ThresholdSparsifier):
    """Selects |a_j| >= lambda; lambda follows SageLaw. Thresholds differ between workers. NaN is never
    sent."""

    Settings: ClassVar[type[Named]] = SageSettings

    def __init__(
        self, config: SageSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, SageLaw(config, layout, seeds.worker, device))

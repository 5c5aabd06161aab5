"""Hard threshold: every element whose magnitude reaches a constant."""

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
from sage.interfaces import Seeds, Slot


class HardThresholdSettings(SparsifierSettings):
    name: Literal["threshold"] = "threshold"
    threshold: Threshold = "auto"
    """The constant; auto: 1 / (2 sqrt k), k = density n. Beside a number the density is a label only."""


class ConstantLaw(ThresholdLaw):
    """The same threshold at every step."""

    def __init__(self, threshold: float, device: torch.device) -> None:
        self._value = torch.tensor(threshold, device=device)

    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        return self._value.to(send.dtype)

    def threshold(self, magnitudes: Tensor, n: int) -> Tensor:
        return self._value.to(magnitudes.dtype)

    def metrics(self) -> dict[str, float]:
        return {"threshold": self._value.item()}


class HardThreshold(ThresholdSparsifier):
    """S = {j: |a_j| >= lambda}. An absolute compressor: ||a - C(a)||^2 <= n lambda^2. NaN is never sent.

    Strom 2015; Sahu et al. 2021, arXiv 2108.00951, algorithm 1.
    """

    Settings: ClassVar[type[Named]] = HardThresholdSettings

    def __init__(
        self, config: HardThresholdSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        threshold = resolve_threshold(config.threshold, config.density, layout[-1].stop)
        super().__init__(config, layout, ConstantLaw(threshold, device))

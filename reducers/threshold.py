"""Hard threshold: every element whose magnitude reaches a constant."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

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
    """The constant; auto: 1 / (2 sqrt k), k = density n, which follows the density where it is scaled. Beside
    a number the density is only a label."""


class ConstantLaw(ThresholdLaw):
    """The same threshold at every step of one density."""

    def __init__(self, config: HardThresholdSettings, n: int, device: torch.device) -> None:
        self._setting, self._n = config.threshold, n
        self._value = torch.zeros((), device=device)
        self.aim(config.density)

    def aim(self, density: float) -> None:
        self._value.fill_(resolve_threshold(self._setting, density, self._n))

    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        return self._value.to(send.dtype)

    def threshold(self, magnitudes: Tensor, n: int) -> Tensor:
        return self._value.to(magnitudes.dtype)

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {"threshold": self._value}


class HardThreshold(ThresholdSparsifier):
    """S = {j: |a_j| >= lambda}. An absolute compressor: ||a - C(a)||^2 <= n lambda^2. NaN is never sent.

    Strom 2015; Sahu et al. 2021, arXiv 2108.00951, algorithm 1.
    """

    Settings: ClassVar[type[Named]] = HardThresholdSettings

    @classmethod
    def why_fixed(cls, config: Any) -> str:
        return "" if config.threshold == "auto" else f"threshold {config.threshold:g} decides what is sent"

    def __init__(
        self, config: HardThresholdSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, ConstantLaw(config, layout[-1].stop, device))

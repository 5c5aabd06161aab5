"""A density that can be set: for every reducer that selects a share of the elements."""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sage.config import Named
from sage.interfaces import Reducer


class DensitySettings(Named):
    density: float = Field(default=0.01, gt=0, le=1)
    """The target: elements a worker selects / n. What it is in each step, the section scaling may say."""

    @model_validator(mode="before")
    @classmethod
    def _the_schedule_has_moved(cls, given: Any) -> Any:
        if isinstance(given, dict) and "density_schedule" in given:
            raise ValueError(
                "density_schedule is a section of its own now: scaling: {name: schedule, warmup_epochs: E}, "
                "or densities: [...]"
            )
        return given


class DensityReducer(Reducer):
    """A reducer that selects a share of the elements, which can be set."""

    def __init__(self, config: DensitySettings) -> None:
        self.config = config
        self.target_density = config.density
        self._sent = torch.empty(0, dtype=torch.int64)  # of the last reduce

    @classmethod
    def is_sparsifier(cls, config: Any) -> bool:
        return True

    @classmethod
    def why_fixed(cls, config: Any) -> str:
        return ""

    def sent_indices(self) -> Tensor:
        return self._sent

    def set_density(self, density: float) -> None:
        if density != self.target_density:
            self.aim(density)

    def aim(self, density: float) -> None:
        """Select this share from the next step on. A subclass prepares here what depends on the density."""
        self.target_density = density

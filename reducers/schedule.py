"""A density that falls over the first epochs: for every reducer that has one."""

from typing import Annotated, Any, Self

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor

from sage.config import Named, Settings
from sage.interfaces import Progress, Reducer


class DensitySchedule(Settings):
    """A density per epoch, until the target is reached. Lin et al. 2018, arXiv 1712.01887, section 3.3."""

    warmup_epochs: int = Field(default=0, ge=0)
    """E: in epoch e < E the density is max(c^(e+1), d), c = d^(1/(E+1)), d the target."""
    densities: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], Strict(False)] = ()
    """Or a list: the density of epoch 0, 1, ...; after its end the target."""

    @model_validator(mode="after")
    def _is_one_of_the_two(self) -> Self:
        if self.warmup_epochs and self.densities:
            raise ValueError(f"expected warmup_epochs or densities, got both ({self.warmup_epochs} epochs)")
        return self

    def at(self, epoch: float, target: float) -> float:
        """The density of a (fractional) epoch; the target where nothing else is scheduled."""
        e = int(epoch)
        if e < len(self.densities):
            return self.densities[e]
        if e < self.warmup_epochs:  # d_e = max(c^(e+1), d): the first is never below a target in (0, 1]
            return float(target ** ((e + 1) / (self.warmup_epochs + 1)))
        return target


class DensitySettings(Named):
    density: float = Field(default=0.01, gt=0, le=1)
    """The target: elements a worker selects / n."""
    density_schedule: DensitySchedule = DensitySchedule()
    """Larger densities at first; by default the target from the first step on."""


class ScheduledReducer(Reducer):
    """A reducer that selects a share of the elements; which share, a schedule may say."""

    def __init__(self, config: DensitySettings) -> None:
        self.config = config
        self.target_density = config.density
        self._sent = torch.empty(0, dtype=torch.int64)  # of the last reduce

    @classmethod
    def is_sparsifier(cls, config: Any) -> bool:
        return True

    def sent_indices(self) -> Tensor:
        return self._sent

    def begin_step(self, progress: Progress) -> None:
        if self.config.density_schedule == DensitySchedule():
            return  # a loop without epochs has no progress.epoch
        density = self.config.density_schedule.at(progress.epoch, self.config.density)
        if density != self.target_density:
            self.aim(density)

    def aim(self, density: float) -> None:
        """Select this share from the next step on. A subclass prepares here what depends on the density."""
        self.target_density = density

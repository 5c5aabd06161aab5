"""Scaling: what the density is in each step. An Exchange asks its rule once a step, before the reducer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, Strict, model_validator
from torch import Tensor

from sage.components import ComponentTable
from sage.config import Named
from sage.exchange.late import LateValues, stream_for_reading
from sage.interfaces import Communicator, Progress, Reducer, Stateful

Density = Annotated[float, Field(gt=0, le=1)]
BuildDense = Callable[[str], Reducer]
"""Makes a reducer that averages exactly, of a dtype: float32 or bfloat16."""


class ConstantSettings(Named):
    name: Literal["constant"] = "constant"


class ScheduleSettings(Named):
    """One of the three."""

    name: Literal["schedule"] = "schedule"
    warmup_epochs: int = Field(default=0, ge=0)
    """E: in epoch e < E the density is max(c^(e+1), d), c = d^(1/(E+1)), d being the reducer's density."""
    densities: Annotated[tuple[Density, ...], Strict(False)] = ()
    """The density of epoch 0, 1, ...; after the list's end the reducer's."""
    rising_epochs: float = Field(default=0.0, ge=0)
    """E: the density rises at an even pace over E epochs, by the factor rising_ratio, with the reducer's
    density as its mean; then it stays."""
    rising_ratio: float = Field(default=4.0, ge=1)
    """How many times as large the density is after the rise as before it."""

    @model_validator(mode="after")
    def _is_one_of_the_three(self) -> Self:
        given = [name for name in ("warmup_epochs", "densities", "rising_epochs") if getattr(self, name)]
        if len(given) != 1:
            expected = "one of warmup_epochs, densities and rising_epochs"
            raise ValueError(f"expected {expected}, got {' and '.join(given) or 'none'}")
        return self


class BoundedSettings(Named):
    """The settings of a rule that finds the density itself."""

    lowest: Density = 1e-4
    """The least density."""
    highest: Density = 0.1
    """The greatest density."""

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.lowest > self.highest:
            raise ValueError(f"lowest: expected at most highest, {self.highest:g}, got {self.lowest:g}")
        return self


class ErrorSettings(BoundedSettings):
    name: Literal["error"] = "error"
    share: float = Field(default=0.5, gt=0, lt=1)
    """Of ||send||^2, what a worker wants to send: how much the part that it sends is to keep."""


class Scaling(Stateful, ABC):
    """Sets the density of a reducer, step by step; the same one on all workers."""

    Settings: ClassVar[type[Named]]
    serves_buckets: ClassVar[bool] = True
    """Whether each of several exchanges of a step may have one."""

    def __init__(
        self, config: Any, reducer: Reducer, build_dense: BuildDense, *, device: torch.device
    ) -> None:
        """reducer: whose density is set; what it has now is the configuration's."""
        self.reducer = self.current = reducer
        """current: which reducer makes the step, the one that is scaled or a dense one."""

    @classmethod
    def check(cls, config: Named, reducer: type[Reducer], reducer_config: Named, simulated: bool) -> None:
        """Raise ValueError, in one line, where this rule cannot work with these. simulated: the workers take
        turns in one process."""
        if reason := reducer.why_fixed(reducer_config):
            raise ValueError(f"scaling.name: expected constant, since {reason}, got {config.name}")

    @abstractmethod
    def begin_step(self, progress: Progress, comm: Communicator) -> None:
        """Set the density of the step that begins."""

    def watched(self, comm: Communicator) -> Communicator:
        """The communicator of this step: comm, or one that is measured."""
        return comm

    def end_step(self, comm: Communicator) -> None:
        """Called when the step's mean is there."""

    def notes(self) -> list[str]:
        """What the user of this rule should know, a line each; said once, before training."""
        return []

    def metrics(self) -> Mapping[str, float]:
        """Of the last step, beside the reducer's; asked for on logging steps only."""
        return {}


class ConstantScaling(Scaling):
    """The reducer's own density, in every step."""

    Settings = ConstantSettings

    @classmethod
    def of(cls, reducer: Reducer) -> Self:
        def build_dense(dtype: str) -> Reducer:
            raise NotImplementedError

        return cls(ConstantSettings(), reducer, build_dense, device=torch.device("cpu"))

    @classmethod
    def check(cls, config: Named, reducer: type[Reducer], reducer_config: Named, simulated: bool) -> None:
        """Works with every reducer."""

    def begin_step(self, progress: Progress, comm: Communicator) -> None:
        """Nothing changes."""


class ScheduleScaling(Scaling):
    """A density that depends on the epoch alone. d is the reducer's density.

    warmup_epochs, densities: Lin et al. 2018, arXiv 1712.01887, section 3.3. rising_epochs E, with the ratio
    r: d(e) = 2 d (1 + (r - 1) min(e / E, 1)) / (1 + r), at most 1; e is a fraction. Its mean over the E
    epochs is d, so that as much is sent as at a constant density.
    """

    Settings = ScheduleSettings

    def __init__(
        self, config: ScheduleSettings, reducer: Reducer, build_dense: BuildDense, *, device: torch.device
    ) -> None:
        super().__init__(config, reducer, build_dense, device=device)
        self.config, self._own = config, reducer.target_density

    def begin_step(self, progress: Progress, comm: Communicator) -> None:
        self.reducer.set_density(self.at(progress.epoch))

    def at(self, epoch: float) -> float:
        """The density of a (fractional) epoch; the reducer's own where nothing else is scheduled."""
        config, own = self.config, self._own
        if config.rising_epochs:
            past = min(epoch / config.rising_epochs, 1.0)
            return min(1.0, 2 * own * (1 + (config.rising_ratio - 1) * past) / (1 + config.rising_ratio))
        e = int(epoch)
        if e < len(config.densities):
            return config.densities[e]
        if e < config.warmup_epochs:  # d_e = max(c^(e+1), d): the first is never below a target in (0, 1]
            return float(own ** ((e + 1) / (config.warmup_epochs + 1)))
        return own


class ErrorScaling(Scaling):
    """The smallest density whose sent part keeps a share phi of ||send||^2, between bounds.

        d <- d g,  g = the workers' mean of 1 + (phi ||send||^2 - ||sent||^2) / (k tau), each within [1/2, 2]

    tau is the square of the smallest magnitude that is sent, so this is Newton's method for the k at which
    the k largest have the share phi (see Sparsifier._growth). The share of the energy that a compressor keeps
    is alpha in Khirirat et al. 2020, "Communication efficient sparsification for large scale machine
    learning", who choose k by it; the control of k by a step of Newton's method is our own.

    g is measured after the density of a step is set, and applies to the next step. It travels in 4 bytes more
    of a message that is sent anyway; measuring it reads send once more, 4 n bytes. On a GPU the host reads
    it before the next step's selection, whose size it must know. Starts at the reducer's density.
    """

    Settings = ErrorSettings
    state_names = ("density",)

    def __init__(
        self, config: ErrorSettings, reducer: Reducer, build_dense: BuildDense, *, device: torch.device
    ) -> None:
        super().__init__(config, reducer, build_dense, device=device)
        self.config = config
        self._density = clamp(reducer.target_density, config.lowest, config.highest)
        self._measured: tuple[LateValues, Communicator] | None = None
        self._stream = stream_for_reading(device)
        reducer.measure_growth(config.share)

    @classmethod
    def check(cls, config: Named, reducer: type[Reducer], reducer_config: Named, simulated: bool) -> None:
        super().check(config, reducer, reducer_config, simulated)
        if not reducer.selects_largest:
            expected = "expected a reducer that selects by magnitude, such as topk"
            raise ValueError(f"scaling.name: error: {expected}, got {reducer_config.name}")

    @property
    def density(self) -> float:
        """Of the next step."""
        if self._measured is not None:
            (growths, comm), self._measured = self._measured, None
            factors = growths.read(comm).tolist()  # host synchronisation, of the step before
            mean = sum(factors) / len(factors)  # in rank order: the same on every kind of processor
            self._density = clamp(self._density * mean, self.config.lowest, self.config.highest)
        return self._density

    @density.setter
    def density(self, density: float) -> None:
        self._density, self._measured = density, None

    def begin_step(self, progress: Progress, comm: Communicator) -> None:
        self.reducer.set_density(self.density)

    def end_step(self, comm: Communicator) -> None:
        growths = self.reducer.growths
        assert isinstance(growths, Tensor)
        self._measured = LateValues(growths, self._stream), comm


def clamp(value: float, lowest: float, highest: float) -> float:
    return min(max(value, lowest), highest)


SCALINGS: "ComponentTable[Scaling]" = ComponentTable(
    "sage.exchange.scaling:Scaling",
    {
        "constant": "sage.exchange.scaling:ConstantScaling",
        "schedule": "sage.exchange.scaling:ScheduleScaling",
        "error": "sage.exchange.scaling:ErrorScaling",
        "time": "sage.exchange.time_scaling:TimeScaling",
    },
)

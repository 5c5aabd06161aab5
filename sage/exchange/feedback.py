"""Error feedback: what was not sent is added to the next gradient. An Exchange calls it, in the right
order."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sage.config import Named
from sage.interfaces import Progress, Reducer, Stateful


class NoFeedbackSettings(Named):
    name: Literal["none"] = "none"


class ResidualSettings(Named):
    name: Literal["residual"] = "residual"
    decay: float = Field(default=1.0, gt=0, le=1)
    """What the memory is multiplied by before each step: below 1 old residuals fade."""
    lr_correction: bool = False
    """Rescale the memory when the learning rate changes, so that what waits moves the weights as much as it
    would have moved them at its own step's learning rate."""


class LoCoSettings(Named):
    name: Literal["loco"] = "loco"
    decay: float = Field(default=0.8, ge=0, lt=1)
    """beta: what is kept of the average of past errors in a step; 0 is residual, but for the resets."""
    reset_steps: int = Field(default=1024, ge=1)
    """The average starts again at 0 after so many steps."""


class MomentumSettings(Named):
    name: Literal["momentum"] = "momentum"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """mu; the optimizer's own momentum must be 0."""
    nesterov: bool = False
    """Nesterov's momentum."""
    masking: bool = True
    """Momentum factor masking: the momentum of what was sent starts again at 0, since its delayed sum would
    push on in an old direction. false: momentum as at density 1."""


class Feedback(Stateful, ABC):
    """A memory (n,) of what this worker has not sent, and how the next gradient joins it."""

    Settings: ClassVar[type[Named]]
    remembers: ClassVar[bool] = True
    """Whether what was not sent is used again; else memory is but scratch space."""

    def __init__(self, config: Any, like: Tensor) -> None:
        """like (n,): a tensor of the flat gradient's size, dtype and device."""
        self.memory = torch.zeros_like(like)  # (n,)

    @classmethod
    def check(cls, reducer: type[Reducer], reducer_config: Named, optimizer: Named) -> None:
        """Raise ValueError, in one line, where this feedback cannot work with these."""
        if not reducer.takes_feedback:
            name, own = reducer_config.name, cls.Settings.model_fields["name"].default
            raise ValueError(
                f"feedback.name: expected none, since {name} leaves no error to feed back, got {own}"
            )

    def begin_step(self, progress: Progress) -> None:
        """Called before each step."""

    @abstractmethod
    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        """Make memory what this worker wants to send. The last addition goes through the reducer, which may
        scan the sum in the same pass. grad (n,) is what reduce gets as mean: nothing but the reducer changes
        it."""

    def after_reduce(self, reducer: Reducer) -> None:
        """Called when memory holds what was not sent."""


class NoFeedback(Feedback):
    """Forgets what was not sent."""

    Settings = NoFeedbackSettings
    remembers = False

    @classmethod
    def check(cls, reducer: type[Reducer], reducer_config: Named, optimizer: Named) -> None:
        """Works with every reducer and optimizer."""

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        self.memory.zero_()
        reducer.accumulate(self.memory, grad, grad_is_mean=True)


class Residual(Feedback):
    """a = g + e; send C(a); e = a - C(a). Stich et al. 2018, arXiv 1809.07599; Karimireddy et al. 2019,
    1901.09847.

    decay b: a = g + b e. lr_correction: a = g + b (lr_{t-1} / lr_t) e, which is the memory in units of the
    parameters (1901.09847, algorithm 1) written in units of the gradient (Zheng et al. 2019, 1905.10936). A
    step with a learning rate of 0 leaves the memory unscaled: it moves nothing, and the next positive rate
    is compared with the last positive one.
    """

    Settings = ResidualSettings
    state_names = ("memory", "previous_lr")
    element_names = held_names = ("memory",)

    def __init__(self, config: ResidualSettings, like: Tensor) -> None:
        super().__init__(config, like)
        self.decay, self.lr_correction = config.decay, config.lr_correction
        self.previous_lr = 0.0  # the last positive one; 0: none yet
        self._scale = config.decay

    def begin_step(self, progress: Progress) -> None:
        self._scale = self.decay
        if self.lr_correction and progress.lr > 0:
            self._scale *= self.previous_lr / progress.lr if self.previous_lr > 0 else 1.0
            self.previous_lr = progress.lr

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        if self._scale != 1:
            self.memory.mul_(self._scale)
        reducer.accumulate(self.memory, grad, grad_is_mean=True)


class LoCo(Feedback):
    """h = g + e; send C(h); e = beta e + (1 - beta) (h - C(h)): a moving average of the errors, of which a
    quantiser's single ones are noise.

    Xie et al. 2024 (LoCo), arXiv 2407.04480, with e in float32 instead of 8 bits. What leaves the average is
    never sent, so that what was sent and what waits do not add up to what was given.
    """

    Settings = LoCoSettings
    state_names = ("memory", "count")
    element_names = held_names = ("memory",)

    def __init__(self, config: LoCoSettings, like: Tensor) -> None:
        super().__init__(config, like)
        self.decay, self.reset_steps = config.decay, config.reset_steps
        self.count = 0
        """Steps since the average was 0."""
        self._before = torch.zeros_like(like)  # e of the step before

    def begin_step(self, progress: Progress) -> None:
        if self.count == self.reset_steps:
            self.memory.zero_()
            self.count = 0
        self.count += 1

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        self._before.copy_(self.memory)
        reducer.accumulate(self.memory, grad, grad_is_mean=True)

    def after_reduce(self, reducer: Reducer) -> None:
        # e = (h - C(h)) + beta (e - (h - C(h)))
        self.memory.lerp_(self._before, self.decay)


class Momentum(Feedback):
    """Momentum before the exchange: u = mu u + g; v = v + u; what is sent leaves v, and its u becomes 0.

    Nesterov's form: u = mu (u + g); v = v + u + g. Lin et al. 2018 (DGC), arXiv 1712.01887, sections 3.1 and
    3.2; v is the memory. The published code lets the optimizer's momentum act for the weight decay alone;
    here weight decay has none. With masking, elements that are sent at every step (density 1, the first
    epochs of a density schedule) have no momentum.
    """

    Settings = MomentumSettings
    state_names = ("memory", "velocity")
    element_names = held_names = state_names

    def __init__(self, config: MomentumSettings, like: Tensor) -> None:
        super().__init__(config, like)
        self.config = config
        self.velocity = torch.zeros_like(like)  # u (n,)

    @classmethod
    def check(cls, reducer: type[Reducer], reducer_config: Named, optimizer: Named) -> None:
        super().check(reducer, reducer_config, optimizer)
        name, own = reducer_config.name, getattr(optimizer, "momentum", None)
        if not reducer.is_sparsifier(reducer_config):
            expected = "expected a reducer that sends selected elements, such as topk"
            raise ValueError(f"feedback.name: momentum: {expected}, got {name}")
        if own is None:
            raise ValueError(f"optimizer.name: expected sgd with feedback momentum, got {optimizer.name}")
        if own != 0:
            expected = "expected 0 (and nesterov: false) with feedback momentum, which has its own"
            raise ValueError(f"optimizer.momentum: {expected}, got {own:g}")

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        if self.config.nesterov:
            # u = mu (u + g);  v = v + g, then + u
            self.velocity.add_(grad).mul_(self.config.momentum)
            self.memory.add_(grad)
        else:
            # u = mu u + g
            torch.add(grad, self.velocity, alpha=self.config.momentum, out=self.velocity)
        # v = v + u
        reducer.accumulate(self.memory, self.velocity)

    def after_reduce(self, reducer: Reducer) -> None:
        if self.config.masking:
            self.velocity.index_fill_(0, reducer.sent_indices(), 0)  # sorts nothing, unlike an assignment


FEEDBACKS: dict[str, type[Feedback]] = {
    "none": NoFeedback,
    "residual": Residual,
    "loco": LoCo,
    "momentum": Momentum,
}

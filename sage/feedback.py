"""Error feedback: what was not sent is added to the next gradient.

feedback.compensate(reducer, grad)            # memory: this worker's compensated gradient
reducer.reduce(feedback.memory, grad, comm)   # grad: the mean over workers; memory: what was not sent
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sage.config import Named
from sage.interfaces import Reducer, Stateful


class NoFeedbackSettings(Named):
    name: Literal["none"] = "none"


class ResidualSettings(Named):
    name: Literal["residual"] = "residual"


class Residual(Stateful):
    """a = g + e; send C(a); e = a - C(a). Stich et al. 2018, arXiv 1809.07599; Karimireddy et al. 2019,
    1901.09847."""

    Settings: ClassVar[type[Named]] = ResidualSettings
    state_names: tuple[str, ...] = ("memory",)

    def __init__(self, like: Tensor) -> None:
        """like (n,): a tensor of the flat gradient's size, dtype and device."""
        self.memory = torch.zeros_like(like)  # (n,)

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        """memory += grad, through the reducer, which may scan the sum in the same pass."""
        reducer.accumulate(self.memory, grad)


class NoFeedback(Residual):
    """What was not sent is forgotten."""

    Settings: ClassVar[type[Named]] = NoFeedbackSettings
    state_names = ()

    def compensate(self, reducer: Reducer, grad: Tensor) -> None:
        self.memory.zero_()
        super().compensate(reducer, grad)


FEEDBACKS: dict[str, type[Residual]] = {"none": NoFeedback, "residual": Residual}

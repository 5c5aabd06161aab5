"""signSGD with majority vote: one bit per element."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.kernels.signs import num_bytes
from reducers.vote import vote
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot


class SignSGDSettings(Named):
    name: Literal["signsgd"] = "signsgd"


class SignSGD(Reducer):
    """mean = sign(sum_i sign(g_i)), sign(0) = +1: a direction, so the learning rate is each element's step.

    Bernstein et al. 2018, arXiv 1810.05291, algorithm 1. Nothing is left in send: a vote does not estimate
    the gradient, so there is no error to feed back. NaN votes -1.
    """

    takes_feedback: ClassVar[bool] = False
    Settings: ClassVar[type[Named]] = SignSGDSettings

    def __init__(
        self, config: SignSGDSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n = layout[-1].stop

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        vote(send, mean, comm)
        send.zero_()

    def expected_payload_bytes(self, world_size: int) -> int:
        return num_bytes(self.n) if world_size > 1 else 0

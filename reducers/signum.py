"""Signum: the majority vote of the workers' momenta, one bit per element."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.kernels.signs import num_bytes
from reducers.vote import vote
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot


class SignumSettings(Named):
    name: Literal["signum"] = "signum"
    beta: float = Field(default=0.9, ge=0, lt=1)
    """The momentum's decay; 0 is signsgd. The optimizer's own momentum comes on top: set one of the two."""


class Signum(Reducer):
    """m_i = beta m_i + (1 - beta) g_i; mean = sign(sum_i sign(m_i)), sign(0) = +1.

    Bernstein et al. 2018, arXiv 1802.04434, algorithm 2, with the vote of 1810.05291, algorithm 1. Nothing is
    left in send. A NaN stays in this worker's momentum and votes -1.
    """

    takes_feedback: ClassVar[bool] = False
    Settings: ClassVar[type[Named]] = SignumSettings
    state_names = ("momentum",)
    element_names = held_names = state_names

    def __init__(
        self, config: SignumSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n = layout[-1].stop
        self.beta = config.beta
        self.momentum = torch.zeros(self.n, device=device)  # (n,)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        # m = m + (1 - beta) (g - m)
        self.momentum.lerp_(send.to(self.momentum.dtype), 1 - self.beta)
        vote(self.momentum, mean, comm)
        send.zero_()

    def expected_payload_bytes(self, world_size: int) -> int:
        return num_bytes(self.n) if world_size > 1 else 0

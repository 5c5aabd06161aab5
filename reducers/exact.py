"""The exact mean: the dense baseline."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot


class ExactSettings(Named):
    name: Literal["exact"] = "exact"


class Exact(Reducer):
    """mean = sum_i send_i / W by one all-reduce of the flat gradient; nothing is left in send."""

    Settings: ClassVar[type[Named]] = ExactSettings

    def __init__(
        self, config: ExactSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n = layout[-1].stop

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        mean.copy_(send)
        comm.all_reduce(mean)
        if comm.world_size > 1:
            mean.div_(comm.world_size)
        send.zero_()

    def expected_payload_bytes(self, world_size: int) -> int:
        return 4 * self.n if world_size > 1 else 0

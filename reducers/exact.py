"""The exact mean, in the gradient's own precision or in half of it: the dense baselines."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.common import average, average_in_place
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot

HALVES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class ExactSettings(Named):
    name: Literal["exact"] = "exact"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What travels: the gradient as it is, or its elements rounded to 2 bytes each."""


class Exact(Reducer):
    """mean = sum_i send_i / W by one all-reduce of the flat gradient.

    In float32 nothing is left in send. In half precision each worker sends q_i = half(send_i / W), the
    all-reduce adds in that precision, and send_i - W q_i is left: under error feedback no rounding of a
    worker's own is lost, only that of the W - 1 additions. In float16 what is above 32752 is sent as
    32752, so that no sum overflows, and its rest stays in send. A NaN is sent, and stays.
    """

    Settings: ClassVar[type[Named]] = ExactSettings

    def __init__(
        self, config: ExactSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n, self.device = layout[-1].stop, device
        self._half: Tensor | None = None
        if config.dtype in HALVES:
            self._half = torch.empty(self.n, dtype=HALVES[config.dtype], device=device)  # (n,)
        self.leaves_nothing = self._half is None

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        if self._half is None:
            average(send, mean, comm)
            return
        # q = half(clamp(send) / W); half of what float16 holds, since q and its partial sums may round up
        limit = torch.finfo(torch.float16).max / 2
        held = torch.clamp(send, -limit, limit, out=mean) if self._half.dtype == torch.float16 else send
        self._half.copy_(torch.div(held, comm.world_size, out=mean))
        # send = send - W q
        send.sub_(mean.copy_(self._half), alpha=comm.world_size)
        comm.all_reduce(self._half)
        mean.copy_(self._half)

    def reduce_in_place(self, mean: Tensor, comm: Communicator) -> None:
        average_in_place(mean, comm)

    def sent_indices(self) -> Tensor:
        """All of them: for DGC's momentum, where a step of a sparsifier is dense."""
        return torch.arange(self.n, device=self.device)

    def expected_payload_bytes(self, world_size: int) -> int:
        bytes_each = 4 if self._half is None else self._half.element_size()
        return bytes_each * self.n if world_size > 1 else 0

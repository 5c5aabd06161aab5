"""CLT-k: one worker at a time says which elements all send."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.common import average_at
from reducers.largest import LargestSparsifier
from reducers.sparse import UnionSettings, target_count
from sage.config import Named
from sage.interfaces import Communicator, Place, Seeds, Slot


class CltKSettings(UnionSettings):
    name: Literal["clt_k"] = "clt_k"


class CltK(LargestSparsifier):
    """S = argtop_k |a_leader|, leader = t mod W, k = max(1, floor(density n)); mean = sum_i a_i / W at S.

    Chen et al. 2020, arXiv 2104.11125 (ScaleCom), equation 3: the cyclic local top-k. What is sent does not
    grow with W. ScaleCom's low-pass filter belongs to the error feedback, and is not here.
    """

    Settings: ClassVar[type[Named]] = CltKSettings
    state_names = (*LargestSparsifier.state_names, "num_steps")
    selects_largest = False  # but on the leader

    def __init__(
        self, config: CltKSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, device)
        self.num_steps = 0

    def places_in(self, layout: list[Slot]) -> list[tuple[int, int]]:
        return [(0, self.n)]

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        leader = self.num_steps % comm.world_size
        self.num_steps += 1
        # 1. The leader's k largest, for all.
        if comm.rank == leader:
            indices = self.select(send, Place(comm.rank, comm.world_size)).to(torch.int32)  # (k,)
        else:
            self._candidates = None
            count = target_count(self.target_density, self.n)
            # Overwritten, but by a leader that is only pretended (sage.exchange.echo).
            indices = torch.arange(count, dtype=torch.int32, device=send.device)
        comm.broadcast(indices, leader)
        # 2. Everybody's values there.
        self._gathered, self._sent = [indices], indices.long()
        average_at(self._sent, send, mean, comm, mean_is_zero=self._mean_is_zero)
        self._mean_is_zero = False
        self.density = len(indices) / self.n

    def expected_payload_bytes(self, world_size: int) -> int:
        return 8 * self.target_counts() if world_size > 1 else 0

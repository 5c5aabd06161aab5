"""Truncated SVD: of every matrix the best approximation of a rank."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.spectral import Spectral, SpectralSettings
from sage.config import Named
from sage.interfaces import Communicator, Seeds, Slot


class SVDSettings(SpectralSettings):
    name: Literal["svd"] = "svd"


class SVD(Spectral):
    """C(A) = sum_{i <= rank} sigma_i u_i v_i^T, the nearest matrix of that rank; mean = sum_i C(A_i) / W.

    One all_gather: the workers' subspaces differ, so the sum has not that rank. PowerSGD approaches it:
    Vogels et al. 2019, arXiv 1905.13727, section 3. NaN spreads over its matrix.
    """

    Settings: ClassVar[type[Named]] = SVDSettings

    def __init__(
        self, config: SVDSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, device)

    def weigh(self, squares: Tensor) -> Tensor:
        weights = torch.zeros_like(squares)
        weights[:, : self.rank] = 1
        return weights

    def exchange(
        self, counts: list[int], values: Tensor, comm: Communicator
    ) -> list[tuple[list[int], Tensor]]:
        return [(counts, theirs) for theirs in comm.all_gather(values)]

    def expected_payload_bytes(self, world_size: int) -> int:
        return 4 * self.target_elements if world_size > 1 else 0

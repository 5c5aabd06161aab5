"""Spectral ATOMO: singular triples drawn with probabilities that follow the singular values; unbiased."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.spectral import Spectral, SpectralSettings
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Communicator, Seeds, Slot


class AtomoSettings(SpectralSettings):
    name: Literal["atomo"] = "atomo"


def probabilities(values: Tensor, budget: int) -> Tensor:
    """p (count, atoms) that minimises sum_i sigma_i^2 / p_i under sum_i p_i = budget, p_i <= 1, from sigma
    (count, atoms), descending; all 0 where sigma is.

    Wang et al. 2018, arXiv 1806.04090, algorithm 1: the largest get p = 1, as long as more would be due to
    them; then p_i = sigma_i (what is left of the budget) / (what is left of the sum).
    """
    tails = values.flip(-1).cumsum(-1).flip(-1)  # sum_{j >= i} sigma_j
    left = budget - torch.arange(values.shape[-1], device=values.device)
    first = (values * left <= tails).int().argmax(-1, keepdim=True)  # (count, 1): how many get 1
    share = (budget - first) / tails.gather(-1, first)
    certain = torch.arange(values.shape[-1], device=values.device) < first
    return torch.where(certain, 1.0, (values * share).nan_to_num(0.0)).clamp(max=1.0)


class Atomo(Spectral):
    """E C(A) = A: the triple i travels with probability p_i, as sigma_i / p_i u_i v_i^T; sum_i p_i = rank.

    Wang et al. 2018, arXiv 1806.04090, section 4. Each worker draws for itself, so payloads differ.
    Meant without error feedback: with weights above 1 the error may exceed what was to be sent. A NaN stays:
    its matrix sends nothing.
    """

    Settings: ClassVar[type[Named]] = AtomoSettings
    state_names = ("generator",)
    worker_generators = state_names

    def __init__(
        self, config: AtomoSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, layout, device)
        self.generator = Draws(seeds.worker)

    def weigh(self, squares: Tensor) -> Tensor:
        kept_with = probabilities(squares.sqrt(), self.rank)
        drawn = self.generator.uniform(squares.shape, squares.device)
        return torch.where(drawn < kept_with, 1 / kept_with, 0.0)

    def exchange(
        self, counts: list[int], values: Tensor, comm: Communicator
    ) -> list[tuple[list[int], Tensor]]:
        counted = torch.tensor(counts, dtype=torch.int32, device=values.device)
        message = torch.cat([counted, values.view(torch.int32)])
        return [
            (
                comm.read(theirs[: self.num_matrices]).tolist(),  # host synchronisation
                theirs[self.num_matrices :].clone().view(values.dtype),
            )
            for theirs in comm.all_gather_ragged(message)
        ]

    def expected_payload_bytes(self, world_size: int) -> int:
        """The mean, as rank atoms per matrix are expected; the longest message of a step is longer."""
        return 4 + 4 * self.num_matrices + 4 * self.target_elements if world_size > 1 else 0

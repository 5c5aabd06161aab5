"""The k largest magnitudes of each part of a gradient."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducers.search import Counts, Part, search_for
from reducers.sparse import CandidateSparsifier, SparsifierSettings, UnionSettings, counts_of_parts
from sage.interfaces import Slot


class LargestSparsifier(CandidateSparsifier[Any]):
    """Selects the k largest magnitudes of each part; a subclass says which parts. NaN is the largest, and is
    sent; of equal magnitudes the first are sent. On a GPU, FixedSearch may miss some in a rare step."""

    state_names: tuple[str, ...] = ("num_draws", "inexact_steps", "sampled_density")
    count_is_fixed = True

    def __init__(
        self, config: SparsifierSettings | UnionSettings, layout: list[Slot], device: torch.device
    ) -> None:
        super().__init__(config, layout)
        self.layout = layout
        self._device = device
        self.places = self.places_in(layout)
        self._sizes = np.array([stop - start for start, stop in self.places], np.int64)
        self.num_draws = 0  # how often new positions for the sample were drawn
        self.inexact_steps = torch.zeros((), dtype=torch.int64, device=device)  # in which some were missed
        self.aim_anew(config.density)

    @abstractmethod
    def places_in(self, layout: list[Slot]) -> list[tuple[int, int]]:
        """Where each part starts and stops: in ascending order, and they leave nothing out."""

    def counts(self, density: float) -> Counts:
        """k_l = max(1, floor(density n_l)), n_l at most."""
        return counts_of_parts(density, self._sizes)

    def parts(self, density: float) -> list[Part]:
        pairs = zip(self.places, self.counts(density).tolist(), strict=True)
        return [Part(*place, k) for place, k in pairs]

    def aim(self, density: float) -> None:
        """The sample is drawn anew only where the k have changed much."""
        ks = self.counts(density)
        if not self._search.can_aim(ks):
            self.aim_anew(density)
            return
        super().aim(density)
        self._search.aim(ks)

    def aim_anew(self, density: float) -> None:
        """The same, with a new sample."""
        super().aim(density)
        self.sampled_density = density
        self._search = search_for(self._device)(self.parts(density), self._device)
        self._search.sample.draw(self.num_draws)

    def find_candidates(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Any:
        return self._search.begin(send, grad, zeroes_grad)

    def select_among(self, send: Tensor, candidates: Any) -> Tensor:
        indices = self._search.finish(send, candidates)
        self.inexact_steps += self._search.has_missed
        if self._search.needs_new_sample:
            self.num_draws += 1
            self._search.sample.draw(self.num_draws)
        return indices

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.aim_anew(self.sampled_density)

    def next_energy(self, squares: Tensor) -> Tensor:
        """Where the density grows every part's k does, in proportion: sum_l k_l tau_l / k, tau_l a part's
        smallest square."""
        ks = self._search.ks
        smallest = torch.segment_reduce(squares, "min", lengths=ks, unsafe=True)  # (parts,), inf without k
        return torch.where(ks > 0, smallest * ks, 0.0).sum() / len(squares)

    def metrics(self) -> Mapping[str, float | Tensor]:
        counted = {"inexact_steps": self.inexact_steps.double()} if self._search.may_miss else {}
        return {**super().metrics(), **counted}

    def target_counts(self) -> int:
        return int(self.counts(self.config.density).sum())

"""What the sparsifiers share whose workers each look at their own part of the gradient in a step.

No two of them select the same, so the union of all selections is their sum, and d n of it is the target.
"""

from abc import abstractmethod
from collections.abc import Mapping
from math import ceil
from typing import Literal

from torch import Tensor

from reducers.kernels import Division, scan
from reducers.sparse import Sparsifier, Threshold, UnionSettings, resolve_threshold, target_count
from sage.interfaces import Communicator, Place, Slot

ABOVE, BELOW = 1.1, 0.909
"""The band of K / k in which the threshold moves by small steps. Values of the published code, as are the
factors."""
UP, DOWN = 1.005, 0.995
UP_IN_BAND, DOWN_IN_BAND = 1.00125, 0.9987


def disjoint_payload_bytes(k: int, world_size: int) -> int:
    """Of sizes, indices and the values at the union, where each worker selects its share of k."""
    return 4 + 4 * ceil(k / world_size) + 4 * k if world_size > 1 else 0


class GlobalThresholdSettings(UnionSettings):
    threshold: Threshold = "auto"
    """The initial threshold; auto: 1 / (2 sqrt k), k = density n."""
    band: Literal["corrected", "published"] = "corrected"
    """What happens where the density is within a tenth of its target. corrected: the threshold rises above
    the target and falls below it; published: it rises in both cases."""


class GlobalThresholdSparsifier(Sparsifier):
    """Selects |send| >= lambda in a worker's own part, one lambda for all workers.

    It follows K, how many all workers selected in the last step, which all know: with x = K / k,

        lambda <- lambda * (1.005 if x > 1.1, 0.995 if x <= 0.909, else 1.00125 if x > 1, else 0.9987)

    The target is the union's density, so that the workers' mean density is 1 / W of it. Where nothing reaches
    the threshold, published code sends one element all the same; here a message may be empty.
    """

    selects_largest = False  # but in a worker's own part
    state_names: tuple[str, ...] = ("num_steps", "threshold", "counts")

    def __init__(self, config: GlobalThresholdSettings, layout: list[Slot]) -> None:
        super().__init__(config, layout)
        self._first, self._band = config.threshold, config.band
        self.num_steps = 0
        self.threshold = 0.0
        self.counts: list[int] = []
        """How many elements each worker selected in the last step."""

    @abstractmethod
    def own_part(self, place: Place) -> tuple[int, int]:
        """Where this worker's part of this step starts and stops."""

    def select(self, send: Tensor, place: Place) -> Tensor:
        k = target_count(self.target_density, self.n)
        if self.num_steps == 0:
            self.threshold = resolve_threshold(self._first, self.target_density, self.n)
        else:
            self.threshold *= self._factor(sum(self.counts) / k)
        start, stop = self.own_part(place)
        bound = send.new_full((1,), self.threshold)
        return scan(send[start:stop], None, bound, Division([0, stop - start])).indices + start

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        super().reduce(send, mean, comm)
        self.counts = [len(places) for places in self._gathered]
        self.num_steps += 1

    def _factor(self, exam: float) -> float:
        if exam > ABOVE:
            return UP
        if exam <= BELOW:
            return DOWN
        return UP_IN_BAND if exam > 1 or self._band == "published" else DOWN_IN_BAND

    def expected_payload_bytes(self, world_size: int) -> int:
        return disjoint_payload_bytes(self.target_counts(), world_size)

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {**super().metrics(), "threshold": self.threshold}

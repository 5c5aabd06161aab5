"""What the sparsifiers share: the exchanges gather and union, selection by a threshold.

A sparsifier is a subclass of Sparsifier that writes one method, select. One that finds candidates while the
gradient is added is a subclass of CandidateSparsifier; one that selects by a threshold is a subclass of
ThresholdSparsifier that passes a law, which sets the threshold.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from reducers.common import average_at
from reducers.density import DensityReducer, DensitySettings
from reducers.kernels import Division, Found, add_share, scan, take
from sage.interfaces import Communicator, Place, Slot, Stateful


class SparsifierSettings(DensitySettings):
    exchange: Literal["gather", "union"] = "gather"
    """gather: each worker sends the values it selected. union: all send their values at every selected
    index."""


class UnionSettings(DensitySettings):
    """Of a method whose workers all send their values wherever one selected, whatever else is chosen."""

    exchange: ClassVar[Literal["union"]] = "union"


MOST_GROWTH = 2.0
"""By how much the density grows or shrinks at most from one step to the next, where its error is followed."""

Threshold = Annotated[float, Field(ge=1.2e-38, le=3.4e38)] | Literal["auto"]  # float32's normal numbers


def target_count(density: float, n: int) -> int:
    """k = max(1, floor(density n)), or 0 where n is 0."""
    return min(n, max(1, int(density * n)))


def indexable(layout: list[Slot]) -> int:
    """n. Raises ValueError where an int32 cannot be the index of every element."""
    n = layout[-1].stop
    if n >= 2**31:
        raise ValueError(f"a sparsifier's indices are int32: needs fewer than 2^31 elements, got {n}")
    return n


def counts_of_parts(density: float | np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """target_count of each of sizes (parts,) int64; the density may be one for each."""
    counts: np.ndarray = np.minimum(sizes, np.maximum(1, (density * sizes).astype(np.int64)))
    return counts


def resolve_threshold(threshold: float | Literal["auto"], density: float, n: int) -> float:
    """auto is 1 / (2 sqrt k), the rule of Sahu et al. 2021, arXiv 2108.00951, for a learning rate of 1."""
    return 1 / (2 * target_count(density, n) ** 0.5) if threshold == "auto" else threshold


# --- the exchanges --------------------------------------------------------------------------------


def pack(send: Tensor, indices: Tensor) -> Tensor:
    """Take what is sent out of send, where 0 remains: one message (m,) int32 of values and indices (k,).

    It holds the values' bits, so that no index travels as a float; they come first, where they are aligned.
    """
    num_values = len(indices) * (send.itemsize // 4)  # in units of int32
    message = torch.empty(num_values + len(indices), dtype=torch.int32, device=send.device)
    take(send, indices, message[:num_values].view(send.dtype))
    message[num_values:] = indices
    return message


def unpack(message: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The indices (k,) int32 and values (k,) of a message."""
    k = len(message) // (1 + dtype.itemsize // 4)
    bits = message[:-k] if k else message
    if message.storage_offset() % (dtype.itemsize // 4):
        bits = bits.clone()  # another worker's float64 may begin in the middle of one
    return message[len(bits) :], bits.view(dtype)


Gather = Callable[[Tensor], Iterable[Tensor]]
"""How messages (m,) are gathered from all workers: with their sizes, or without where these are equal."""
Exchanged = tuple[list[Tensor], Tensor]
"""Every worker's indices (k_i,) int32, and the indices (m,) int64 whose values left send."""


def exchange_by_gather(
    send: Tensor, mean: Tensor, indices: Tensor, comm: Communicator, gather: Gather
) -> Exchanged:
    """mean, which holds zeros: the workers' selected values / W; send: 0 where this worker selected.

    One collective, of indices and values in one message; one more before it where sizes travel.
    """
    gathered = []
    for message in gather(pack(send, indices)):
        places, values = unpack(message, send.dtype)
        add_share(mean, places, values, comm.world_size)  # in rank order: the same bits everywhere
        gathered.append(places)
    return gathered, indices


def exchange_by_union(
    send: Tensor, mean: Tensor, indices: Tensor, comm: Communicator, gather: Gather
) -> Exchanged:
    """mean, which holds zeros: the workers' mean at every index that one of them selected; send: 0 there, on
    all workers.

    Two collectives: indices, values at the union; one more before them where sizes travel.
    """
    gathered = list(gather(indices.to(torch.int32)))
    union = torch.cat(gathered).unique().long()  # host synchronisation: the union's size
    average_at(union, send, mean, comm, mean_is_zero=True)
    return gathered, union


def count_distinct(indices: Tensor) -> Tensor:
    """How many different numbers there are among indices (m,): a float64 scalar, without waiting for it."""
    ascending = indices.sort().values
    firsts = ascending.new_ones(indices.shape, dtype=torch.bool)
    torch.ne(ascending[1:], ascending[:-1], out=firsts[1:])
    return firsts.sum().double()


# --- the reducers' bases --------------------------------------------------------------------------


class NotedGather:
    """A gather whose messages carry one more number: a worker's note, in the last 4 bytes."""

    def __init__(self, gather: Gather, note: Tensor) -> None:
        """note: a scalar float32 on the device."""
        self._gather, self._note = gather, note.view(1).view(torch.int32)
        self._notes: list[Tensor] = []

    def __call__(self, message: Tensor) -> Iterator[Tensor]:
        for row in self._gather(torch.cat([message, self._note])):
            self._notes.append(row[-1:])
            yield row[:-1]

    def notes(self) -> Tensor:
        """All workers' notes (world_size,) float32, once the messages are read."""
        return torch.cat(self._notes).view(torch.float32)


class Sparsifier(DensityReducer):
    """Sends selected elements only. What the select method does not name stays in send."""

    selects_largest = True
    count_is_fixed: ClassVar[bool] = False
    """Whether all workers select equally many in a step: then no sizes travel."""

    def __init__(self, config: SparsifierSettings | UnionSettings, layout: list[Slot]) -> None:
        self.n = indexable(layout)
        super().__init__(config)
        self.exchange: Literal["gather", "union"] = config.exchange
        self._gathered: list[Tensor] = []
        self._mean_is_zero = False
        self._measured_share: float | None = None

    @abstractmethod
    def select(self, send: Tensor, place: Place) -> Tensor:
        """The indices (k,) int64 to send, unique, k may be 0."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.select(send, Place(comm.rank, comm.world_size))
        if not self._mean_is_zero:
            mean.zero_()
        self._mean_is_zero = False
        gather: Gather = comm.all_gather if self.count_is_fixed else comm.all_gather_ragged
        exchange = exchange_by_gather if self.exchange == "gather" else exchange_by_union
        if self._measured_share is None:
            self._gathered, self._sent = exchange(send, mean, indices, comm, gather)
        else:
            noted = NotedGather(gather, self._growth(send, indices, self._measured_share))
            self._gathered, self._sent = exchange(send, mean, indices, comm, noted)
            self.growths = noted.notes()
        num_selected = sum(places.numel() for places in self._gathered)
        self.density = num_selected / (comm.world_size * self.n)

    def measure_growth(self, share: float) -> None:
        self._measured_share = share

    def _growth(self, send: Tensor, indices: Tensor, share: float) -> Tensor:
        """A step of Newton's method for the smallest k whose sent part S keeps a share of send's energy E:

            g = 1 + (share E - S) / (k tau),  E = ||send||^2,  S = ||sent||^2,  within [1/2, 2]

        tau is what one more element would add. S(k) is concave where the largest are sent, so a step from a
        k that is too small never goes too far. A scalar float32; E costs one reading of send, 4 n bytes.
        """
        if not len(indices):
            return send.new_full((), MOST_GROWTH, dtype=torch.float32)
        values = send.index_select(0, indices)  # (k,)
        energy, sent = torch.dot(send, send), torch.dot(values, values)
        growth = 1 + (share * energy - sent) / (len(indices) * self.next_energy(values.square_()))
        # NaN is 0 / 0 or inf - inf: nothing is known, so the density stays.
        return growth.nan_to_num(1.0).clamp(1 / MOST_GROWTH, MOST_GROWTH).float()

    def next_energy(self, squares: Tensor) -> Tensor:
        """tau, a scalar, from the squares (k,) of what is sent: here of the smallest."""
        return squares.amin()

    def target_counts(self) -> int:
        """Elements a worker sends in a step at the configuration's density."""
        return target_count(self.config.density, self.n)

    def expected_payload_bytes(self, world_size: int) -> int:
        k = self.target_counts()
        if world_size == 1:
            return 0
        sizes = (0 if self.count_is_fixed else 4) + (0 if self._measured_share is None else 4)
        if self.exchange == "gather":
            return sizes + 8 * k
        return sizes + 4 * k + 4 * min(self.n, world_size * k)

    def metrics(self) -> Mapping[str, float | Tensor]:
        union = count_distinct(torch.cat(self._gathered)) if self._gathered else 0
        return {"target_density": self.target_density, "union_density": union / self.n}


Candidates = TypeVar("Candidates")


class CandidateSparsifier(Sparsifier, Generic[Candidates]):
    """Finds candidates in the pass that adds the gradient, and selects among them."""

    def __init__(self, config: SparsifierSettings | UnionSettings, layout: list[Slot]) -> None:
        super().__init__(config, layout)
        self._candidates: Candidates | None = None

    @abstractmethod
    def find_candidates(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Candidates:
        """send += grad, where one is given, and grad = 0 where asked for; what select_among needs to know of
        the sum. Once a step."""

    @abstractmethod
    def select_among(self, send: Tensor, candidates: Candidates) -> Tensor:
        """The indices (k,) int64 to send, unique, k may be 0."""

    def accumulate(self, send: Tensor, grad: Tensor, *, grad_is_mean: bool = False) -> None:
        self._candidates = self.find_candidates(send, grad, zeroes_grad=grad_is_mean)
        self._mean_is_zero = grad_is_mean

    def select(self, send: Tensor, place: Place) -> Tensor:
        candidates, self._candidates = self._candidates, None
        if candidates is None:  # reduce without accumulate
            candidates = self.find_candidates(send, None, zeroes_grad=False)
        return self.select_among(send, candidates)

    def aim(self, density: float) -> None:
        super().aim(density)
        self._candidates = None  # of another density


class ThresholdLaw(Stateful, ABC):
    """Sets a sparsifier's threshold. A step calls lower_bound, then threshold; both return scalars on the
    law's device.

    The scan finds the candidates at the lower bound; the final threshold is then applied to those few.
    """

    @abstractmethod
    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        """A scalar that is at most this step's threshold. send + grad is what will be scanned."""

    @abstractmethod
    def threshold(self, magnitudes: Tensor, n: int) -> Tensor:
        """This step's threshold, from the magnitudes (c,) of the candidates among n elements."""

    def aim(self, density: float) -> None:
        """Called when the target density changes; a law may have no use for it."""

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {}


class ThresholdSparsifier(CandidateSparsifier[Found]):
    """Selects |send| >= threshold, the threshold set by a law, in one pass that also adds the gradient."""

    state_names = ("law",)

    def __init__(self, config: SparsifierSettings, layout: list[Slot], law: ThresholdLaw) -> None:
        super().__init__(config, layout)
        self.law = law
        self._whole = Division([0, self.n])

    def aim(self, density: float) -> None:
        super().aim(density)
        self.law.aim(density)

    def find_candidates(self, send: Tensor, grad: Tensor | None, zeroes_grad: bool) -> Found:
        """What can reach this step's threshold."""
        bound = self.law.lower_bound(send, grad).view(1)
        return scan(send, grad, bound, self._whole, zeroes_grad=zeroes_grad)

    def select_among(self, send: Tensor, candidates: Found) -> Tensor:
        threshold = self.law.threshold(candidates.magnitudes, self.n)
        # host synchronisation on a GPU: the selection's size
        return candidates.indices[candidates.magnitudes >= threshold]

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {**super().metrics(), **self.law.metrics()}

"""What the sparsifiers share: the scan by threshold, the exchanges gather and union.

A sparsifier is a subclass of Sparsifier that writes one method, select. One that selects by a threshold is
a subclass of ThresholdSparsifier that passes a law: who sets the threshold.
"""

from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from reducers.common import average_at
from reducers.schedule import DensitySettings, ScheduledReducer
from sage.interfaces import Communicator, Place, Slot, Stateful

CHUNK = 65_536
"""Elements a step of the scan on the CPU: send, gradient and scratch of a chunk stay in a core's cache
together."""


class SparsifierSettings(DensitySettings):
    exchange: Literal["gather", "union"] = "gather"
    """gather: each worker sends the values it selected. union: all send their values at every selected
    index."""


Threshold = Annotated[float, Field(ge=1.2e-38, le=3.4e38)] | Literal["auto"]  # float32's normal numbers


def target_count(density: float, n: int) -> int:
    """k = max(1, floor(density n)), and 0 of none."""
    return min(n, max(1, int(density * n)))


def resolve_threshold(threshold: float | Literal["auto"], density: float, n: int) -> float:
    """auto is 1 / (2 sqrt k), the rule of Sahu et al. 2021, arXiv 2108.00951, for a learning rate of 1."""
    return 1 / (2 * target_count(density, n) ** 0.5) if threshold == "auto" else threshold


# --- the scan -------------------------------------------------------------------------------------


def scan(send: Tensor, grad: Tensor | None, threshold: Tensor) -> Tensor:
    """send += grad (where one is given), and the ascending indices (k,) int64 of |send| >= threshold.

    send, grad (n,), contiguous; threshold is a scalar of the same dtype. One pass: on the CPU in chunks
    that stay in cache, elsewhere as whole-tensor operations; both give the same bits. NaN is never
    selected.
    """
    return (
        scan_in_chunks(send, grad, threshold)
        if send.device.type == "cpu"
        else scan_whole(send, grad, threshold)
    )


def lists_candidates(send: Tensor) -> bool:
    """Whether a list of candidates is worth its host synchronisation: where there is none."""
    return send.device.type == "cpu"


def scan_whole(send: Tensor, grad: Tensor | None, threshold: Tensor) -> Tensor:
    """The form of scan for any device."""
    if grad is not None:
        send.add_(grad)
    return (send.abs() >= threshold).nonzero().view(-1)  # host synchronisation: the selection's size


def scan_in_chunks(send: Tensor, grad: Tensor | None, threshold: Tensor, selects_nan: bool = False) -> Tensor:
    """The form of scan for the CPU: numpy on the tensors' own memory, since its calls cost less than
    torch's. selects_nan: NaN reaches every threshold, and everything reaches NaN."""
    flat, n, limit = send.numpy(), send.numel(), threshold.numpy()
    added = None if grad is None else grad.numpy()
    magnitude = np.empty(min(CHUNK, n), flat.dtype)
    selected = np.empty(min(CHUNK, n), np.bool_)
    found = [np.empty(0, np.int64)]
    with np.errstate(all="ignore"):  # inf - inf and overflow are as silent as in torch
        for start in range(0, n, CHUNK):
            part = flat[start : start + CHUNK]
            size = part.size
            if added is not None:
                np.add(part, added[start : start + CHUNK], out=part)
            np.abs(part, out=magnitude[:size])
            if selects_nan:
                np.less(magnitude[:size], limit, out=selected[:size])
                np.logical_not(selected[:size], out=selected[:size])
            else:
                np.greater_equal(magnitude[:size], limit, out=selected[:size])
            found.append(np.flatnonzero(selected[:size]) + start)
    return torch.from_numpy(np.concatenate(found))


# --- the exchanges --------------------------------------------------------------------------------


def pack(indices: Tensor, values: Tensor) -> Tensor:
    """Indices (k,) and values (k,) as one message (m,) int32: the values' bits, so that no index travels as
    a float."""
    return torch.cat([indices.to(torch.int32), values.view(torch.int32)])


def unpack(message: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The indices (k,) int32 and values (k,) of a message."""
    k = message.numel() // (1 + dtype.itemsize // 4)
    return message[:k], message[k:].clone().view(dtype)  # a copy of k: a view may be misaligned


Exchanged = tuple[list[Tensor], Tensor]
"""Every worker's indices (k_i,) int32, and the indices (m,) int64 whose values left send."""


def exchange_by_gather(send: Tensor, mean: Tensor, indices: Tensor, comm: Communicator) -> Exchanged:
    """mean: the workers' selected values / W, added in rank order; send: 0 where this worker selected.

    Two collectives: sizes, then indices and values in one message.
    """
    message = pack(indices, send[indices])
    send[indices] = 0
    mean.zero_()
    gathered = []
    for one in comm.all_gather_ragged(message):
        places, values = unpack(one, send.dtype)
        # Unique indices within a worker: no two threads add to one element, so the order of additions is
        # the ranks'.
        mean.index_add_(0, places, values / comm.world_size)
        gathered.append(places)
    return gathered, indices


def exchange_by_union(send: Tensor, mean: Tensor, indices: Tensor, comm: Communicator) -> Exchanged:
    """mean: the workers' mean at every index that one of them selected; send: 0 there, on all workers.

    Three collectives: sizes, indices, values at the union.
    """
    gathered = comm.all_gather_ragged(indices.to(torch.int32))
    union = torch.cat(gathered).unique().long()  # host synchronisation: the union's size
    average_at(union, send, mean, comm)
    return gathered, union


# --- the reducers' bases --------------------------------------------------------------------------


class Sparsifier(ScheduledReducer):
    """Sends selected elements only. What the select method does not name stays in send."""

    def __init__(self, config: SparsifierSettings, layout: list[Slot]) -> None:
        self.n = layout[-1].stop
        if self.n >= 2**31:
            raise ValueError(
                f"a sparsifier's indices are int32: needs fewer than 2^31 elements, got {self.n}"
            )
        super().__init__(config)
        self.exchange = config.exchange
        self._gathered: list[Tensor] = []

    @abstractmethod
    def select(self, send: Tensor, place: Place) -> Tensor:
        """The indices (k,) int64 to send, unique, k may be 0."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        indices = self.select(send, Place(comm.rank, comm.world_size))
        exchange = exchange_by_gather if self.exchange == "gather" else exchange_by_union
        self._gathered, self._sent = exchange(send, mean, indices, comm)
        num_selected = sum(places.numel() for places in self._gathered)
        self.density = num_selected / (comm.world_size * self.n)

    def target_counts(self) -> int:
        """Elements a worker sends in a step at the target density, after any schedule."""
        return target_count(self.config.density, self.n)

    def expected_payload_bytes(self, world_size: int) -> int:
        k = self.target_counts()
        if world_size == 1:
            return 0
        if self.exchange == "gather":
            return 4 + 8 * k
        return 4 + 4 * k + 4 * min(self.n, world_size * k)

    def metrics(self) -> dict[str, float]:
        union = torch.cat(self._gathered).unique().numel() if self._gathered else 0
        return {"target_density": self.target_density, "union_density": union / self.n}


class ThresholdLaw(Stateful):
    """Who sets the threshold. A step calls lower_bound, then threshold; both return scalars on the law's
    device.

    The scan finds the candidates at the lower bound; the final threshold is then applied to those few.
    """

    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        """A scalar that this step's threshold is not below. send + grad is what will be scanned."""
        raise NotImplementedError

    def threshold(self, magnitudes: Tensor, n: int) -> Tensor:
        """This step's threshold, from the magnitudes (c,) of the candidates among n elements."""
        raise NotImplementedError

    def aim(self, density: float) -> None:
        """Told when the target density changes."""

    def metrics(self) -> dict[str, float]:
        return {}


class ThresholdSparsifier(Sparsifier):
    """Selects |send| >= threshold, the threshold set by a law, in one pass that also adds the gradient."""

    state_names = ("law",)

    def __init__(self, config: SparsifierSettings, layout: list[Slot], law: ThresholdLaw) -> None:
        super().__init__(config, layout)
        self.law = law
        self._candidates: Tensor | slice | None = None

    def aim(self, density: float) -> None:
        super().aim(density)
        self.law.aim(density)

    def accumulate(self, send: Tensor, grad: Tensor) -> None:
        self._candidates = self._begin(send, grad)

    def select(self, send: Tensor, place: Place) -> Tensor:
        ready, self._candidates = self._candidates, None
        candidates = self._begin(send, None) if ready is None else ready  # None: reduce without accumulate
        magnitudes = send[candidates].abs()
        threshold = self.law.threshold(magnitudes, self.n)
        if isinstance(candidates, slice):
            return scan(send, None, threshold)
        return candidates[magnitudes >= threshold]

    def _begin(self, send: Tensor, grad: Tensor | None) -> Tensor | slice:
        """send += grad, where one is given; which elements can reach this step's threshold.

        On the CPU their indices, from the same pass. Elsewhere all elements: a list of candidates would cost
        a host synchronisation of its own.
        """
        bound = self.law.lower_bound(send, grad)
        if lists_candidates(send):
            return scan(send, grad, bound)
        if grad is not None:
            send.add_(grad)
        return slice(None)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), **self.law.metrics()}

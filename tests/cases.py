"""The one table of cases that drives the laws, and the small gradient that all rows share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from sage.exchange.comm import CountingComm
from sage.interfaces import Progress, Reducer, Seeds, Slot, lay_out
from tests import partitions

CPU = torch.device("cpu")
SHAPES = ((8, 3, 3, 3), (8,), (20, 11), (11,), (1,))
Collectives = tuple[tuple[Literal["all_reduce", "all_gather", "all_to_all", "broadcast"], int], ...]
Law = Literal["conservation", "zeros", "one huge value", "one element", "a worker without gradient"]


def layout_of(shapes: tuple[tuple[int, ...], ...]) -> list[Slot]:
    return lay_out((f"parameter{index}", shape) for index, shape in enumerate(shapes))


LAYOUT = layout_of(SHAPES)
N = LAYOUT[-1].stop


def gradient(rank: int, step: int, n: int = N) -> Tensor:
    """(n,) float32, heavy-tailed, without zeros or ties."""
    values = np.random.RandomState(1000 * rank + step).standard_t(df=3, size=n)
    return torch.from_numpy((values * 0.01).astype(np.float32))


@dataclass(frozen=True)
class Case:
    """A reducer with settings, and what its method promises."""

    reducer: str
    settings: dict[str, Any] = field(default_factory=dict)
    gathers_only: bool = True
    """No all_reduce: processes and threads agree bit for bit."""
    exact_with: dict[str, Any] | None = None
    """Settings under which the first step is exact; None: none are."""
    nan: Literal["sent", "kept", "spreads", "lost"] = "sent"
    """A NaN is sent alone, stays in send alone, takes others of its tensor along, or changes nothing."""
    count: Callable[[Tensor, dict[str, float]], int] | None = None
    """How many elements a worker selects, from send (n,) and its metrics; None: a dense reducer."""
    counts: "Callable[[list[tuple[Step, ...]]], list[int]] | None" = None
    """The same of each worker in the last of some steps, where it depends on the others or on its rank."""
    is_union: bool = False
    """All workers send their values at every selected index; so too where the setting exchange says it."""
    decision: Callable[[int], int] | None = None
    """The bytes of a broadcast before a sparsifier's collectives, of so many workers."""
    fixed_count: bool = False
    """The count is the same at every step."""
    sends_sizes: bool = True
    """A sparsifier's workers tell one another how long their messages are; not so where all know it."""
    collectives: Collectives | Callable[[int], Collectives] | None = None
    """Every step's collectives and the bytes that a worker hands over, by hand from SHAPES, or from the
    number of workers; None: a sparsifier's, which follow from the counts."""
    collectives_at: Mapping[int, Collectives] = field(default_factory=dict)
    """Those of single steps, by number, where they differ."""
    message: "Callable[[Step], int] | None" = None
    """The bytes of a worker's one ragged message, by hand from what it sent; None: it sends none, or a
    sparsifier's."""
    rounding: float = 0.0
    """How far results may be off beyond the law's own bound, relative to the largest magnitude of what was
    given: for methods with matrix products or a narrower type. The row derives it."""
    unpromised: Mapping[Law, str] = field(default_factory=dict)
    """The laws that the method does not keep, each with the reason."""

    @property
    def sends_union(self) -> bool:
        return self.is_union or self.settings.get("exchange") == "union"

    @property
    def is_sparse(self) -> bool:
        """Whether it says how many elements a worker selects."""
        return self.count is not None or self.counts is not None

    def __str__(self) -> str:
        """The row's name in pytest, the reducer in brackets: -k "[topk]" selects no row of global_topk."""
        return "-".join([f"[{self.reducer}]", *(str(value) for value in self.settings.values())])

    def build(
        self,
        layout: list[Slot] = LAYOUT,
        rank: int = 0,
        changes: Mapping[str, Any] | None = None,
        device: torch.device = CPU,
    ) -> Reducer:
        settings = REDUCERS[self.reducer].Settings
        config = settings.model_validate({**self.settings, **(changes or {})})
        return reducers.build(config, layout, seeds=Seeds.derive(1, rank), device=device)


def layerwise(send: Tensor, metrics: dict[str, float]) -> int:
    """k of each tensor at a density of 0.05."""
    return sum(max(1, int(0.05 * slot.size)) for slot in LAYOUT)


def overall(send: Tensor, metrics: dict[str, float]) -> int:
    """k of all at a density of 0.05."""
    return int(0.05 * N)


def reached(send: Tensor, metrics: dict[str, float]) -> int:
    """What reaches the threshold that is logged."""
    return int((send.abs() >= metrics["threshold"]).sum())


def matrix_atoms(step: "Step") -> int:
    """Bytes: a count each of 2 matrices, the 20 elements of 3 vectors, (rows + columns) an atom.

    What a matrix sent has the rank of its atoms; a singular value below 1e-5 of the largest is rounding.
    """
    values = 2 + 20
    for slot in LAYOUT:
        if len(slot.shape) > 1:
            sent = (step.before - step.after)[slot.start : slot.stop].view(slot.shape[0], -1)
            rank = int(torch.linalg.matrix_rank(sent.double(), rtol=1e-5))
            values += rank * sum(sent.shape)
    return 4 * values


def nine_tenths(send: Tensor, metrics: dict[str, float]) -> int:
    """k of each tensor at a density of 0.9."""
    return sum(max(1, int(0.9 * slot.size)) for slot in LAYOUT)


BY_COUNT = {"exact_with": {"density": 1.0}, "fixed_count": True, "sends_sizes": False}
TOPK, GLOBAL = {**BY_COUNT, "count": layerwise}, {**BY_COUNT, "count": overall}
BY_THRESHOLD = {"exact_with": {"threshold": 1e-30}, "count": reached, "nan": "kept"}
BY_ESTIMATE = {"count": reached, "nan": "kept"}
SAGE = {"density": 0.05, "threshold": 0.03}
UNION = {"exchange": "union"}
HALF = {"gathers_only": False, "nan": "spreads", "collectives": (("all_reduce", 2 * N),)}
SATURATES = "in float16 32752 is the most that is sent in a step"


# (8, 27) and (20, 11) at rank 2: P has 16 + 40 numbers, Q 54 + 22; the vectors have 8 + 11 + 1.
LOWRANK = {
    "gathers_only": False,
    "nan": "spreads",
    # Three matrix products of at most 27 terms each, and factors whose columns (drawn at random) are
    # conditioned no worse than 30: 3 * 27 * 30 * 2^-24.
    "rounding": 1.5e-4,
}
HALF_OF_IT = {"one huge value": "one step gives the projection on the factor of the step before"}

FULL_RANK = {"rank": 27, "min_compression_rate": 0}
TWO_SIDED = {
    **LOWRANK,
    "exact_with": FULL_RANK,
    "collectives": (("all_reduce", 4 * (56 + 20)), ("all_reduce", 4 * 76)),
}
ALTERNATING = {"rank": 2, "form": "alternating"}
ONE_SIDE = {**LOWRANK, "unpromised": HALF_OF_IT, "collectives": (("all_reduce", 4 * (76 + 20)),)}
DRAWN = {
    "gathers_only": False,
    "exact_with": {"density": 1.0},
    "fixed_count": True,
    "unpromised": {"one huge value": "what travels is drawn, whatever its value"},
}
DRAWN_24, DRAWN_409 = (("all_reduce", 4 * 24),), (("all_reduce", 4 * 409),)
VOTE = {
    "nan": "lost",
    "collectives": (("all_gather", 57),),
    "unpromised": {
        "conservation": "a vote is a direction, not an average",
        "zeros": "sign(0) = +1",
        "one huge value": "only its sign counts",
        "one element": "the vote on 2 and 4 is +1",
        "a worker without gradient": "it votes +1, since sign(0) = +1",
    },
}
# What a quantiser decodes is at most twice what it was given, and what is subtracted is rounded to the
# precision of what stays: 2^-24 for each of |before|, |after| and what was decoded, at most 4 together.
QUANTIZED: dict[str, Any] = {"nan": "spreads", "rounding": 4 * 2.0**-24}
# Buckets of 128 elements: 2 for 216 and for 220 elements, 1 each for 8, 11 and 1.
BUCKETS = 2 + 2 + 3
SQUARE = {"one huge value": "its square is no float32, so that its bucket is scaled by the largest float32"}
OF_A_TENSOR = {"one huge value": "its tensor's elements share their magnitudes"}
# An entry of sum_i u_i (sigma_i v_i)^T has rounding errors of at most 2^-24 for each of its r W products, W
# additions and a division, relative to max sigma, as U and V have orthonormal columns; max sigma is at most
# sqrt(220) times the largest entry. Both mean and send have them: 2 (2 4 + 4 + 1) 2^-24 sqrt(220) = 2.3e-5.
SVD = {"exact_with": {"rank": 9}, "nan": "spreads", "rounding": 2.3e-5}
# As svd, but at most 11 atoms, each weighing at most sum sigma <= sqrt(11) sqrt(220) times the largest entry:
# 2 (11 4 + 4 + 1) 2^-24 sqrt(11 220) = 2.9e-4.
ATOMO = {"exact_with": {"rank": 9}, "nan": "kept", "rounding": 2.9e-4}

FITTED = {
    **BY_ESTIMATE,
    "unpromised": {"one element": "what d = 0.05 of an exponential distribution exceeds is 3 times its mean"},
}

OWN_PART = "a worker selects in its own part of the gradient, and of what it has there"


def in_slices(history: "list[tuple[Step, ...]]") -> list[int]:
    """MiCRO's counts."""
    return reaching_in(partitions.slices(N, len(history[-1])), history)


def in_blocks(history: "list[tuple[Step, ...]]") -> list[int]:
    """ExDyna's counts: 14 blocks of 32 elements, the last part 8 more."""
    world_size = len(history[-1])
    blocks, counts = partitions.Blocks(N, 14, world_size), list[int]()
    for step in range(len(history)):
        if step:
            blocks.move([counts[(part - step + 1) % world_size] for part in range(world_size)])
        counts = reaching_in(blocks.parts(), history[: step + 1])
    return counts


def reaching_in(parts: list[np.ndarray], history: "list[tuple[Step, ...]]") -> list[int]:
    """How many reach the logged threshold in part (t + rank) mod W, t the last step."""
    steps, world_size = history[-1], len(parts)
    return [
        int(
            (
                step.before[parts[(len(history) - 1 + rank) % world_size]].abs() >= step.metrics["threshold"]
            ).sum()
        )
        for rank, step in enumerate(steps)
    ]


def in_layers(history: "list[tuple[Step, ...]]") -> list[int]:
    """DEFT's counts, by the leader's bins and everyone's own k."""
    world_size, number = len(history[-1]), len(history) - 1
    of = partitions.layers(LAYOUT, world_size)
    counts = [partitions.layer_counts(step.before.numpy(), of, int(0.05 * N)) for step in history[-1]]
    bins = partitions.layer_bins(of, counts[number % world_size], world_size)
    return [
        sum(k for k, owner in zip(own, bins, strict=True) if owner == (number + rank) % world_size)
        for rank, own in enumerate(counts)
    ]


DISJOINT = {"gathers_only": False, "is_union": True, "unpromised": {"one huge value": OWN_PART}}
FOLLOWS = {
    **DISJOINT,
    "nan": "kept",
    "unpromised": {
        "one huge value": OWN_PART,
        "zeros": "the threshold falls by half a per cent in a step in which nothing reaches it",
    },
}


def two_rounds(block_bytes: int) -> Callable[[int], Collectives]:
    """5 blocks, as equal shares of as many workers: all shares to their owners, and one back to all."""
    shares = {2: 3, 3: 2, 4: 2}
    return lambda world_size: (
        ("all_to_all", world_size * shares[world_size] * block_bytes),
        ("all_gather", shares[world_size] * block_bytes),
    )


def by_level(send: Tensor, metrics: dict[str, float]) -> int:
    """k of Accordion: the matrices' at densities of 0.1 or 0.02, and the vectors whole."""
    return 21 + 22 + 20 if metrics["low_compression"] == 1 else 4 + 4 + 20


# Two steps an epoch: the first decision, for low compression, comes with step 2, the second with step 4. No
# norm changes tenfold, so all five tensors go to high compression.
ACCORDION = {"interval_epochs": 1, "change": 10.0}
LOW, HIGH = (("all_gather", 8 * 63),), (("all_gather", 8 * 28),)
DECISION = (("broadcast", 5),)

CASES = [
    Case("exact", gathers_only=False, exact_with={}, collectives=(("all_reduce", 4 * N),)),
    Case("topk", {"density": 0.05}, **TOPK),
    Case("topk", {"density": 0.05, **UNION}, gathers_only=False, **TOPK),
    Case("global_topk", {"density": 0.05}, **GLOBAL),
    Case("global_topk", {"density": 0.05, **UNION}, gathers_only=False, **GLOBAL),
    Case("threshold", {"threshold": 0.03}, **BY_THRESHOLD),
    Case("threshold", {"threshold": 0.03, **UNION}, gathers_only=False, **BY_THRESHOLD),
    Case("threshold", {"threshold": "auto", "density": 0.5}, **BY_THRESHOLD),
    Case("sage", SAGE, **BY_THRESHOLD),
    Case("sage", {**SAGE, **UNION}, gathers_only=False, **BY_THRESHOLD),
    Case("sage", {**SAGE, "sampling": "by_tensor"}, **BY_THRESHOLD),
    Case("sage", {**SAGE, "terms": "alpha"}, **BY_THRESHOLD),
    # W - 1 = 3 additions at most, each rounded to 11 or 8 bits.
    Case(
        "exact", {"dtype": "float16"}, **HALF, rounding=3 * 2**-11, unpromised={"one huge value": SATURATES}
    ),
    Case("exact", {"dtype": "bfloat16"}, **HALF, rounding=3 * 2**-8),
    Case("powersgd", {"rank": 2}, **TWO_SIDED),
    Case("powersgd", {"rank": 2, "residual": "mean"}, **TWO_SIDED),
    Case("powersgd", {"rank": 2, "orthogonalization": "gram_schmidt"}, **TWO_SIDED),
    Case("powersgd", {"rank": 2, "warm_start": False}, **TWO_SIDED),
    Case(
        "powersgd",
        ALTERNATING,
        **ONE_SIDE,
        collectives_at={step: (("all_reduce", 4 * (56 + 20)),) for step in (1, 3, 5)},
    ),
    Case(
        "powersgd",
        {**ALTERNATING, "iterations": 2},
        **LOWRANK,
        collectives=(("all_reduce", 4 * (76 + 20)), ("all_reduce", 4 * 56)),
    ),
    Case(
        "accordion",
        {"densities": (0.1, 0.02), **ACCORDION},
        gathers_only=True,
        exact_with={"densities": (1.0, 1.0)},
        count=by_level,
        collectives=LOW,
        collectives_at={2: DECISION + LOW, 4: DECISION + HIGH, 5: HIGH},
    ),
    Case(
        "accordion",
        {"inner": "powersgd", "ranks": (2, 1), **ACCORDION},
        **LOWRANK,
        collectives=TWO_SIDED["collectives"],
        collectives_at={
            2: DECISION + TWO_SIDED["collectives"],
            4: (*DECISION, ("all_reduce", 4 * (28 + 20)), ("all_reduce", 4 * 38)),
            5: (("all_reduce", 4 * (28 + 20)), ("all_reduce", 4 * 38)),
        },
    ),
    Case("random_k", {"density": 0.05}, count=layerwise, nan="kept", collectives=DRAWN_24, **DRAWN),
    Case("random_k", {"density": 0.9}, count=nine_tenths, collectives=DRAWN_409, **DRAWN),
    Case("random_block", {"density": 0.05}, count=layerwise, nan="kept", collectives=DRAWN_24, **DRAWN),
    # What is subtracted is rounded to the precision of what stays: 2^-24 for each of |before|, |after| <= 2.
    Case(
        "sign_norm",
        nan="spreads",
        collectives=(("all_gather", 4 * 5 + 57),),
        rounding=3 * 2.0**-24,
        unpromised={"one huge value": "its tensor's elements share one magnitude"},
    ),
    Case("signsgd", **VOTE),
    Case("signum", {"beta": 0.5}, **VOTE),
    Case("onebit", collectives=(("all_gather", 8 * 5 + 57),), unpromised=OF_A_TENSOR, **QUANTIZED),
    # 8 rows of 27 elements, 20 of 11, and three vectors.
    Case(
        "onebit",
        {"scales": "row"},
        collectives=(("all_gather", 8 * (8 + 20 + 3) + 57),),
        unpromised=OF_A_TENSOR,
        **QUANTIZED,
    ),
    Case("qsgd", collectives=(("all_gather", 4 * BUCKETS + N),), unpromised=SQUARE, **QUANTIZED),
    Case(
        "qsgd", {"bits": 4}, collectives=(("all_gather", 4 * BUCKETS + 228),), unpromised=SQUARE, **QUANTIZED
    ),
    Case(
        "qsgd",
        {"bits": 2, "bucket": 8},
        collectives=(("all_gather", 4 * (27 + 1 + 28 + 2 + 1) + 114),),
        unpromised=SQUARE,
        nan="spreads",
        rounding=8 * 2.0**-24,  # as above, but a norm is decoded: sqrt(8) of the largest magnitude at most
    ),
    Case(
        "terngrad",
        collectives=(("all_gather", 4 * 5 + 114),),
        unpromised={"one huge value": "it is clipped"},
        **QUANTIZED,
    ),
    Case("terngrad", {"clip": None}, collectives=(("all_gather", 4 * 5 + 114),), **QUANTIZED),
    Case(
        "natural",
        collectives=(("all_gather", N),),
        nan="kept",
        rounding=QUANTIZED["rounding"],
        unpromised={"one huge value": "2^18 is the most that is sent in a step"},
    ),
    # Five blocks, one a tensor, and the owner adds W times the second rounding's error: W decoded values are
    # added, the sum divided and rounded, and its error subtracted.
    Case("block_int", collectives=two_rounds(4 + 256), nan="spreads", rounding=8 * 2.0**-24),
    Case("block_int", {"bits": 4}, collectives=two_rounds(4 + 128), nan="spreads", rounding=8 * 2.0**-24),
    Case("svd", {"rank": 2}, collectives=(("all_gather", 4 * (2 * (35 + 31) + 20)),), **SVD),
    Case("atomo", {"rank": 2}, message=matrix_atoms, **ATOMO),
    Case("gaussian_k", {"density": 0.05}, **BY_ESTIMATE),
    Case("gaussian_k", {"density": 0.05, **UNION}, gathers_only=False, **BY_ESTIMATE),
    Case("redsync", {"density": 0.05}, **BY_ESTIMATE),
    Case("redsync", {"density": 0.05, "search": "trimmed"}, **BY_ESTIMATE),
    Case("sidco", {"density": 0.05}, **FITTED),
    Case("sidco", {"density": 0.05, "distribution": "pareto", "stages": 2}, **BY_ESTIMATE),
    Case("sidco", {"density": 0.05, "distribution": "gamma", "stages": "fixed_ratio"}, **BY_ESTIMATE),
    Case("sidco", {"density": 0.05, "stages": 3, **UNION}, gathers_only=False, **FITTED),
    Case(
        "clt_k",
        {"density": 0.05},
        gathers_only=False,
        exact_with={"density": 1.0},
        count=overall,
        fixed_count=True,
        is_union=True,
        nan="kept",
        collectives=(("broadcast", 4 * 22), ("all_reduce", 4 * 22)),
        unpromised={"one huge value": "only the leader's largest are sent"},
    ),
    Case("micro", {"density": 0.05, "threshold": 0.03}, counts=in_slices, **FOLLOWS),
    Case("micro", {"density": 0.05, "threshold": 0.05, "band": "published"}, counts=in_slices, **FOLLOWS),
    Case("exdyna", {"density": 0.05, "threshold": 0.03}, counts=in_blocks, **FOLLOWS),
    Case(
        "deft",
        {"density": 0.05},
        counts=in_layers,
        decision=lambda world_size: 4 * len(partitions.layers(LAYOUT, world_size)),
        **DISJOINT,
    ),
]


@dataclass
class Step:
    """What one worker saw of one step."""

    before: Tensor
    after: Tensor
    mean: Tensor
    counted: dict[str, float]
    metrics: dict[str, float]
    density: float


Gradient = Callable[[int, int], Tensor]


def numbers(metrics: Mapping[str, float | Tensor]) -> dict[str, float]:
    """A reducer's metrics, those on the device too, as numbers."""
    return {name: float(value) for name, value in metrics.items()}


def run_steps(
    reducer: Reducer, comm: CountingComm, steps: range, memory: Tensor, gradient_of: Gradient = gradient
) -> list[Step]:
    """Steps of a worker with error feedback, two an epoch, on the memory's device; memory (n,) is changed."""
    seen = []
    for step in steps:
        mean = gradient_of(comm.rank, step).to(memory.device, copy=True)
        reducer.begin_step(Progress(epoch=step / 2, step=step, lr=0.1, steps_per_epoch=2))
        reducer.accumulate(memory, mean)
        before = memory.clone()
        reducer.reduce(memory, mean, comm)
        counted = comm.ledger.take()
        seen.append(Step(before, memory.clone(), mean, counted, numbers(reducer.metrics()), reducer.density))
    return seen


def run_case(case: Case, comm: CountingComm, num_steps: int = 6, device: torch.device = CPU) -> list[Step]:
    """A worker's first steps, from a fresh reducer and an empty memory."""
    memory = torch.zeros(N, device=device)
    return run_steps(case.build(rank=comm.rank, device=device), comm, range(num_steps), memory)

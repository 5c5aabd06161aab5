"""The one table of cases that drives the laws, and the small gradient that all rows share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from reducers import REDUCERS
from sage.comm import CountingComm
from sage.interfaces import Reducer, Seeds, Slot, lay_out

SHAPES = ((8, 3, 3, 3), (8,), (20, 11), (11,), (1,))
Collective = Literal["all_reduce", "all_gather"]
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
    fixed_count: bool = False
    """The count is the same at every step."""
    collectives: tuple[tuple[Collective, int], ...] | None = None
    """Every step's collectives and the bytes that a worker hands over, by hand from SHAPES; None: a
    sparsifier's, which follow from the counts."""
    rounding: float = 0.0
    """How far results may be off beyond the law's own bound, relative to the largest magnitude of what was
    given: for methods with matrix products or a narrower type. The row derives it."""
    unpromised: Mapping[Law, str] = field(default_factory=dict)
    """The laws that the method does not keep, each with the reason."""

    def __str__(self) -> str:
        return "-".join([self.reducer, *(str(value) for value in self.settings.values())])

    def build(self, layout: list[Slot] = LAYOUT, rank: int = 0, **changes: Any) -> Reducer:
        reducer = REDUCERS[self.reducer]
        config = reducer.Settings.model_validate({**self.settings, **changes})
        return reducer(config, layout, seeds=Seeds.derive(1, rank), device=torch.device("cpu"))


def layerwise(send: Tensor, metrics: dict[str, float]) -> int:
    """k of each tensor at a density of 0.05."""
    return sum(max(1, int(0.05 * slot.size)) for slot in LAYOUT)


def overall(send: Tensor, metrics: dict[str, float]) -> int:
    """k of all at a density of 0.05."""
    return int(0.05 * N)


def reached(send: Tensor, metrics: dict[str, float]) -> int:
    """What reaches the threshold that is logged."""
    return int((send.abs() >= metrics["threshold"]).sum())


TOPK = {"exact_with": {"density": 1.0}, "count": layerwise, "fixed_count": True}
GLOBAL = {"exact_with": {"density": 1.0}, "count": overall, "fixed_count": True}
BY_THRESHOLD = {"exact_with": {"threshold": 1e-30}, "count": reached, "nan": "kept"}
SAGE = {"density": 0.05, "threshold": 0.03}
UNION = {"exchange": "union"}

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


def run_steps(
    reducer: Reducer, comm: CountingComm, steps: range, memory: Tensor, gradient_of: Gradient = gradient
) -> list[Step]:
    """Steps of a worker with error feedback; memory (n,) is changed."""
    seen = []
    for step in steps:
        mean = gradient_of(comm.rank, step).clone()
        reducer.accumulate(memory, mean)
        before = memory.clone()
        reducer.reduce(memory, mean, comm)
        counted = comm.ledger.take()
        seen.append(Step(before, memory.clone(), mean, counted, reducer.metrics(), reducer.density))
    return seen


def run_case(case: Case, comm: CountingComm, num_steps: int = 6) -> list[Step]:
    """A worker's first steps, from a fresh reducer and an empty memory."""
    return run_steps(case.build(rank=comm.rank), comm, range(num_steps), torch.zeros(N))

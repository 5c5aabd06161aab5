"""A step of every reducer, as a multiple of the floor and of torch.topk."""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.gpu.measure import Timing, deterministic, timed
from benchmarks.reduce import (
    LAYOUTS,
    PROGRESS,
    VARIANTS,
    Gradients,
    fit_first_threshold,
    fit_threshold,
    make_entry,
)
from reducers import REDUCERS
from sage.exchange.comm import CountingComm, LocalComm
from sage.exchange.echo import EchoComm
from sage.exchange.exchange import Exchange
from sage.interfaces import Slot, lay_out

DENSITIES = (0.001, 0.01, 0.1, 0.0001)
"""In the order of worth."""
SMALL_SHAPES = [(60, 33), (60,), (8, 4, 3, 3), (8,), (20, 60), (1,)]
SLOW = ("svd", "atomo")
"""A step takes seconds: measured last, and once."""


def layout_of(name: str) -> list[Slot]:
    shapes = SMALL_SHAPES if name == "small" else LAYOUTS[name]()
    return lay_out((str(index), shape) for index, shape in enumerate(shapes))


class Case:
    """A layout on a device: its gradients, and what every reducer is compared with."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device, self.layout = name, device, layout_of(name)
        self.n = self.layout[-1].stop
        self.gradients = Gradients(self.layout, 0, device)
        self.fresh, self.grad = torch.empty(self.n, device=device), torch.empty(self.n, device=device)

    def next_gradient(self) -> None:
        self.gradients.fill(self.fresh)
        self.grad.copy_(self.fresh)

    @lru_cache  # noqa: B019  as long as the process
    def floor(self) -> Timing:
        """memory += gradient"""
        memory = torch.zeros(self.n, device=self.device)
        return timed(lambda: memory.add_(self.grad), self.device, self.next_gradient)

    @lru_cache  # noqa: B019
    def topk_by_layer(self, density: float) -> Timing:
        """memory += gradient, and torch.topk of each tensor's magnitudes: what selection costs by hand."""
        memory = torch.zeros(self.n, device=self.device)
        counts = [max(1, int(density * slot.size)) for slot in self.layout]

        def select() -> list[Tensor]:
            magnitudes = memory.add_(self.grad).abs()
            parts = (magnitudes[slot.start : slot.stop] for slot in self.layout)
            return [part.topk(k, sorted=False).indices for part, k in zip(parts, counts, strict=True)]

        return timed(select, self.device, self.next_gradient)

    @lru_cache  # noqa: B019
    def topk_of_all(self, density: float) -> Timing:
        """The same, of the whole gradient at once."""
        memory, k = torch.zeros(self.n, device=self.device), max(1, int(density * self.n))
        return timed(
            lambda: memory.add_(self.grad).abs().topk(k, sorted=False), self.device, self.next_gradient
        )

    @lru_cache  # noqa: B019
    def thresholds(self, density: float) -> tuple[float, float]:
        """The hard threshold, and SAGE's first one, that lead to about the target density."""
        constant = fit_threshold(self.layout, self.gradients, density)
        return constant, fit_first_threshold(self.layout, self.gradients, density, constant)


case_of = lru_cache(maxsize=1)(Case)


def measure_floor(name: str, setup: Setup) -> Iterator[Row]:
    case = case_of(name, setup.device)
    floor = case.floor()
    bytes_per_second = 12 * case.n / floor.queued * 1000
    yield {
        "layout": name,
        "elements": case.n,
        "floor, ms": floor.queued,
        "alone, ms": floor.alone,
        "host, ms": floor.host,
        "TB/s": bytes_per_second / 1e12,
    }


def measure_topk(name: str, density: float, setup: Setup) -> Iterator[Row]:
    """torch.topk by hand, which the reducers are compared with."""
    case = case_of(name, setup.device)
    for label, timing in {
        "torch.topk a tensor": case.topk_by_layer(density),
        "torch.topk of all": case.topk_of_all(density),
    }.items():
        yield _row(case, label, density, None, "any", timing)


def measure_reducer(name: str, label: str, density: float, world_size: int, setup: Setup) -> Iterator[Row]:
    """A row in torch's deterministic mode, and at the first density one without it."""
    case = case_of(name, setup.device)
    for mode in (True, False) if density == DENSITIES[0] and label not in SLOW else (True,):
        exchange = _exchange_of(case, label, density, world_size)
        with deterministic(mode):
            timing = timed(partial(exchange.average, case.grad, PROGRESS), setup.device, case.next_gradient)
        yield _row(
            case, label, density, world_size, "yes" if mode else "no", timing, exchange.reducer.density
        )


def _exchange_of(case: Case, label: str, density: float, world_size: int) -> Exchange:
    constant, first = case.thresholds(density) if label in ("sage", "threshold") else (1.0, 1.0)
    threshold = first if label == "sage" else constant
    comm: CountingComm = LocalComm.alone() if world_size == 1 else EchoComm()
    return make_entry(label, case.layout, density, threshold, comm, 0, case.device).exchange


def _row(
    case: Case,
    label: str,
    density: float,
    world_size: int | None,
    mode: str,
    timing: Timing,
    achieved: float | None = None,
) -> Row:
    return {
        "layout": case.name,
        "density": density if label.startswith("torch") or follows_density(label) else None,
        "method": label,
        "workers": world_size,
        "deterministic": mode,
        "ms": timing.queued,
        "x floor": timing.queued / case.floor().queued,
        "x faster than torch.topk a tensor": case.topk_by_layer(density).queued / timing.queued,
        "alone, ms": timing.alone,
        "host, ms": timing.host,
        "density sent": achieved,
    }


def follows_density(label: str) -> bool:
    fields = REDUCERS[VARIANTS[label][0]].Settings.model_fields
    return "density" in fields or ("densities" in fields and label == "accordion")


def checks(setup: Setup) -> list[Check]:
    names = ["small"] if setup.small else ["lstm", "resnet18"]
    sparse = [label for label in VARIANTS if follows_density(label)]
    dense = [label for label in VARIANTS if not follows_density(label) and label not in SLOW]
    found = [Check(f"{name}: floor", partial(measure_floor, name, setup)) for name in names]
    for density in DENSITIES[:1] if setup.small else DENSITIES:
        for name in names:
            found.append(
                Check(f"{name}, density {density:g}: torch.topk", partial(measure_topk, name, density, setup))
            )
            found += _checks_of(name, density, sparse, setup)
    for name in names:
        found += _checks_of(name, DENSITIES[0], dense, setup)
    return [*found, *_checks_of(names[-1], DENSITIES[0], SLOW, setup, world_sizes=(1,))]


def _checks_of(
    name: str, density: float, labels: Sequence[str], setup: Setup, world_sizes: Sequence[int] = (1, 2)
) -> Iterator[Check]:
    for label in labels:
        for world_size in world_sizes:
            yield Check(
                f"{name}, density {density:g}: {label}, {world_size} workers",
                partial(measure_reducer, name, label, density, world_size, setup),
            )


SECTION = Section(
    "reducers",
    "One step (error feedback's addition, selection, exchange) and its multiple of the floor, memory += "
    "gradient. ms: the device's time where the host is ahead of it, medians; alone: started on an idle "
    "device, where what the host needs to queue the step counts; host: until the call returns. 2 workers: a "
    "twin sends the same, nothing travels. resnet18: 11,173,962 elements in 62 tensors; lstm: 28,949,319 in "
    "14.",
    90,
    checks,
)

"""Would a method pay on another network? Predictions from what runs measured, and the model of sage.network.

A step is predicted as compute + compression + collectives. Compute is that of the exact average's runs, for
all methods alike, so that no method is blamed or praised for chance; compression is the method's own, as
measured; the collectives are worked out for any link and number of workers, from the bytes that the runs
counted. What grows with the number of workers W is extrapolated from the W0 of the runs:

- padding: a gather sends as many elements as the worker that selected the most. If the counts of all workers
  spread like a normal distribution, the largest is mean (1 + v e(W)), with v so that it fits at W0, and e(W)
  the expected maximum of W standard normal numbers (Blom 1958: the quantile at (W - 3/8) / (W + 1/4)).
- union: u(W) = min(1, d (u0 / d)^(ln W / ln W0)), a power of W through d at 1 and the measured u0 at W0.

Compression is taken as measured at W0, although decoding grows with W for what is gathered.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, log, sqrt
from statistics import NormalDist, fmean
from typing import Any, NamedTuple

from sage.network import (
    LATENCY_SECONDS,
    Call,
    Link,
    exact_calls,
    exposed_seconds,
    parse_speed,
    wire_bytes,
)
from sage.report.groups import Group, Section, exactness, is_overlapped
from sage.report.runs import COMPUTE, Run, mean_density, per_step

GATHERS = {"sign_norm": 1, "signsgd": 1, "signum": 1, "svd": 1, "atomo": 2}
GATHERS |= {"onebit": 1, "qsgd": 1, "terngrad": 1, "natural": 1}
GATHERS |= {"topk": 1, "global_topk": 1, "threshold": 2, "sage": 2}
GATHERS |= {"gaussian_k": 2, "redsync": 2, "sidco": 2, "micro": 2, "exdyna": 2, "deft": 2}
"""How many all-gathers a method makes in a step; of two the first tells the lengths."""
REDUCES = {"exact": 1, "random_k": 1, "random_block": 1, "powersgd": 2, "clt_k": 2, "block_int": 1}
"""How many all-reduces a method makes in a step; a broadcast counts as one, though it sends half as much.
block_int's all-to-all and all-gather are the two rounds of one, whose second one its bytes count again: they
are 1 / W too many. A method in neither table is taken to gather twice."""
DISJOINT = ("micro", "exdyna", "deft")
"""Methods whose workers select in parts of their own, and reduce the values at all selections: these are as
many with any number of workers, and each of them gathers its share."""


class Traffic(NamedTuple):
    """What one worker hands to collectives in a step, as measured, apart by kind."""

    reduced_bytes: float
    gathered_bytes: float
    padding_bytes: float


@dataclass(frozen=True)
class Method:
    """A configuration, as far as its step depends on the network."""

    label: str
    reducer: str
    compression_seconds: float
    traffic: Traffic
    num_reduces: int
    num_gathers: int
    world_size: int
    """Of the runs."""
    density: float
    union_density: float | None
    """Where the reduced bytes are values at the union of all workers' selections; else None."""
    is_disjoint: bool = False
    """Whether no two workers select the same."""

    def calls(self, world_size: int) -> list[Call]:
        """A step's collectives for so many workers."""
        reduced = self.traffic.reduced_bytes
        if self.union_density is not None and not self.is_disjoint:
            reduced *= union_at(world_size, self) / self.union_density
        gathered = self.traffic.gathered_bytes - self.traffic.padding_bytes
        gathered *= padding_factor(world_size, self)
        if self.is_disjoint:
            gathered *= self.world_size / world_size
        return [
            *[Call("all_reduce", reduced / max(1, self.num_reduces))] * self.num_reduces,
            *[Call("all_gather", gathered / max(1, self.num_gathers))] * self.num_gathers,
        ]


@dataclass(frozen=True)
class Workload:
    """What all methods of a section have in common."""

    compute_seconds: float
    backward_seconds: float
    num_elements: int
    exact_seconds: float
    """What the exact average takes beside its collective, as measured."""


class Baseline(NamedTuple):
    """An exact average that methods are compared with."""

    name: str
    bytes_per_element: int
    is_overlapped: bool


BASELINES = (
    Baseline("float32", 4, False),
    Baseline("bfloat16", 2, False),
    Baseline("float32 overlapped", 4, True),
    Baseline("bfloat16 overlapped", 2, True),
)


# --- growth with the number of workers --------------------------------------------------------------


def expected_maximum(count: int) -> float:
    """About the expected maximum of so many standard normal numbers."""
    return NormalDist().inv_cdf((count - 0.375) / (count + 0.25)) if count > 1 else 0.0


def padding_factor(world_size: int, method: Method) -> float:
    """The largest of the workers' messages, relative to their mean."""
    traffic, measured = method.traffic, expected_maximum(method.world_size)
    if not traffic.padding_bytes or not measured:
        return 1.0
    ratio = traffic.gathered_bytes / (traffic.gathered_bytes - traffic.padding_bytes)
    return 1 + (ratio - 1) * expected_maximum(world_size) / measured


def union_at(world_size: int, method: Method) -> float:
    """The density of the union of all workers' selections."""
    assert method.union_density is not None
    if method.world_size == 1 or not method.density or not method.union_density:
        return method.union_density
    growth = log(max(1.0, method.union_density / method.density)) / log(method.world_size)
    return float(min(1.0, method.density * world_size**growth))


# --- predictions ------------------------------------------------------------------------------------


def step_seconds(method: Method, workload: Workload, link: Link, world_size: int) -> float:
    """The seconds of a step of a method."""
    communication = link.total_seconds(method.calls(world_size), world_size)
    return workload.compute_seconds + method.compression_seconds + communication


def exact_step_seconds(baseline: Baseline, workload: Workload, link: Link, world_size: int) -> float:
    """The seconds of a step of the exact average."""
    n, size = workload.num_elements, baseline.bytes_per_element
    if baseline.is_overlapped:
        waiting = exposed_seconds(n, size, workload.backward_seconds, link, world_size)
    else:
        waiting = link.total_seconds(exact_calls(n, size), world_size)
    return workload.compute_seconds + workload.exact_seconds + waiting


SLOWEST, FASTEST = 1e3, 1e15
"""Bits per second between which the break-even is looked for."""


def break_even_speed(
    method: Method, workload: Workload, baseline: Baseline, latency_seconds: float, world_size: int
) -> float:
    """The bits per second below which a method's step is shorter than an exact average's; 0 where it is at no
    speed, infinity where it is at every speed.

    By bisection: the difference of the two, as a function of seconds per byte, bends upwards only, so that it
    changes its sign once where the method loses on a very fast link and wins on a very slow one.
    """

    def pays(speed: float) -> bool:
        link = Link(speed, latency_seconds)
        mine = step_seconds(method, workload, link, world_size)
        return mine < exact_step_seconds(baseline, workload, link, world_size)

    low, high = SLOWEST, FASTEST
    if not pays(low):
        return 0.0
    if pays(high):
        return inf
    for _ in range(100):
        middle = sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


# --- from runs --------------------------------------------------------------------------------------


def methods_of(section: Section) -> list[tuple[Group, Method]]:
    """Each finished configuration that sends something, other than the exact average in any format; of
    one that overlaps with backward it is not known what compression takes."""
    configs = [(group, group.runs[0].config) for group in section.groups if group.done]
    groups = [group for group, config in configs if not exactness(config) and not is_overlapped(config)]
    return [(group, method_of(group)) for group in groups if group.runs[0].world_size > 1]


def method_of(group: Group) -> Method:
    """What a configuration's runs measured, means over seeds."""
    run, mean = group.runs[0], _mean_over(group)
    reducer = _sending(run)
    is_union = run.config.get("reducer.exchange") == "union" or reducer in DISJOINT
    unions = [line["union_density"] for run in group.runs for line in run.steps if line.get("union_density")]
    union = fmean(unions) if is_union and unions else None
    densities = group.values(mean_density)
    traffic = divide_traffic(group, union)
    known = reducer in REDUCES or reducer in GATHERS
    return Method(
        label=group.short_label,
        reducer=str(run.config["reducer.name"]),
        compression_seconds=mean(lambda run: _seconds(run, "reduce") - _seconds(run, "communicate")),
        traffic=traffic,
        num_reduces=1 if union else REDUCES.get(reducer, 0 if known else int(traffic.reduced_bytes > 0)),
        num_gathers=2 if union else GATHERS.get(reducer, 0 if known else 2 * int(traffic.gathered_bytes > 0)),
        world_size=run.world_size,
        density=fmean(densities) if densities else 1.0,
        union_density=union,
        is_disjoint=reducer in DISJOINT,
    )


def divide_traffic(group: Group, union_density: float | None) -> Traffic:
    """The measured payload P, as what is all-reduced (A) and what is all-gathered (G).

    A known method does the one or the other, or sends 4 u n bytes of values at the union. Of another method
    P = A + G and the bytes on the wire R = 2 (W - 1) / W A + (W - 1) G say which, except for two workers,
    where all is taken to be gathered.
    """
    run, mean = group.runs[0], _mean_over(group)
    payload, padding = mean(lambda run: per_step(run, "bytes.payload")), mean(_padding)
    reducer, world_size = _sending(run), run.world_size
    if union_density is not None:
        reduced = min(payload, 4 * union_density * _num_elements([group]))
    elif reducer in REDUCES:
        reduced = payload
    elif reducer in GATHERS or world_size == 2:
        reduced = 0.0
    else:
        wire = mean(lambda run: per_step(run, "bytes.wire"))
        all_gathered = (world_size - 1) * payload
        apart = (world_size - 1) * (1 - 2 / world_size)
        reduced = min(payload, max(0.0, (all_gathered - wire) / apart))
    return Traffic(reduced, payload - reduced, padding)


def workload_of(section: Section, compute_seconds: float | None = None) -> Workload | None:
    """What a section's methods have in common; None where no finished run tells the gradient's size.

    compute_seconds: of a step, in place of what was measured; the backward pass has its measured share of it.
    """
    done = [group for group in section.groups if group.done]
    num_elements = _num_elements(done)
    if not num_elements:
        return None
    exact = [group for group in done if exactness(group.runs[0].config) == 2]
    timed = exact or [group for group in done if not is_overlapped(group.runs[0].config)] or done
    measured = fmean(_compute(run) for group in timed for run in group.runs)
    backward = fmean(_seconds(run, "backward") for group in timed for run in group.runs)
    compute = measured if compute_seconds is None else compute_seconds
    return Workload(
        compute_seconds=compute,
        backward_seconds=backward * compute / measured if measured else 0.0,
        num_elements=num_elements,
        exact_seconds=method_of(exact[0]).compression_seconds if exact else 0.0,
    )


def _sending(run: Run) -> str:
    """The reducer that sends: of a wrapper the inner one."""
    return str(run.config.get("reducer.inner") or run.config["reducer.name"])


def _num_elements(groups: Sequence[Group]) -> int:
    """The size of the gradient; 0 where no run tells it."""
    sizes = [
        run.summary["parameters"] for group in groups for run in group.runs if "parameters" in run.summary
    ]
    return int(sizes[0]) if sizes else 0


def _mean_over(group: Group) -> Callable[[Callable[[Run], float]], float]:
    return lambda measure: fmean(map(measure, group.runs))


def _seconds(run: Run, phase: str) -> float:
    return per_step(run, f"seconds.{phase}")


def _compute(run: Run) -> float:
    return sum(_seconds(run, phase) for phase in COMPUTE)


def _padding(run: Run) -> float:
    return per_step(run, "bytes.padding")


# --- against measurements ---------------------------------------------------------------------------


class Comparison(NamedTuple):
    """A predicted time of the collectives beside a measured one."""

    what: str
    predicted_seconds: float
    measured_seconds: float

    @property
    def error(self) -> float:
        """Relative to what was measured; positive where the prediction is too long."""
        return self.predicted_seconds / self.measured_seconds - 1


def compare_with_measured(
    rows: Sequence[Mapping[str, Any]], latency_seconds: float = LATENCY_SECONDS
) -> list[Comparison]:
    """Compare the model with rows that `python -m benchmarks.network --json FILE` measured.

    A row has reducer, settings, hosts, rate (as in 1gbit), wire_bytes of a step, num_collectives, and
    communication_ms.
    """
    compared = []
    for row in rows:
        world_size, name = int(row["hosts"]), str(row["reducer"])
        one = Call("all_reduce" if name in REDUCES else "all_gather", 1.0)
        # the bytes of one collective, from those that all of them sent
        payload = row["wire_bytes"] / wire_bytes([one], world_size) / row["num_collectives"]
        calls = [Call(one.kind, payload)] * round(row["num_collectives"])
        link = Link(parse_speed(str(row["rate"])), latency_seconds)
        given = (
            f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}"
            for key, value in row["settings"].items()
        )
        settings = " ".join(given)
        what = f"{row['layout']} {name} {settings}".strip() + f", {row['rate']}"
        predicted = link.total_seconds(calls, world_size)
        compared.append(Comparison(what, predicted, row["communication_ms"] / 1000))
    return compared

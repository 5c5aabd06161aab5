"""The numbers behind the report's curves: of one run, and over the seeds of a configuration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import isnan, nan
from statistics import fmean
from typing import NamedTuple

from sage.report.groups import Group
from sage.report.runs import Flat, Run, training_seconds
from sage.report.spread import Band, Spread

TITLES = {
    "epochs": "Score over epochs",
    "bytes": "Score over bytes",
    "seconds": "Score over seconds",
    "density": "Density",
    "threshold": "Threshold",
    "time": "Time per step",
}
"""The titles of a picture's panels, by name."""
UNITS = {"accuracy": "fraction", "perplexity": "tokens", "density": "fraction", "threshold": "|gradient|"}
LOG_FACTOR = 20
"""The axis of bytes is logarithmic where they differ by a larger factor."""
NARROW = 3
"""A log axis shows at least this factor on both sides where its values are nearly the same."""
Points = list[tuple[float, float]]


class CurvePoint(NamedTuple):
    """x and y, means over the seeds, and the band around y; the band is y itself for a single seed."""

    x: float
    mean: float
    low: float
    high: float


Curve = list[CurvePoint]


def average_curve(group: Group, of: Callable[[Run], Points], band: Band) -> Curve:
    """The curve over all seeds, as far as the shortest run."""
    if len(group.runs) == 1:
        return as_curve(of(group.runs[0]))
    curve: Curve = []
    for points in zip(*map(of, group.runs), strict=False):  # a point of each seed
        xs, ys = zip(*points, strict=True)
        mean = fmean(ys)
        width = 0.0 if isnan(mean) else Spread.of(ys, band).width or 0.0
        curve.append(CurvePoint(fmean(xs), mean, mean - width, mean + width))
    return curve


# --- of one run -----------------------------------------------------------------------------------


def score_values(run: Run) -> list[float]:
    return [float(line["score.value"]) for line in run.epochs]


def _over_total(count: Callable[[Flat], float]) -> Callable[[Run], Points]:
    """Make a function from a run to its score after each epoch, over the total of a count until then."""

    def points(run: Run) -> Points:
        return list(zip(accumulate(map(count, run.epochs)), score_values(run), strict=True))

    return points


def _over_epochs(run: Run) -> Points:
    return [(line["epoch"] + 1.0, value) for line, value in zip(run.epochs, score_values(run), strict=True)]


@dataclass(frozen=True)
class ScoreAxis:
    """What a score is drawn over, in one panel."""

    what: str
    label: str
    points: Callable[[Run], Points]
    is_log_where_wide: bool = False
    """The axis is logarithmic where its values differ by a large factor."""
    is_whole: bool = False
    """Only whole numbers have a tick."""


SCORE_AXES = {
    "epochs": ScoreAxis("epochs", "training (epochs)", _over_epochs, is_whole=True),
    "bytes": ScoreAxis(
        "bytes", "sent by one worker (MB)", _over_total(lambda line: line["bytes.wire"] / 1e6), True
    ),
    "seconds": ScoreAxis("seconds", "training steps (s)", _over_total(training_seconds)),
}


def over_steps(run: Run, name: str) -> Points:
    """A run's (step, value) pairs; 0, which a log axis cannot show, is a gap; a dense run has no pairs."""
    values = [(line["step"], line[name] or nan) for line in run.steps if line.get(name) is not None]
    return values if name == "threshold" or any(value != 1 for _, value in values) else []


def as_curve(points: Points) -> Curve:
    """Points as a curve without a band."""
    return [CurvePoint(x, y, y, y) for x, y in points]


def target_densities(groups: Sequence[Group]) -> list[Points]:
    """The different target densities over steps."""
    targets = {tuple(over_steps(group.runs[0], "target_density")) for group in groups} - {()}
    return list(map(list, sorted(targets)))


# --- axes -----------------------------------------------------------------------------------------


def with_unit(score: str) -> str:
    """A score's name as an axis says it."""
    return f"{score} ({UNITS.get(score, 'no unit')})"


def is_wide(xs: Sequence[float]) -> bool:
    """Whether the values differ so much that their axis is logarithmic."""
    return bool(xs) and min(xs) > 0 and max(xs) > LOG_FACTOR * min(xs)


class LogLimits(NamedTuple):
    """The ends of a log axis; None where it may choose them itself."""

    low: float | None
    high: float | None


def log_limits(curves: Sequence[Curve]) -> LogLimits | None:
    """What a log axis shows of curves: neither do tiny differences fill it, nor does a band that reaches 0
    stretch it. None where no curve has a value, of which it could show nothing."""
    means = [point.mean for points in curves for point in points if not isnan(point.mean)]
    if not means:
        return None
    high = max(point.high for points in curves for point in points if not isnan(point.high))
    if high < NARROW * min(means) or any(point.low <= 0 for points in curves for point in points):
        return LogLimits(min(means) / NARROW, high * NARROW)
    return LogLimits(None, None)

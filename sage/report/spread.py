"""The spread of a number over seeds: standard deviation, interval of the mean, paired differences.

The report's tables and the bands in its pictures say the same, since both take it from here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi, sin, sqrt, tan
from statistics import fmean, stdev
from typing import Literal, NamedTuple

Band = Literal["std", "ci95"]
"""What follows ±, and how wide a band is: the standard deviation, or a 95 % interval of the mean."""
BANDS: dict[Band, str] = {
    "std": "± standard deviation over seeds",
    "ci95": "± 95 % interval of the mean over seeds (Student's t)",
}
CONFIDENCE = 0.95


class Spread(NamedTuple):
    """The mean of some values, and how far they spread around it; None where there are too few."""

    mean: float | None
    width: float | None

    @classmethod
    def of(cls, values: Sequence[float], band: Band = "std") -> "Spread":
        """width: the sample standard deviation s, or t s / sqrt(n), half of the mean's 95 % interval."""
        if len(values) < 2:
            return cls(fmean(values) if values else None, None)
        deviation = stdev(values)
        if band == "std":
            return cls(fmean(values), deviation)
        return cls(fmean(values), t_quantile(len(values) - 1) * deviation / sqrt(len(values)))


def t_quantile(freedom: int) -> float:
    """The t with which |Student's t| is at most t in 95 % of all cases, by bisection of the angle.

    freedom: degrees of freedom, 1 or more. 4.303 for 2, as with three seeds; 1.96 for very many.
    """
    low, high = 0.0, pi / 2
    for _ in range(60):  # halves an angle below 2 to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < CONFIDENCE else (low, middle)
    return tan(low) * sqrt(freedom)


def t_probability(angle: float, freedom: int) -> float:
    """The probability that |Student's t| is at most tan(angle) sqrt(freedom).

    The finite sums of Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    is_odd = freedom % 2
    term = total = 0.0
    if freedom > 1:
        term = total = cos(angle) if is_odd else 1.0
    # odd:  cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 + ... to cos^(freedom - 2)
    # even: 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...   to cos^(freedom - 2)
    for power in range(3 if is_odd else 2, freedom - 1, 2):
        term *= (power - 1) / power * cos(angle) ** 2
        total += term
    return 2 / pi * (angle + sin(angle) * total) if is_odd else sin(angle) * total


@dataclass(frozen=True)
class Difference:
    """How much larger a number is than a baseline's, over the seeds that both have."""

    mean: float
    half_width: float | None
    """Half of the mean's 95 % interval; None for a single pair."""
    num_pairs: int


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Compare numbers by seed with those of a baseline; None where no seed has both.

    The pairs share their first weights and their order of data, so that their differences spread less than
    the numbers do.
    """
    differences = [value - baseline[seed] for seed, value in values.items() if seed in baseline]
    if not differences:
        return None
    mean, half_width = Spread.of(differences, "ci95")
    assert mean is not None
    return Difference(mean, half_width, len(differences))

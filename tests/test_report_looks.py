"""Looks and spreads: colours that can be told apart, intervals and probabilities against scipy."""

from itertools import combinations
from math import atan, sqrt

import numpy as np
import pytest
from scipy import stats

from reducers import REDUCERS
from sage.report.looks import COLOURS, LOOKS, SPARE, look_of, styles_of
from sage.report.spread import Spread, paired_difference, t_probability, t_quantile

# Machado, Oliveira and Fernandes 2009, "A physiologically-based model for simulation of color vision
# deficiency", the matrices of the full deficiency, on linear RGB.
EYES = {
    "most": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.3039],
    ],
}


def linear(colour: str) -> np.ndarray:
    """#rrggbb as linear RGB (3,), by the standard of sRGB."""
    values = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (3,) of linear RGB, white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", EYES)
def test_colours_differ_for_every_kind_of_eyes(eyes: str) -> None:
    seen = [lab(np.clip(EYES[eyes] @ linear(colour), 0, 1)) for colour in COLOURS]
    # 2.3 can just be noticed; lines are thin, so ten times that is asked for
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 23


def test_colours_stand_out_on_white() -> None:
    # WCAG 2.1, 1.4.11: a contrast of 3:1 for graphics
    luminances = [linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in COLOURS]
    assert all(1.05 / (luminance + 0.05) >= 3 for luminance in luminances)


def test_every_reducer_has_a_look_that_no_other_has_without_colour_either() -> None:
    assert set(REDUCERS) <= set(LOOKS)
    assert len({(look.marker, look.dash) for look in LOOKS.values()}) == len(LOOKS)
    pairs = [(look.colour, look.dash) for look in (*LOOKS.values(), *SPARE)]
    assert len(set(pairs)) == len(pairs)


def test_a_reducer_looks_the_same_whatever_else_is_drawn() -> None:
    alone, among = styles_of(["sage"])[0], styles_of(["own:Class", "exact", "sage", "topk"])[2]
    assert alone == among
    assert look_of("own:Class") == look_of("own:Class")
    assert look_of("own:Class") not in LOOKS.values()


def test_no_two_configurations_are_drawn_alike() -> None:
    unknown = [f"module:Class{i}" for i in range(20)]  # more than there are spare looks
    styles = styles_of([*unknown, *["topk"] * 20])
    assert len(set(styles)) == 40


# --- spreads --------------------------------------------------------------------------------------


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 29, 100])
def test_students_t_is_scipys(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)
    for t in (0.1, 1.0, 3.0):
        inside = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
        assert t_probability(atan(t / sqrt(freedom)), freedom) == pytest.approx(inside, rel=1e-9)


def test_an_interval_is_scipys_and_one_value_has_none() -> None:
    values = [0.91, 0.93, 0.90, 0.95]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    mean, half = Spread.of(values, "ci95")
    assert mean is not None
    assert half is not None
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-9)
    assert Spread.of(values).width == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert Spread.of([0.5]) == (0.5, None)
    assert Spread.of([]) == (None, None)


def test_a_paired_difference_is_scipys_paired_test() -> None:
    mine, theirs = {1: 0.9, 2: 0.85, 3: 0.8, 7: 0.1}, {1: 0.88, 2: 0.86, 3: 0.75, 9: 0.5}
    difference = paired_difference(mine, theirs)
    seeds = (1, 2, 3)
    test = stats.ttest_rel([mine[s] for s in seeds], [theirs[s] for s in seeds]).confidence_interval(0.95)
    assert difference is not None
    assert difference.half_width is not None
    assert difference.num_pairs == 3
    low, high = difference.mean - difference.half_width, difference.mean + difference.half_width
    assert (low, high) == pytest.approx((test.low, test.high), rel=1e-9)
    assert paired_difference({1: 0.5}, {2: 0.5}) is None

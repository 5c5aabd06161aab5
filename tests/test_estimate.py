"""Statistics, fitted quantiles and blocks that move, against numpy, scipy and numbers by hand."""

import numpy as np
import pytest
import torch
from scipy import stats

from reducers.estimate import BLOCK, Magnitudes
from reducers.exdyna import balanced
from reducers.sidco import exponential, gamma, pareto, upper_gamma_quantile

EPSILON = 2.0**-24


@pytest.mark.parametrize("n", [1, BLOCK - 1, BLOCK, 3 * BLOCK + 7])
def test_statistics_are_those_of_numpy_in_float64(n: int) -> None:
    values = np.random.RandomState(n).standard_t(3, n).astype(np.float32)
    exact, ours = np.abs(values.astype(np.float64)), Magnitudes(torch.from_numpy(values))
    # A sum of positive numbers, at most BLOCK in float32: each addition rounds by EPSILON.
    bound = BLOCK * EPSILON
    assert ours.mean() == pytest.approx(exact.mean(), rel=bound)
    assert ours.mean_square() == pytest.approx((exact**2).mean(), rel=2 * bound)
    assert ours.largest() == exact.max()
    mean, deviation = ours.signed_moments()
    assert mean == pytest.approx(values.mean(dtype=np.float64), abs=bound * exact.mean())
    if n > 1:
        assert deviation == pytest.approx(values.std(dtype=np.float64, ddof=1), rel=2 * bound)
    else:
        assert deviation == 0


def test_squares_beyond_float32_are_added_in_float64() -> None:
    values = torch.tensor([3e37, 1.0, -1.0])
    assert Magnitudes(values).mean_square() == pytest.approx(3e74, rel=4 * EPSILON)


def test_zeros_have_no_logarithm() -> None:
    mean_log, count = Magnitudes(torch.tensor([0.0, 1.0, -np.e, 0.0, np.e**2])).mean_log()
    assert count == 3
    assert mean_log == pytest.approx(1.0, rel=4 * EPSILON)
    assert Magnitudes(torch.zeros(3)).mean_log() == (0.0, 0)


def test_a_threshold_finds_what_reaches_it_whatever_was_asked_before() -> None:
    values = torch.from_numpy(np.random.RandomState(0).randn(1000).astype(np.float32))
    magnitudes = Magnitudes(values)
    for threshold in (1.0, 2.0, 0.5, 1.5, 0.0):
        expected = (values.abs() >= threshold).nonzero().view(-1)
        indices, found = magnitudes.reaching(threshold)
        assert torch.equal(indices, expected)
        assert torch.equal(found, values[expected].abs())
        assert magnitudes.count(threshold) == len(expected)


@pytest.mark.parametrize("share", [0.25, 0.01, 1e-4])
def test_fitted_quantiles_are_those_of_scipy(share: float) -> None:
    assert exponential(share, 2.0) == pytest.approx(stats.expon.isf(share, scale=2.0), rel=1e-12)
    for shape in (0.3, 1.0, 7.0):
        assert upper_gamma_quantile(shape, share) == pytest.approx(stats.gamma.isf(share, shape), rel=1e-9)
    for xi in (-0.4, 0.0, 0.3):
        own = stats.genpareto(xi, scale=1.5)
        assert pareto(share, own.mean(), own.var()) == pytest.approx(own.isf(share), rel=1e-9)


def test_a_gamma_distribution_is_found_again() -> None:
    """Of the shape's closed form its authors say that it is within 1.5 % (Minka 2002)."""
    for shape in (0.5, 1.0, 3.0):
        own = stats.gamma(shape, scale=2.0)
        mean_log = own.expect(np.log)
        assert gamma(0.01, own.mean(), mean_log) == pytest.approx(own.isf(0.01), rel=0.015)


def test_magnitudes_that_are_all_alike_are_their_own_quantile() -> None:
    assert gamma(0.01, 2.0, float(np.log(2.0))) == pareto(0.01, 2.0, 0.0) == 2.0


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ([20, 8, 8], [3, 5, 4]),  # mean 12: a block to the right; then 18 and 10: no more
        ([8, 20, 8], [5, 2, 5]),  # one to the left; then part 1 has 18 still: one to the right
        ([12, 12, 12], [4, 4, 4]),
        ([0, 0, 0], [4, 4, 4]),
    ],
)
def test_a_block_moves_from_a_part_that_selected_much_to_a_neighbour(
    counts: list[int], expected: list[int]
) -> None:
    assert balanced([4, 4, 4], counts, of_a_block=2, least=1.0) == expected


def test_a_part_keeps_its_least() -> None:
    assert balanced([2, 6], [20, 4], of_a_block=2, least=2.0) == [2, 6]
    assert balanced([3, 5], [20, 4], of_a_block=2, least=2.0) == [2, 6]

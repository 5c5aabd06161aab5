"""Truncated SVD and ATOMO against numpy's SVD, and ATOMO's probabilities and expectation."""

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers.atomo import Atomo, AtomoSettings, probabilities
from reducers.svd import SVD, SVDSettings
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds
from tests.cases import layout_of

CPU = torch.device("cpu")
SHAPES = ((12, 30), (30, 12), (12, 5, 6), (7,))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def svd(rank: int, *shapes: tuple[int, ...]) -> SVD:
    return SVD(SVDSettings(rank=rank), layout_of(shapes), seeds=Seeds(1, 2), device=CPU)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_matrices_of_rank_r_are_recovered_by_rank_r(rank: int) -> None:
    pieces = [
        random(12, rank) @ random(rank, 30),
        random(30, rank, seed=1) @ random(rank, 12),
        (random(12, rank, seed=2) @ random(rank, 30)).view(12, 5, 6),
        random(7),
    ]
    send = torch.cat([piece.flatten() for piece in pieces])
    before, mean = send.clone(), torch.empty_like(send)
    svd(rank, *SHAPES).reduce(send, mean, LocalComm.alone())
    # 34 roundings of 2^-24 (products of rank terms, u_i^T A of 30) of the largest singular value, which is at
    # most sqrt(360) max|A|: 4e-5, in A's factors and in the mean's product.
    assert (mean - before).abs().max() <= 1e-4 * before.abs().max()
    assert send.abs().max() <= 1e-4 * before.abs().max()
    assert torch.equal(mean[-7:], before[-7:])


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_left_is_the_tail_of_the_singular_values(rank: int) -> None:
    send = random(360 + 360)
    before, mean = send.clone(), torch.empty_like(send)
    svd(rank, (12, 30), (30, 12)).reduce(send, mean, LocalComm.alone())
    for start, shape in ((0, (12, 30)), (360, (30, 12))):
        values = np.linalg.svd(before[start : start + 360].view(shape).double().numpy(), compute_uv=False)
        left = np.linalg.svd(send[start : start + 360].view(shape).double().numpy(), compute_uv=False)
        # The nearest matrix of a rank (Eckart and Young 1936) leaves the other singular values as they are.
        # Rounding moves them by its norm at most (Weyl): 2^-24 norm(A) each time, and norm(A) is 11 times the
        # least value here, so 6.6e-7 of it; 1e-5 allows for 15 roundings.
        assert np.allclose(left[: 12 - rank], values[rank:], rtol=1e-5, atol=0)


def test_a_matrix_whose_atoms_are_no_smaller_is_sent_exactly() -> None:
    send = random(36)
    before, mean = send.clone(), torch.empty_like(send)
    reducer = svd(3, (6, 6))  # 3 (6 + 6) = 6 * 6
    reducer.reduce(send, mean, LocalComm.alone())
    assert torch.equal(mean, before)
    assert reducer.expected_payload_bytes(2) == 4 * 36


@pytest.mark.parametrize(
    ("values", "budget", "expected"),
    [
        ([4.0, 2.0, 1.0, 1.0], 2, [1.0, 0.5, 0.25, 0.25]),  # sigma_0 s = sum: nobody is certain by force
        ([3.0, 3.0, 1.0, 1.0], 2, [0.75, 0.75, 0.25, 0.25]),
        ([10.0, 2.0, 1.0, 1.0], 2, [1.0, 0.5, 0.25, 0.25]),
        ([10.0, 9.0, 1.0, 1.0], 3, [1.0, 1.0, 0.5, 0.5]),
        ([5.0, 0.0, 0.0, 0.0], 2, [1.0, 0.0, 0.0, 0.0]),
        ([0.0, 0.0, 0.0, 0.0], 2, [0.0, 0.0, 0.0, 0.0]),
        ([1.0, 1.0, 1.0, 1.0], 1, [0.25, 0.25, 0.25, 0.25]),
    ],
)
def test_the_probabilities_are_those_of_water_filling(
    values: list[float], budget: int, expected: list[float]
) -> None:
    batch = torch.tensor([values, [1.0, 1.0, 1.0, 1.0]])
    assert probabilities(batch, budget).tolist() == [expected, [budget / 4] * 4]


def test_no_other_probabilities_have_less_variance() -> None:
    values = random(1, 10).abs().double().sort(descending=True).values
    best = probabilities(values, 3)[0]
    assert best.sum().item() == pytest.approx(3, rel=1e-12)
    variance = (values[0] ** 2 / best).sum()
    rng = torch.Generator().manual_seed(1)
    for _ in range(200):
        other = best + 0.1 * torch.randn(10, generator=rng, dtype=torch.float64)
        other = (other - (other - best).mean()).clamp(0.01, 1)
        assert other.sum() > 3 or (values[0] ** 2 / other).sum() >= variance


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_atomo_is_right_in_the_mean(shape: tuple[int, int]) -> None:
    num_draws = 4000  # as many equal matrices, each drawn for itself
    layout = layout_of((shape,) * num_draws)
    reducer = Atomo(AtomoSettings(rank=2), layout, seeds=Seeds(1, 2), device=CPU)
    a = random(*shape)
    mean = torch.empty(54 * num_draws)
    reducer.reduce(a.flatten().repeat(num_draws), mean, LocalComm.alone())
    draws = mean.view(num_draws, *shape).double()
    error = draws.std(0) / num_draws**0.5
    # 54 averages of 4000 draws, about normal: one is 5.2 standard errors off with probability 54 * 2e-7,
    # and they are not right by never changing: an atom that travels with p has variance sigma^2 (1/p - 1).
    assert ((draws.mean(0) - a).abs() <= 5.2 * error).all()
    assert (error > 1e-3).sum() > 27
    # sum p = 2, and the count's variance is at most 6/4, so its average has a standard error below 0.0194.
    num_atoms = torch.linalg.matrix_rank(draws, rtol=1e-5).double().mean()
    assert abs(num_atoms - 2) <= 5.2 * 0.0194

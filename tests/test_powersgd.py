"""PowerSGD: what its factors approximate, and how the approximation behaves over steps."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.waits import Waits
from reducers import powersgd
from reducers.lowrank import Matrices, gram_schmidt_together, matrix_shape, orthonormalize
from reducers.powersgd import PowerSGD, PowerSGDSettings
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds, Slot
from tests.cases import LAYOUT, N, gradient, layout_of, run_steps

ROWS, COLUMNS = 30, 40
MATRIX = layout_of(((ROWS, COLUMNS),))
FORMS = ("two_sided", "alternating")


def build(layout: list[Slot] = MATRIX, **settings: object) -> PowerSGD:
    config = PowerSGDSettings.model_validate({"min_compression_rate": 0, **settings})
    return PowerSGD(config, layout, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))


def fixed_matrix(singular_values: list[float]) -> Tensor:
    """(1200,): a matrix 30 x 40 with these singular values, flat."""
    rng = np.random.RandomState(0)
    left, right = (np.linalg.qr(rng.randn(size, len(singular_values)))[0] for size in (ROWS, COLUMNS))
    return torch.from_numpy(((left * singular_values) @ right.T).astype(np.float32)).view(-1)


def errors_on(matrix: Tensor, num_steps: int, **settings: object) -> list[float]:
    """norm(M - approximation) / norm(M) of each step on one matrix, without feedback."""
    reducer, errors = build(**settings), []
    for _ in range(num_steps):
        mean = matrix.clone()
        reducer.reduce(matrix.clone(), mean, LocalComm.alone())
        # In float64: a float32 sum of 1,200 squares is rounded otherwise from machine to machine.
        errors.append(((matrix.double() - mean.double()).norm() / matrix.double().norm()).item())
    return errors


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_of_rank_r_is_recovered_by_rank_r(form: str) -> None:
    errors = errors_on(fixed_matrix([3.0, 2.0, 1.0]), 2, rank=3, form=form)
    # 40-term products; columns conditioned below 100: 40 * 100 * 2^-24
    assert errors[-1] <= 2.4e-4


@pytest.mark.parametrize("form", FORMS)
def test_warm_starts_approach_the_best_approximation_of_that_rank(form: str) -> None:
    values = [0.8**index for index in range(30)]
    best = float(np.sqrt(np.square(values[2:]).sum() / np.square(values).sum()))  # Eckart and Young
    errors = errors_on(fixed_matrix(values), 40, rank=2, form=form)
    assert errors[0] > 1.02 * best
    # Power iteration converges monotonically: as (sigma_3 / sigma_2)^(2 steps). The mean has some 4 float32
    # roundings of 2^-24, from its factors and their product of 2 terms: 2.4e-7 of norm(M). What tilts the
    # factors counts by its square.
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(errors))
    assert best - 1e-6 <= errors[-1] <= 1.0001 * best


def test_cold_starts_do_not() -> None:
    matrix = fixed_matrix([0.8**index for index in range(30)])
    cold, warm = (errors_on(matrix, 20, rank=2, warm_start=is_warm) for is_warm in (False, True))
    assert np.mean(cold[10:]) > 1.1 * warm[-1]


def test_both_residuals_lead_to_the_same_means_and_the_local_one_is_smaller() -> None:
    # In float64: warm starts feed rounding back, by a factor of about 1.5 a step (golden/README.md).
    def means(comm: LocalComm, residual: str) -> tuple[list[Tensor], float]:
        reducer, memory = build(LAYOUT, rank=2, residual=residual), torch.zeros(N, dtype=torch.float64)
        reducer.p, reducer.q = reducer.p.double(), reducer.q.double()
        steps = run_steps(reducer, comm, range(8), memory, lambda rank, step: gradient(rank, step).double())
        return [step.mean for step in steps], memory.norm().item()

    local, local_norm = LocalComm.run(3, lambda comm: means(comm, "local"))[0]
    mean, mean_norm = LocalComm.run(3, lambda comm: means(comm, "mean"))[0]
    for a, b in zip(local, mean, strict=True):
        # The table's rounding of low rank, 3 * 27 * 30 * 2^-53 = 2.7e-13 a step; grown by 1.5 in each of 8
        # steps and summed, 50 times that: 1.4e-11. A mean that is another one is off by per cent.
        assert (a - b).abs().max() <= 1e-9 * a.abs().max()
    assert local_norm < mean_norm


def test_more_iterations_leave_less() -> None:
    values = fixed_matrix([0.9**index for index in range(30)])
    one, four = (errors_on(values, 1, form="alternating", iterations=count)[0] for count in (1, 4))
    assert four < 0.8 * one


def test_before_the_start_step_the_mean_is_exact() -> None:
    reducer, comm = build(LAYOUT, rank=1, start_step=2), LocalComm.alone()
    first, second, third = run_steps(reducer, comm, range(3), torch.zeros(N))
    for step in (first, second):
        assert torch.equal(step.mean, step.before)
    assert not torch.equal(third.mean, third.before)


@pytest.mark.parametrize("method", ["qr", "gram_schmidt", "together"])
@pytest.mark.parametrize("kind", ["random", "zero", "one zero column", "equal columns", "huge", "square"])
def test_columns_become_orthonormal_whatever_they_were(method: str, kind: str) -> None:
    rng = torch.Generator().manual_seed(3)
    block = torch.randn(5, 4 if kind == "square" else 9, 4, generator=rng)  # (B, n, r)
    if kind == "zero":
        block.zero_()
    elif kind == "one zero column":
        block[:, :, 1] = 0
    elif kind == "equal columns":
        block[:, :, 2] = block[:, :, 0]
    elif kind == "huge":
        block *= 1e37
    before = block.clone()
    if method == "together":  # beside taller and wider ones
        others = [torch.randn(2, rows, width, generator=rng) for rows, width in ((14, 4), (16, 3), (200, 4))]
        gram_schmidt_together([others[0], block, *others[1:]])
        for other in others:
            # As below, of 200 terms.
            assert (other.mT @ other - torch.eye(other.shape[2])).abs().max() <= 16 * 200 * 2.0**-24
    else:
        orthonormalize([block], method)
    # 2^-24 times the terms of a product and a few roundings of each
    assert (block.mT @ block - torch.eye(4)).abs().max() <= 16 * 9 * 2.0**-24
    if kind == "random":  # they span the same space
        inside = block @ (block.mT @ before)
        assert (inside - before).abs().max() <= 64 * 9 * 2.0**-24 * before.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_does_not_wait_for_the_device(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(powersgd, "orthonormalize", lambda blocks, method: gram_schmidt_together(blocks))
    reducer, send, mean = build(LAYOUT, rank=2, form=form, warm_start=False), torch.ones(N), torch.ones(N)
    waits = Waits()
    with waits.counted():
        for _ in range(2):
            reducer.reduce(send, mean, LocalComm.alone())
    assert not waits.found


def test_what_is_a_matrix_worth_compressing() -> None:
    layout = layout_of(((64, 3, 3, 3), (64,), (4, 4), (128, 64), (0, 5), (128, 64)))
    assert [matrix_shape(slot) for slot in layout] == [(64, 27), None, (4, 4), (128, 64), None, (128, 64)]
    matrices = Matrices(layout, [2] * 6, min_compression_rate=2.0)
    # (64 + 27) 2 * 2 < 64 * 27; (4 + 4) 2 * 2 >= 16; (128 + 64) 2 * 2 < 128 * 64
    assert [(group.rows, group.columns, len(group.slots)) for group in matrices.groups] == [
        (64, 27, 1),
        (128, 64, 2),
    ]
    assert [slot.name for slot in matrices.whole] == ["parameter1", "parameter2", "parameter4"]
    assert (matrices.left_size, matrices.right_size) == (64 * 2 + 2 * 128 * 2, 27 * 2 + 2 * 64 * 2)
    assert matrices.whole_size == 64 + 16


def test_the_mean_over_workers_is_compressed_not_each_gradient() -> None:
    """Two opposite gradients cancel: nothing of them reaches the mean, and nothing of it is lost."""
    sends = [gradient(0, 0), -gradient(0, 0)]

    def one_step(comm: LocalComm) -> tuple[Tensor, Tensor]:
        send, mean = sends[comm.rank].clone(), sends[comm.rank].clone()
        build(LAYOUT, rank=1).reduce(send, mean, comm)
        return mean, send

    (mean, rest), (_, other) = LocalComm.run(2, one_step)
    matrices = LAYOUT[0].stop
    assert mean.abs().max() == 0
    assert (rest[:matrices] + other[:matrices]).abs().max() <= 1.5e-4 * sends[0].abs().max()

"""SAGE's controller: the published formulas, what they leave open, the sample, the bound of the scan."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers.sage import Sage, SageLaw, SageSettings, Sampler
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds
from tests.cases import LAYOUT, N, gradient, layout_of, run_steps

CPU = torch.device("cpu")


def law(density: float = 0.05, threshold: float = 0.02) -> SageLaw:
    return SageLaw(SageSettings(density=density, threshold=threshold), LAYOUT, 0, CPU)


def step(law: SageLaw, sampled_mean: float, magnitudes: Tensor) -> float:
    """One step from an injected sampled mean, all magnitudes as candidates; the new threshold."""
    law.begin(torch.tensor(sampled_mean))
    return law.threshold(magnitudes, magnitudes.numel()).item()


def by_hand(threshold: float, ratio: float, density: float, magnitudes: Tensor) -> float:
    """lambda alpha beta gamma in double precision."""
    exam = (magnitudes >= threshold * ratio).double().mean().item()
    beta = 2 / (1 + math.exp(density - exam))
    gamma = 0.95 if exam / density < 0.1 else 1.05 if exam / density > 10 else 1.0
    return threshold * ratio * beta * gamma


MAGNITUDES = torch.linspace(0, 1, 1001)


def test_the_first_step_keeps_the_initial_threshold() -> None:
    assert step(law(threshold=0.5), 3.0, MAGNITUDES) == 0.5


@pytest.mark.parametrize(
    ("threshold", "ratio", "density"),
    [
        (0.5, 1.0, 0.05),  # examined 0.5, ten times the target and no more: gamma 1
        (0.5, 0.5, 0.05),  # 0.75 > 10 d: gamma 1.05
        (0.5, 1.998, 0.05),  # 0.001 < 0.1 d: gamma 0.95
        (0.5, 1.9, 0.05),  # on target
        (0.25, 8.0, 0.5),  # nothing reached
    ],
)
def test_later_steps_multiply_by_alpha_beta_and_gamma(threshold: float, ratio: float, density: float) -> None:
    controller = law(density, threshold)
    step(controller, 2.0, MAGNITUDES)
    # Four float32 roundings of relative error 2^-24 each, and alpha's and gamma's own.
    expected = by_hand(threshold, ratio, density, MAGNITUDES)
    assert step(controller, 2.0 * ratio, MAGNITUDES) == pytest.approx(expected, rel=6 * 2**-24)


@pytest.mark.parametrize(("ratio", "gamma"), [(0.5, 1.05), (1.998, 0.95), (1.9, 1.0)])
def test_a_term_that_is_left_out_is_one_and_the_others_stay(ratio: float, gamma: float) -> None:
    threshold, seen = 0.5, {}
    for terms in ("alpha", "alpha_beta", "all"):
        config = SageSettings(density=0.05, threshold=threshold, terms=terms)
        controller = SageLaw(config, LAYOUT, 0, CPU)
        step(controller, 2.0, MAGNITUDES)
        new = step(controller, 2.0 * ratio, MAGNITUDES)
        seen[terms] = [float(controller.metrics()[name]) for name in ("alpha", "beta", "gamma")]
        # Three float32 roundings of the product, and alpha's own.
        assert new == pytest.approx(threshold * math.prod(seen[terms]), rel=4 * 2**-24)
    alpha, beta = seen["alpha_beta"][:2]
    assert (alpha, beta != 1) == (np.float32(ratio), True)
    assert seen["all"] == [alpha, beta, np.float32(gamma)]
    assert seen["alpha_beta"] == [alpha, beta, 1.0]
    assert seen["alpha"] == [alpha, 1.0, 1.0]


def test_alpha_compares_with_the_step_before_and_not_with_the_first() -> None:
    controller = law()
    for sampled_mean, alpha in ((1.0, 1.0), (2.0, 2.0), (3.0, 1.5), (1.5, 0.5)):
        step(controller, sampled_mean, MAGNITUDES)
        assert controller.metrics()["alpha"] == alpha


@pytest.mark.parametrize("odd", [0.0, math.nan, math.inf])
def test_a_mean_of_zero_or_nan_keeps_the_threshold(odd: float) -> None:
    controller = law(threshold=0.5)
    step(controller, 1.0, MAGNITUDES)
    assert step(controller, odd, MAGNITUDES) == 0.5
    assert {float(controller.metrics()[term]) for term in ("alpha", "beta", "gamma")} == {1.0}


def test_after_a_mean_of_zero_alpha_is_one() -> None:
    controller = law()
    for sampled_mean in (1.0, 0.0, 5.0):
        step(controller, sampled_mean, MAGNITUDES)
    assert controller.metrics()["alpha"] == 1.0


def test_a_mean_that_is_not_finite_is_forgotten() -> None:
    controller = law()
    for sampled_mean in (1.0, math.nan, 2.0):
        step(controller, sampled_mean, MAGNITUDES)
    assert controller.metrics()["alpha"] == 2.0


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_the_threshold_stays_positive_and_finite(factor: float) -> None:
    controller, sampled_mean = law(threshold=1.0), torch.tensor(1.0)
    for _ in range(4):
        controller.previous_mean = torch.tensor(1.0)
        controller.begin(sampled_mean * factor)
        threshold = controller.threshold(MAGNITUDES, 1001).item()
    assert 0 < threshold < math.inf


def test_no_threshold_and_no_examination_lies_below_the_scans_bound() -> None:
    rng = np.random.default_rng(0)
    for trial in range(300):
        density = float(rng.choice([1e-4, 0.01, 0.3, 1.0]))
        controller = law(density, float(10 ** rng.uniform(-6, 2)))
        magnitudes = torch.from_numpy(np.abs(rng.standard_t(3, size=200))).float() * 10 ** float(
            rng.uniform(-6, 2)
        )
        step(controller, float(10 ** rng.uniform(-3, 3)), magnitudes)
        before = controller.lam
        bound = controller.begin(torch.tensor(float(10 ** rng.uniform(-3, 3))))
        examined = before * controller.metrics()["alpha"]
        threshold = controller.threshold(magnitudes[magnitudes >= bound], 200)
        assert bound <= threshold, f"trial {trial}"
        assert bound <= examined, f"trial {trial}"


def test_the_bound_leaves_no_selected_element_out() -> None:
    config = SageSettings(density=0.05, threshold=0.03)
    reducer = Sage(config, LAYOUT, seeds=Seeds.derive(1, 0), device=CPU)
    for seen in run_steps(reducer, LocalComm.alone(), range(30), torch.zeros(N)):
        selected = seen.before.abs() >= torch.tensor(seen.metrics["threshold"])
        assert torch.equal(seen.mean != 0, selected)


def test_the_sample_is_slovins_number_of_draws() -> None:
    sizes = {n: Sampler(layout_of(((n,),)), "uniform", 0, CPU).size for n in (1, 456, 11402, 11_173_962)}
    assert sizes == {1: 1, 456: 213, 11402: 386, 11_173_962: 399}


@pytest.mark.parametrize("sampling", ["uniform", "by_tensor"])
def test_the_draws_have_the_stated_distribution(sampling: str) -> None:
    layout = layout_of(((900,), (90,), (9,), (1,)))
    sampler = Sampler(layout, sampling, 7, CPU)
    draws = torch.cat([sampler.indices() for _ in range(200)])
    assert draws.min() >= 0
    assert draws.max() < 1000
    for slot in layout:
        share = slot.size / 1000 if sampling == "uniform" else 1 / 4
        hits = int(((draws >= slot.start) & (draws < slot.stop)).sum())
        # Five standard deviations of a binomial count; the draws are seeded, so it holds always or never.
        assert abs(hits - share * len(draws)) <= 5 * (len(draws) * share * (1 - share)) ** 0.5


def test_the_sampled_mean_is_of_the_compensated_gradient() -> None:
    controller = law()
    memory, grad = gradient(0, 0), gradient(0, 1)
    indices = Sampler(LAYOUT, "uniform", 0, CPU).indices()  # the law's own first draw
    controller.lower_bound(memory, grad)
    assert controller.previous_mean == (memory + grad)[indices].abs().mean()


def test_workers_sample_differently() -> None:
    config = SageSettings()
    draws = [Sage(config, LAYOUT, seeds=Seeds.derive(1, rank), device=CPU).law for rank in range(2)]
    assert not torch.equal(*(law.sampler.indices() for law in draws))

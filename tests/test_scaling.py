"""Scaling: the published schedules, that each reducer follows a given density, and what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from sage.config import Named
from sage.exchange.comm import LocalComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import NoFeedback, NoFeedbackSettings
from sage.exchange.scaling import SCALINGS, ErrorScaling, ScheduleScaling
from sage.interfaces import Progress, Reducer, Seeds
from sage.training.settings import check
from tasks import TASKS
from tests.cases import CPU, LAYOUT, N, gradient, numbers
from tests.test_exchange import scaling_of
from tests.toy import settings_of


def build(name: str, **settings: Any) -> Reducer:
    config = REDUCERS[name].Settings.model_validate({"density": 0.05, **settings})
    return reducers.build(config, LAYOUT, seeds=Seeds.derive(1, 0), device=CPU)


def schedule_of(density: float, **settings: Any) -> ScheduleScaling:
    reducer = build("topk", density=density)
    scaling = reducers.build_scaling(scaling_of({"name": "schedule", **settings}), reducer, LAYOUT, CPU)
    assert isinstance(scaling, ScheduleScaling)
    return scaling


def step(reducer: Reducer, density: float) -> dict[str, float]:
    """A step of a density; the metrics after it."""
    memory, mean = torch.zeros(N), gradient(0, 0)
    reducer.set_density(density)
    reducer.accumulate(memory, mean)
    reducer.reduce(memory, mean, LocalComm.alone())
    return numbers(reducer.metrics())


# --- schedules ------------------------------------------------------------------------------------


def test_the_warm_up_is_the_published_one() -> None:
    schedule = schedule_of(0.001, warmup_epochs=5)
    densities = [schedule.at(epoch) for epoch in (0, 0.9, 1, 2, 3, 4.5, 5, 100)]
    # c = 0.001^(1/6) = 10^-0.5: 31.6 %, 10 %, 3.2 %, 1 %, 0.3 %, then the target.
    halves = [1, 1, 2, 3, 4, 5, 6, 6]
    assert densities == pytest.approx([10 ** (-half / 2) for half in halves], rel=1e-12)
    assert densities[-2:] == [0.001, 0.001]
    assert [schedule_of(1.0, warmup_epochs=5).at(epoch) for epoch in (0, 3, 9)] == [1.0, 1.0, 1.0]


def test_a_list_is_a_density_an_epoch_and_then_the_target() -> None:
    schedule = schedule_of(0.05, densities=(0.5, 0.2))
    epochs = (0.0, 0.99, 1.0, 1.99, 2.0, 7.0)
    assert [schedule.at(epoch) for epoch in epochs] == [0.5, 0.5, 0.2, 0.2, 0.05, 0.05]


def test_a_rising_density_has_the_target_as_its_mean_and_the_ratio_between_its_ends() -> None:
    schedule = schedule_of(0.01, rising_epochs=2.0, rising_ratio=4.0)
    assert schedule.at(0.0) == pytest.approx(0.004, rel=1e-12)
    assert schedule.at(2.0) == schedule.at(5.0) == pytest.approx(0.016, rel=1e-12)
    midpoints = [schedule.at((index + 0.5) / 500) for index in range(1000)]
    assert np.mean(midpoints) == pytest.approx(0.01, rel=1e-12)
    assert max(schedule_of(0.9, rising_epochs=1.0).at(epoch) for epoch in (0.5, 1.0)) == 1.0


@pytest.mark.parametrize(
    ("given", "got"),
    [({}, "none"), ({"warmup_epochs": 1, "rising_epochs": 2.0}, "warmup_epochs and rising_epochs")],
)
def test_a_schedule_is_one_of_three(given: dict[str, Any], got: str) -> None:
    with pytest.raises(ValueError, match=f"^scaling: expected one of warmup_epochs, .*, got {got}$"):
        scaling_of({"name": "schedule", **given})


# --- each reducer follows -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["topk", "global_topk", "random_k", "random_block"])
def test_a_fixed_count_follows_the_density(name: str) -> None:
    reducer = build(name)
    payload = build(name).expected_payload_bytes(2)
    sizes = [N] if name == "global_topk" else [slot.size for slot in LAYOUT]
    for density in (0.5, 0.5, 0.2, 0.05, 0.06, 0.05):
        assert step(reducer, density)["target_density"] == density
        assert reducer.density == sum(max(1, int(density * size)) for size in sizes) / N
        assert reducer.expected_payload_bytes(2) == payload  # of the configuration's


def test_the_automatic_threshold_follows_the_density() -> None:
    reducer = build("threshold")
    for density in (0.5, 0.2, 0.05):
        # 1 / (2 sqrt k), k = floor(density N), as float32: 2^-24 = 6e-8
        metrics = step(reducer, density)
        assert metrics["threshold"] == pytest.approx(1 / (2 * int(density * N) ** 0.5), rel=1e-7)
        assert metrics["target_density"] == density


@pytest.mark.parametrize(("threshold", "first"), [("auto", 1 / (2 * int(0.5 * N) ** 0.5)), (0.03, 0.03)])
def test_sage_starts_at_the_first_density_and_aims_at_each(threshold: float | str, first: float) -> None:
    reducer = build("sage", threshold=threshold)
    assert step(reducer, 0.5)["threshold"] == pytest.approx(first, rel=1e-7)
    before = step(reducer, 0.5)["threshold"]
    reducer.set_density(0.2)
    assert reducer.metrics()["threshold"] == before  # the law moves it, in its own time
    for target in (0.2, 0.05):
        metrics = step(reducer, target)
        assert metrics["target_density"] == target
        # beta = 2 / (1 + exp(d - d_exam)), by hand in float32: exp's rounding, a sum's, a quotient's and one
        # of the metric itself are below 8 * 2^-24 = 5e-7.
        beta = 2 / (1 + torch.tensor(target - metrics["density_exam"]).exp().item())
        assert metrics["beta"] == pytest.approx(beta, rel=1e-6)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "reducer", "simulated", "message"),
    [
        ("schedule", {"name": "threshold", "threshold": 0.1}, False, "since threshold 0.1 decides what is"),
        (
            "schedule",
            {"name": "random_k", "rank": 2},
            False,
            "since rank 2 decides what is sent, got schedule",
        ),
        ("error", {"name": "exact"}, False, "expected constant, since exact has no density that can be set"),
        ("time", {"name": "accordion"}, False, "since accordion has no density that can be set, got time"),
        ("error", {"name": "random_k"}, False, "expected a reducer that selects by magnitude, such as topk"),
        ("time", {"name": "topk"}, True, "expected another than time with --simulate"),
    ],
)
def test_what_has_no_density_to_scale_is_refused(
    scaling: str, reducer: dict[str, Any], simulated: bool, message: str, tmp_path: Any
) -> None:
    needed: dict[str, Any] = {
        "schedule": {"warmup_epochs": 2},
        "error": {"share": 0.5},
        "time": {"share": 0.5},
    }
    feedback = {"name": "none"}
    settings = settings_of(
        reducer["name"], reducer=reducer, scaling={"name": scaling, **needed[scaling]}, feedback=feedback
    ).model_copy(update={"task": TASKS["digits"].Settings(name="digits")})
    with pytest.raises(ValueError, match=message):
        check(settings, TASKS, REDUCERS, tmp_path, 2, simulated)


def test_a_hook_is_not_scaled_by_time() -> None:
    with pytest.raises(ValueError, match=r"^scaling\.name: .* buckets overlap .*, got time$"):
        reducers.hook(torch.nn.Linear(1, 1), "topk", scaling={"name": "time", "share": 0.2})  # type: ignore[arg-type]


def test_the_old_key_names_the_new_section() -> None:
    with pytest.raises(ValueError, match=r"^reducer: density_schedule is a section of its own now: scaling:"):
        reducers.build_reducer("topk", LAYOUT, worker=0, density_schedule={"warmup_epochs": 2})


def test_a_rule_of_somebodys_own_is_named_by_its_place() -> None:
    table = {name: rule.Settings for name, rule in SCALINGS.items()}
    assert set(table) == {"constant", "schedule", "error", "time"}
    own = SCALINGS["tests.test_scaling:Halving"]
    assert own.Settings.model_fields["name"].default == Halving.Settings.model_fields["name"].default


class Halving(ScheduleScaling):
    """A rule of one's own."""

    class Settings(Named):
        name: str = "halving"


# --- error ----------------------------------------------------------------------------------------


def error_run(name: str, share: float, steps: int, **bounds: float) -> list[list[tuple[float, float]]]:
    """[rank][step]: the density and the share of ||send||^2 that was sent, of the same gradients."""

    def worker(comm: LocalComm) -> list[tuple[float, float]]:
        reducer = build(name, density=0.02)
        section = {"name": "error", "share": share, "lowest": 1e-3, "highest": 1.0, **bounds}
        scaling = reducers.build_scaling(scaling_of(section), reducer, LAYOUT, CPU)
        feedback = NoFeedback(NoFeedbackSettings(), torch.zeros(N))
        exchange, seen = Exchange(feedback, reducer, comm, LAYOUT, scaling=scaling), []
        for index in range(steps):
            grad = gradient(comm.rank, 0)
            energy = grad.square().sum()
            exchange.average(grad, Progress(0.0, index, 0.1, 10))
            left = feedback.memory.square().sum()
            seen.append((exchange.density, float(1 - left / energy)))
        return seen

    return LocalComm.run(3, worker)


def smallest_k(values: Tensor, share: float) -> int:
    """How many of the largest keep the share, by sorting."""
    squares = np.sort(values.numpy().astype(np.float64) ** 2)[::-1].cumsum()
    return int(np.searchsorted(squares, share * squares[-1])) + 1


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_error_finds_the_smallest_k_that_keeps_the_share(share: float) -> None:
    ranks = error_run("global_topk", share, 40)
    densities = [[density for density, _ in steps] for steps in ranks]
    assert densities[0] == densities[1] == densities[2]
    # The workers' mean of their own k, whole numbers that are followed one step late: each may be off by 1.
    expected = np.mean([smallest_k(gradient(rank, 0), share) for rank in range(3)])
    assert abs(densities[0][-1] * N - expected) <= 2
    rises = [after / before for before, after in zip(densities[0], densities[0][1:], strict=False)]
    assert max(rises) <= 2.1  # twofold, and a k is rounded down


def test_error_keeps_the_share_where_each_tensor_has_its_own_k() -> None:
    # The workers' shares differ, their mean is followed. A k is a whole number: one element more in each
    # tensor is 5 % of what is sent.
    ranks = error_run("topk", 0.5, 40)
    assert np.mean([share for steps in ranks for _, share in steps[-10:]]) == pytest.approx(0.5, abs=0.05)


def test_error_stays_within_its_bounds() -> None:
    assert {round(d, 2) for d, _ in error_run("global_topk", 0.99, 12, highest=0.1)[0][-3:]} == {0.1}
    assert min(d for d, _ in error_run("global_topk", 0.01, 12, lowest=0.02)[0]) >= int(0.02 * N) / N


def test_the_measured_growth_travels_in_four_bytes_of_the_first_message() -> None:
    def worker(comm: LocalComm) -> list[float]:
        reducer, sent = build("global_topk"), []
        for _ in range(2):
            memory, mean = torch.zeros(N), gradient(comm.rank, 0)
            reducer.accumulate(memory, mean)
            reducer.reduce(memory, mean, comm)
            sent.append(comm.ledger.take()["payload_bytes"])
            reducer.measure_growth(0.5)
        assert reducer.expected_payload_bytes(2) == sent[1]
        assert reducer.growths is not None
        assert reducer.growths.shape == (2,)
        return sent

    assert LocalComm.run(2, worker) == [[8 * int(0.05 * N), 8 * int(0.05 * N) + 4]] * 2


def test_a_growth_that_nothing_is_known_of_is_one() -> None:
    for values in (torch.zeros(N), torch.full((N,), 3e38)):
        reducer = build("global_topk")
        reducer.measure_growth(0.5)
        memory, mean = torch.zeros(N), values
        reducer.accumulate(memory, mean)
        reducer.reduce(memory, mean, LocalComm.alone())
        assert reducer.growths is not None
        assert reducer.growths.tolist() == [1.0]


def test_a_density_that_is_read_before_the_next_step_is_what_that_step_has() -> None:
    reducer = build("global_topk")
    scaling = reducers.build_scaling(scaling_of({"name": "error", "share": 0.9}), reducer, LAYOUT, CPU)
    assert isinstance(scaling, ErrorScaling)
    exchange = Exchange(NoFeedback(NoFeedbackSettings(), torch.zeros(N)), reducer, LocalComm.alone(), LAYOUT)
    exchange.scaling = scaling
    exchange.average(gradient(0, 0), Progress(0.0, 0, 0.1, 10))
    kept = exchange.state_dict()["buckets"][0]["scaling"]["density"]
    exchange.average(gradient(0, 1), Progress(0.0, 1, 0.1, 10))
    assert reducer.target_density == kept > 0.05

"""A density schedule: the published numbers, and that each reducer follows it."""

from typing import Any

import pytest
import torch

from reducers import REDUCERS
from reducers.schedule import DensitySchedule
from sage.exchange.comm import LocalComm
from sage.interfaces import Progress, Reducer, Seeds
from tests.cases import LAYOUT, N, gradient, numbers

LISTED = {"densities": [0.5, 0.2]}


def build(name: str, **settings: Any) -> Reducer:
    config = REDUCERS[name].Settings.model_validate({"density": 0.05, "density_schedule": LISTED, **settings})
    return REDUCERS[name](config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))


def step(reducer: Reducer, epoch: float) -> dict[str, float]:
    """A step in an epoch; the metrics after it."""
    memory, mean = torch.zeros(N), gradient(0, 0)
    reducer.begin_step(Progress(epoch, 0, 0.1, 10))
    reducer.accumulate(memory, mean)
    reducer.reduce(memory, mean, LocalComm.alone())
    return numbers(reducer.metrics())


def test_the_warm_up_is_the_published_one() -> None:
    schedule = DensitySchedule(warmup_epochs=5)
    densities = [schedule.at(epoch, 0.001) for epoch in (0, 0.9, 1, 2, 3, 4.5, 5, 100)]
    # c = 0.001^(1/6) = 10^-0.5: 31.6 %, 10 %, 3.2 %, 1 %, 0.3 %, then the target.
    halves = [1, 1, 2, 3, 4, 5, 6, 6]
    assert densities == pytest.approx([10 ** (-half / 2) for half in halves], rel=1e-12)
    assert densities[-2:] == [0.001, 0.001]
    assert [schedule.at(epoch, 1.0) for epoch in (0, 3, 9)] == [1.0, 1.0, 1.0]


def test_a_list_is_a_density_an_epoch_and_then_the_target() -> None:
    schedule = DensitySchedule(densities=(0.5, 0.2))
    assert [schedule.at(epoch, 0.05) for epoch in (0.0, 0.99, 1.0, 1.99, 2.0, 7.0)] == [
        0.5,
        0.5,
        0.2,
        0.2,
        0.05,
        0.05,
    ]
    assert DensitySchedule().at(0.0, 0.05) == 0.05


@pytest.mark.parametrize("name", ["topk", "global_topk", "random_k", "random_block"])
def test_a_fixed_count_follows_the_schedule(name: str) -> None:
    reducer = build(name)
    payload = reducer.expected_payload_bytes(2)
    sizes = [N] if name == "global_topk" else [slot.size for slot in LAYOUT]
    for epoch, density in ((0.0, 0.5), (0.5, 0.5), (1.0, 0.2), (2.0, 0.05), (5.5, 0.05)):
        assert step(reducer, epoch)["target_density"] == density
        assert reducer.density == sum(max(1, int(density * size)) for size in sizes) / N
        assert (
            reducer.expected_payload_bytes(2)
            == payload
            == build(name, density_schedule={}).expected_payload_bytes(2)
        )


def test_the_automatic_threshold_follows_the_schedule() -> None:
    reducer = build("threshold")
    for epoch, density in ((0.0, 0.5), (1.0, 0.2), (2.0, 0.05)):
        # 1 / (2 sqrt k), k = floor(density N), as float32: 2^-24 = 6e-8
        metrics = step(reducer, epoch)
        assert metrics["threshold"] == pytest.approx(1 / (2 * int(density * N) ** 0.5), rel=1e-7)
        assert metrics["target_density"] == density


def test_a_schedule_without_a_threshold_to_move_is_refused() -> None:
    with pytest.raises(ValueError, match=r"moves the threshold auto only, got threshold 0\.1"):
        build("threshold", threshold=0.1)


@pytest.mark.parametrize(("threshold", "first"), [("auto", 1 / (2 * int(0.5 * N) ** 0.5)), (0.03, 0.03)])
def test_sage_starts_at_the_first_density_and_aims_at_each(threshold: float | str, first: float) -> None:
    reducer = build("sage", threshold=threshold)
    assert step(reducer, 0.0)["threshold"] == pytest.approx(first, rel=1e-7)
    before = step(reducer, 0.5)["threshold"]
    reducer.begin_step(Progress(1.0, 0, 0.1, 10))
    assert reducer.metrics()["threshold"] == before  # the law moves it, in its own time
    for epoch, target in ((1.0, 0.2), (2.0, 0.05)):
        metrics = step(reducer, epoch)
        assert metrics["target_density"] == target
        # beta = 2 / (1 + exp(d - d_exam)), by hand in float32: exp's rounding, a sum's, a quotient's and one
        # of the metric itself are below 8 * 2^-24 = 5e-7.
        beta = 2 / (1 + torch.tensor(target - metrics["density_exam"]).exp().item())
        assert metrics["beta"] == pytest.approx(beta, rel=1e-6)


def test_a_rank_leaves_nothing_to_schedule() -> None:
    with pytest.raises(ValueError, match="density_schedule moves the density only, got rank 2"):
        build("random_k", rank=2)
    reducer = build("random_k", rank=2, density_schedule={})
    assert step(reducer, 0.0)["target_density"] == reducer.density

"""Accordion's decisions, worked by hand: which tensors change, when it is judged, who decides."""

import pytest
import torch

import reducers
from reducers import REDUCERS
from reducers.accordion import Accordion, AccordionSettings
from sage.exchange.comm import LocalComm
from sage.interfaces import Progress, Seeds, Slot
from tests.cases import layout_of

LAYOUT = layout_of(((2, 2), (2, 2), (3,)))
N = 11


def build(layout: list[Slot] = LAYOUT, **settings: object) -> Accordion:
    config = AccordionSettings.model_validate({"densities": (1.0, 0.25), "interval_epochs": 2, **settings})
    reducer = reducers.build(config, layout, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))
    assert isinstance(reducer, Accordion)
    return reducer


def low_levels(
    reducer: Accordion, comm: LocalComm, norms: list[tuple[float, ...]], lrs: list[float], steps: int
) -> list[list[int]]:
    """The levels in each epoch; the gradients of an epoch's steps add up to tensors of the given norms."""
    levels = []
    for epoch, (wanted, lr) in enumerate(zip(norms, lrs, strict=True)):
        for step in range(steps):
            grad = torch.zeros(N)
            for slot, norm in zip(LAYOUT, wanted, strict=True):
                grad[slot.start + step % slot.size] = norm / steps**0.5
            reducer.begin_step(Progress(epoch + step / steps, epoch * steps + step, lr, steps))
            reducer.reduce(grad.clone(), grad, comm)
        levels.append(reducer.levels.tolist())
    return levels


def test_epochs_gradients_are_compared_over_the_interval() -> None:
    #        epoch 0          1          2              3          4               5
    norms = [(4.0, 4.0, 1.0), (9, 9, 9), (1.9, 2.1, 0), (9, 9, 9), (3.0, 2.1, 1), (9, 9, 9)]
    levels = low_levels(build(), LocalComm.alone(), norms, [0.1] * 6, steps=2)
    # Judged after epochs 0, 2, 4. First: low for all. Then |4 - 1.9| / 4 > 0.5 is a change, 1.9 / 4 is none,
    # 1 -> 0 is one. Then |1.9 - 3| / 1.9 > 0.5 is one, 0 is none, and from a norm of 0 on is one.
    assert levels == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 0, 1], [1, 0, 1], [1, 0, 1]]


def test_an_epochs_gradients_are_summed_not_their_norms() -> None:
    reducer, grad = build(interval_epochs=1), torch.ones(N)
    for step in range(6):  # epochs of two steps; each epoch's gradients cancel but in epoch 0
        sign = -1 if step in (3, 5) else 1
        reducer.begin_step(Progress(step / 2, step, 0.1, 2))
        mean = sign * grad
        reducer.reduce(mean.clone(), mean, LocalComm.alone())
    assert reducer.previous.tolist() == [0.0, 0.0, 0.0]


def test_the_first_batch_of_an_epoch_decides_in_the_published_form() -> None:
    norms = [(4.0, 4.0, 1.0), (9, 9, 9), (2.0, 2.1, 1.0), (9, 9, 9)]
    levels = low_levels(build(detector="batch"), LocalComm.alone(), norms, [0.1] * 4, steps=1)
    assert levels == [[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("detector", ["epoch", "batch"])
def test_a_lower_learning_rate_means_low_compression_until_the_next_decision(detector: str) -> None:
    same = [(1.0, 1.0, 1.0)] * 8
    levels = low_levels(build(detector=detector), LocalComm.alone(), same, [0.1] * 5 + [0.01] * 3, steps=1)
    assert levels[4] == [0, 0, 0]
    assert levels[5] == [1, 1, 1]
    assert levels[7] == [0, 0, 0] if detector == "epoch" else levels[6] == [0, 0, 0]


def test_rank_0_decides_for_all() -> None:
    def worker(comm: LocalComm) -> list[list[int]]:
        calm, changing = [(1.0, 1.0, 1.0)] * 4, [(1.0, 1.0, 1.0), (1, 1, 1), (9, 9, 9), (1, 1, 1)]
        return low_levels(build(), comm, calm if comm.rank == 0 else changing, [0.1] * 4, steps=1)

    for levels in LocalComm.run(2, worker):
        assert levels[3] == [0, 0, 0]


def test_the_levels_are_what_is_sent() -> None:
    reducer = build()
    low_levels(reducer, LocalComm.alone(), [(1.0, 1.0, 1.0)] * 4, [0.1] * 4, steps=1)
    mean = torch.arange(1.0, N + 1)
    reducer.reduce(mean.clone(), mean, LocalComm.alone())
    # A quarter of each matrix, its largest element; all of the vector.
    assert mean.tolist() == [0, 0, 0, 4, 0, 0, 0, 8, 9, 10, 11]
    assert reducer.density == 5 / 11
    assert reducer.metrics()["low_compression"] == 0


@pytest.mark.parametrize("name", ["topk", "powersgd"])
def test_the_inner_reducer_is_the_named_one_with_its_defaults(name: str) -> None:
    inner = build(inner=name).inner
    assert type(inner) is REDUCERS[name]
    assert inner.config == REDUCERS[name].Settings()  # type: ignore[attr-defined]


def test_powersgd_gets_ranks() -> None:
    reducer = build(inner="powersgd", ranks=(2, 1))
    assert reducer.expected_payload_bytes(2) == 4 * (8 + 3)  # 2 x 2 at any rank is sent whole
    wide = layout_of(((20, 30),))
    reducer = build(wide, inner="powersgd", ranks=(3, 1))
    assert reducer.expected_payload_bytes(2) == 4 * 3 * 50
    reducer.set_compression(torch.zeros(1, dtype=torch.uint8))
    assert reducer.expected_payload_bytes(2) == 4 * 1 * 50


def test_factors_go_on_where_a_decision_changes_nothing() -> None:
    wide = layout_of(((20, 30),))
    reducer = build(wide, inner="powersgd", ranks=(2, 1), interval_epochs=1)
    factors = [reducer.inner.p.clone()]  # type: ignore[attr-defined]
    for low in (1, 0, 0):
        reducer.set_compression(torch.full((1,), low, dtype=torch.uint8))
        factors.append(reducer.inner.p.clone())  # type: ignore[attr-defined]
    assert torch.equal(factors[0], factors[1])
    assert len(factors[2]) == len(factors[1]) / 2
    assert torch.equal(factors[2], factors[3])


@pytest.mark.parametrize("pair", [{"densities": (0.01, 0.5)}, {"ranks": (1, 2)}])
def test_low_compression_must_send_more(pair: dict[str, tuple]) -> None:
    with pytest.raises(ValueError, match="expected the larger one first"):
        AccordionSettings.model_validate(pair)

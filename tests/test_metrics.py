"""What a run measures: a checkpoint changes none of it."""

from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch

from sage.exchange.clock import Clock
from sage.exchange.comm import LocalComm
from sage.training.metrics import Meter

CPU = torch.device("cpu")
HANDED = [316, 120, 316, 120, 316]
"""Bytes of single steps. Over three workers 4/3 of them are sent, whose sum depends on its grouping."""


def meter_of(device: torch.device = CPU) -> tuple[Meter, list[int]]:
    """A meter, and the bytes of the steps to come."""
    handed = list(HANDED)

    def take() -> Mapping[str, float]:
        count = handed.pop(0) if handed else 0
        return {"payload_bytes": count, "padding_bytes": 0, "wire_bytes": count * (4 / 3)}

    return Meter(take, Clock(CPU), LocalComm.alone(), device), handed


@pytest.mark.parametrize("after", range(1, 5))
def test_the_bytes_of_a_line_are_the_same_bits_with_a_checkpoint_between_its_steps(after: int) -> None:
    (straight, _), (saved, _), (resumed, handed) = meter_of(), meter_of(), meter_of()
    loss = torch.tensor(1.5)
    for _ in range(5):
        straight.add_step(loss, 0.5)
    for _ in range(after):
        saved.add_step(loss, 0.5)
    resumed.load_state_dict(deepcopy(saved.state_dict()))  # as a file would be
    del handed[:after]
    for meter in (saved, resumed):
        for _ in range(5 - after):
            meter.add_step(loss, 0.5)
    lines = [meter.step_line({}) for meter in (straight, saved, resumed)]
    assert len({line["wire_bytes"] for line in lines}) == len({line["payload_bytes"] for line in lines}) == 1
    assert lines[0]["payload_bytes"] == sum(HANDED) / 5
    totals = [meter.epoch_line()["bytes"] for meter in (straight, saved, resumed)]
    assert totals == [totals[0]] * 3
    assert totals[0]["payload"] == sum(HANDED)


def test_losses_that_wait_for_their_line_return_to_the_device_where_the_next_ones_are() -> None:
    saved, _ = meter_of()
    saved.add_step(torch.tensor(1.5), 0.5)
    elsewhere, _ = meter_of(torch.device("meta"))
    elsewhere.load_state_dict(saved.state_dict())
    elsewhere.add_step(torch.tensor(1.5), 0.5)
    assert [loss.device.type for loss in elsewhere._losses] == ["meta", "meta"]

"""The clock: the phases within one divide its time; a part is counted besides."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sage.exchange.clock import Clock
from sage.exchange.comm import LocalComm
from sage.interfaces import Place
from tests.toy import ToyTask, lines_of_epochs, settings_of, trainer_of

CPU = torch.device("cpu")


class Hands:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds


def test_a_phase_interrupts_the_one_that_it_begins_in_and_a_part_does_not() -> None:
    hands = Hands()
    clock = Clock(CPU, host_seconds=hands)
    hands.move(1000)  # in no phase
    with clock.phase("outer"):
        hands.move(1)
        with clock.phase("inner"):
            hands.move(10)
            with clock.part("part"):
                hands.move(100)
        hands.move(2)
    hands.move(1000)
    assert clock.take() == {"outer": 3, "inner": 110, "part": 100}
    assert clock.take() == {}


def test_what_is_taken_within_a_phase_is_counted_up_to_then_and_the_rest_later() -> None:
    hands = Hands()
    clock = Clock(CPU, host_seconds=hands)
    with clock.phase("log"):
        hands.move(1)
        with clock.phase("data"):
            hands.move(10)
            assert clock.take() == {"log": 1, "data": 10}
            assert clock.taken_at == 11
            hands.move(20)
        hands.move(2)
    assert clock.take() == {"data": 20, "log": 2}


def test_after_an_error_the_phase_around_goes_on() -> None:
    hands = Hands()
    clock = Clock(CPU, host_seconds=hands)
    with clock.phase("outer"):
        with suppress(KeyError), clock.phase("inner"):
            hands.move(1)
            raise KeyError
        hands.move(2)
    assert clock.take() == {"outer": 3}


def test_on_a_gpu_an_event_ends_one_phase_and_begins_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time of the device is between two phases."""
    numbers = count()

    def event(enable_timing: bool) -> Any:
        found = SimpleNamespace(at=-1, synchronize=lambda: None)
        found.record = lambda: setattr(found, "at", next(numbers))  # the device's clock: a second an event
        found.elapsed_time = lambda end: 1000.0 * (end.at - found.at)
        return found

    monkeypatch.setattr(torch.cuda, "Event", event)
    clock = Clock(torch.device("cuda"))
    with clock.phase("log"):
        for _ in range(3):
            with clock.phase("forward"):
                pass
            with clock.phase("reduce"), clock.part("communicate"):
                pass
        taken = clock.take()
    assert taken.pop("communicate") == 3
    assert sum(taken.values()) == next(numbers) - 2  # to the last event before take's end, from the first
    assert set(taken) == {"log", "forward", "reduce"}


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_phases_of_an_epoch_are_its_wall_time_to_the_last_tick(world_size: int, tmp_path: Any) -> None:
    """Each look at the clock is a tick, and the mean of integers over two workers is exact."""

    def worker(comm: LocalComm) -> None:
        ticks = count()
        clock = Clock(CPU, host_seconds=lambda: float(next(ticks)))
        settings = settings_of("topk", clip={"norm": 1.0}, log={"every": 3}, checkpoint={"best": True})
        with trainer_of(settings, comm, 8, tmp_path, keeps=True, clock=clock) as trainer:
            trainer.run()

    LocalComm.run(world_size, worker)
    epochs = lines_of_epochs(tmp_path)
    assert len(epochs) == 2
    for seconds in (dict(line["seconds"]) for line in epochs):
        wall, communication = seconds.pop("wall"), seconds.pop("communicate", 0)
        assert sum(seconds.values()) == wall
        assert wall > 50
        assert (communication > 0) == (world_size > 1)


def test_each_part_of_a_step_counts_in_its_phase(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = Hands()

    class SlowTask(ToyTask):
        def train_batches(self, epoch: int, start: int = 0) -> Iterator[slice]:
            for batch in super().train_batches(epoch, start):
                hands.move(1)
                yield batch

        def loss(self, batch: slice) -> torch.Tensor:
            hands.move(2)
            loss = super().loss(batch)
            loss.register_hook(lambda _: hands.move(4))
            return loss

        def evaluate(self) -> dict[str, tuple[float, float]]:
            hands.move(8)
            return super().evaluate()

    comm = LocalComm.alone()
    task = SlowTask(16, Place(0, 1))  # 4 steps an epoch
    clock = Clock(CPU, host_seconds=hands)
    with trainer_of(settings_of("topk"), comm, folder=tmp_path, task=task, clock=clock) as trainer:
        slow = {
            (trainer.exchange.reducer, "reduce"): 16,
            (trainer.optimizer, "step"): 32,
            (trainer.recorder, "write"): 64,
            (trainer.recorder, "step_done"): 128,
            (trainer.store, "set_step"): 256,
            (trainer.agreement, "agree"): 512,
            (trainer.agreement, "agree_between_steps"): 1024,
        }
        for (owner, name), seconds in slow.items():
            monkeypatch.setattr(owner, name, slowed(getattr(owner, name), seconds, hands))
        trainer.run()
    step = {"data": 1, "forward": 2, "backward": 4, "reduce": 16, "optimizer": 32, "agree": 256 + 512}
    of_steps = {name: 4.0 * seconds for name, seconds in step.items()} | {"evaluate": 8.0}
    # An epoch's line, and what all do after it, count for the next epoch.
    first = of_steps | {"log": 4.0 * (64 + 128)}
    second = of_steps | {"log": first["log"] + 64, "agree": of_steps["agree"] + 1024}
    expected = [seconds | {"checkpoint": 0.0, "wall": sum(seconds.values())} for seconds in (first, second)]
    assert [line["seconds"] for line in lines_of_epochs(tmp_path)] == expected


def slowed(call: Any, seconds: float, hands: Hands) -> Any:
    def slow_call(*given: Any, **named: Any) -> Any:
        hands.move(seconds)
        return call(*given, **named)

    return slow_call

"""A lost worker while collectives are only enqueued, as under NCCL: an error in time, and not a hang."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import reducers
from sage.exchange import comm
from sage.exchange.clock import Clock
from sage.exchange.deadline import Deadline
from sage.interfaces import CommunicationError, Place
from sage.workers import group
from sage.workers.rendezvous import Rendezvous
from sage.workers.worker import Worker
from tests.enqueued_worker import STOP_AT, TIMEOUT_SECONDS
from tests.test_launch import PATIENCE_SECONDS, ROOT, free_port

SHORT = 0.1


class FakeEvent:
    """Done after so many queries; -1: never."""

    def __init__(self, queries_until_done: int = -1) -> None:
        self.left, self.num_queries = queries_until_done, 0

    def query(self) -> bool:
        self.num_queries += 1
        self.left -= self.left > 0
        return self.left == 0


NEVER = FakeEvent()


def deadline_of(*ends: FakeEvent, timeout_seconds: float = SHORT) -> Deadline:
    """A deadline after collectives "first", "second", ..., which end with these events; reads end with the
    last of them."""
    events = iter(ends)
    made = Deadline(timeout_seconds, "cpu", lambda _: next(events), lambda x: (x.clone(), ends[-1]))
    for name, _ in zip(("first", "second"), ends, strict=False):
        made.enqueued(name, torch.device("cpu"))
    return made


# --- waits with a deadline --------------------------------------------------------------------------


def test_a_read_returns_a_copy_once_the_device_is_done() -> None:
    end = FakeEvent(5)
    x = torch.arange(3.0)
    copy = deadline_of(end, timeout_seconds=60).read(x)
    assert end.num_queries >= 5
    assert copy.tolist() == [0.0, 1.0, 2.0]
    assert copy.data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("ends", "name"),
    [((NEVER, NEVER), "first"), ((FakeEvent(1), NEVER), "second"), ((), "the device's work")],
)
def test_a_wait_in_vain_is_an_error_that_names_the_oldest_unfinished_collective(
    ends: tuple[FakeEvent, ...], name: str
) -> None:
    deadline, started = deadline_of(*ends), time.monotonic()
    with pytest.raises(CommunicationError, match=f"^{name} failed: it did not end within 0.1 s$"):
        deadline.wait(NEVER)
    assert time.monotonic() - started >= SHORT


def test_the_clock_waits_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[FakeEvent] = []

    def event(enable_timing: bool) -> Any:
        ends.append(FakeEvent(1))
        return SimpleNamespace(record=lambda: None, query=ends[-1].query, elapsed_time=lambda _: 2500.0)

    monkeypatch.setattr(torch.cuda, "Event", event)
    clock = Clock(torch.device("cuda"), Deadline(SHORT))
    for _ in range(2):
        with clock.phase("reduce"):
            pass
    assert clock.take() == {"reduce": 5.0}
    assert clock.take() == {}
    with clock.phase("reduce"):
        pass
    ends[-1].left = -1
    with pytest.raises(CommunicationError, match="the device's work failed: it did not end within"):
        clock.take()


@pytest.fixture
def nothing_ends(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Reads of a group's results never end; for which devices they were asked for."""
    asked: list[torch.device] = []

    def deadline_in_vain(group: dist.ProcessGroup | None, device: torch.device) -> Deadline:
        asked.append(device)
        return deadline_of(NEVER)

    monkeypatch.setattr("sage.exchange.comm.deadline_of", deadline_in_vain)
    return asked


@pytest.mark.usefixtures("group_of_one")
def test_an_attached_exchange_waits_no_longer_than_the_deadline(nothing_ends: list[torch.device]) -> None:
    model = nn.Linear(3, 2)
    exchange = reducers.attach(model, "topk")
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(CommunicationError, match=r"^first failed: it did not end within 0\.1 s$"):
        exchange.step()
    assert nothing_ends == [torch.device("cpu")]


@pytest.mark.usefixtures("group_of_one")
def test_backward_through_the_hook_waits_no_longer_than_the_deadline(
    nothing_ends: list[torch.device],
) -> None:
    ddp = DistributedDataParallel(nn.Linear(3, 2))
    hook = reducers.hook(ddp, "topk")
    with pytest.raises(CommunicationError, match=r"^first failed: it did not end within 0\.1 s$"):
        ddp(torch.ones(1, 3)).sum().backward()
    assert hook.steps.step == 0
    assert nothing_ends == [torch.device("cpu")]


@pytest.mark.usefixtures("group_of_one")
def test_no_thread_of_the_hook_communicates_beside_a_models_own_collectives() -> None:
    ddp = DistributedDataParallel(nn.Sequential(nn.Linear(3, 2)))
    ddp.module.append(nn.SyncBatchNorm(2))  # which DDP takes on a GPU only
    with pytest.raises(ValueError, match="overlap: expected False for a model with SyncBatchNorm"):
        reducers.hook(ddp, "topk")
    reducers.hook(ddp, "topk", overlap=False)


@pytest.mark.usefixtures("group_of_one")
def test_the_deadline_of_a_group_comes_before_torchs_watchdog_and_a_cpu_needs_none() -> None:
    group = dist.new_group([0], timeout=timedelta(seconds=60))
    found = comm.deadline_of(group, torch.device("cuda"))
    assert found is not None
    assert found.timeout_seconds == 54.0
    assert comm.deadline_of(group, torch.device("cpu")) is None


# --- waits without one ------------------------------------------------------------------------------


def lost_while(deadline: Deadline, wait_seconds: float) -> list[str]:
    """The errors of the watch while the host waits elsewhere."""
    errors: list[str] = []
    with deadline.watched(lambda error: errors.append(str(error)), poll_seconds=0.01):
        time.sleep(wait_seconds)
    return errors


def test_a_wait_elsewhere_is_ended_by_the_watch_once() -> None:
    assert lost_while(deadline_of(FakeEvent(1), NEVER), 5 * SHORT) == [
        "second failed: it did not end within 0.1 s"
    ]


def test_the_watch_is_silent_while_all_collectives_end_in_time() -> None:
    assert lost_while(deadline_of(FakeEvent(1), FakeEvent(1)), 5 * SHORT) == []
    assert lost_while(deadline_of(), 5 * SHORT) == []
    assert lost_while(deadline_of(NEVER, timeout_seconds=60), 5 * SHORT) == []


def test_the_watch_is_over_when_it_is_left() -> None:
    deadline = deadline_of(NEVER)
    assert lost_while(deadline, 0) == []
    time.sleep(3 * SHORT)
    assert lost_while(deadline, 5 * SHORT) == ["first failed: it did not end within 0.1 s"]


def test_the_watch_leaves_a_wait_with_a_deadline_to_itself() -> None:
    deadline, errors = deadline_of(NEVER), []
    with deadline.watched(errors.append, poll_seconds=0.01):
        with pytest.raises(CommunicationError):
            deadline.wait(NEVER)
        time.sleep(5 * SHORT)  # while the error is printed, say
    assert errors == []


def test_the_watch_asks_no_event_before_its_time() -> None:
    """CUDA forbids it while a graph is captured."""
    event = FakeEvent(1)
    assert lost_while(deadline_of(event, timeout_seconds=60), 5 * SHORT) == []
    assert event.num_queries == 0


# --- processes --------------------------------------------------------------------------------------


@pytest.fixture
def stopped_pair(request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """Rank 0 of two workers, of which rank 1 is stopped."""
    port = free_port()
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.enqueued_worker", str(rank), str(port), request.param],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        assert workers[1].stdout is not None
        lines = iter(workers[1].stdout.readline, "")
        assert "stops\n" in lines
        os.kill(workers[1].pid, signal.SIGSTOP)
        yield workers[0]
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()


@pytest.mark.parametrize("stopped_pair", ["read", "elsewhere", "no abort"], indirect=True)
def test_a_stopped_worker_is_named_within_the_timeout_the_group_aborted_and_the_process_ended(
    stopped_pair: subprocess.Popen[str],
) -> None:
    output, _ = stopped_pair.communicate(timeout=PATIENCE_SECONDS)
    assert stopped_pair.returncode == 1
    steps = f"rank 0 at step {STOP_AT}, rank 1 at step {STOP_AT}"
    assert [line for line in output.splitlines() if not line.startswith("step ")] == [
        f"run.py: rank 0: all_reduce failed: it did not end within {TIMEOUT_SECONDS:g} s; "
        f"rank 1 fell behind: it no longer answers ({steps})",
        "aborted",
    ]


def worker_of(backend: str) -> Worker:
    return Worker(Rendezvous(Place(0, 2), 0, 2, launched=True), torch.device("cpu"), backend, 1, Path())


def hang(*_: object, **__: object) -> None:
    threading.Event().wait(60)


def test_workers_that_nccl_does_not_connect_are_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "init_process_group", hang)
    with pytest.raises(CommunicationError, match=r"NCCL did not connect the workers within 0\.1 s"):
        group._join_group(worker_of("nccl"), dist.HashStore(), SHORT)


def test_a_group_that_is_not_taken_down_is_an_error_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "destroy_process_group", hang)
    with pytest.raises(CommunicationError, match=r"NCCL did not let go of the other workers within 0\.1 s"):
        group._leave_group(worker_of("nccl"), SHORT)


def test_torchs_watchdog_comes_later_than_what_the_survivors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **named: given.update(named))
    group._join_group(worker_of("nccl"), dist.HashStore(), 60)
    assert given["timeout"].total_seconds() >= 60 + 15  # PATIENCE_SECONDS + STORE_SECONDS
    assert given["device_id"] == torch.device("cpu")


@pytest.mark.parametrize("speaks", [True, False])
def test_blocking_waits_are_turned_off_and_rank_0_says_so(
    speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")  # the user's choice stands
    group._set_up_nccl(speaks)
    assert "TORCH_NCCL_BLOCKING_WAIT" not in os.environ
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    said = capsys.readouterr().out
    assert bool(re.match("TORCH_NCCL_BLOCKING_WAIT is ignored: ", said)) == speaks

    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    group._set_up_nccl(speaks)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "0"
    assert capsys.readouterr().out == ""

"""The communicators: what arrives, what is counted, and how trouble is told."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sage.exchange.comm import LocalComm
from sage.interfaces import CommunicationError

run = LocalComm.run


def test_all_reduce_sums_in_place_in_rank_order() -> None:
    def worker(comm: LocalComm) -> Tensor:
        # In float32 (1 + 2^-24) + 2^-24 is 1, but 1 + (2^-24 + 2^-24) is not: the order of addition shows.
        x = torch.tensor([1.0 if comm.rank == 0 else 2.0**-24])
        comm.all_reduce(x)
        return x

    assert [x.item() for x in run(3, worker)] == [1.0, 1.0, 1.0]


def test_all_reduce_takes_the_maximum() -> None:
    def worker(comm: LocalComm) -> Tensor:
        x = torch.tensor([float(comm.rank), -float(comm.rank)])
        comm.all_reduce(x, op="max")
        return x

    assert [x.tolist() for x in run(3, worker)] == [[2.0, 0.0]] * 3


def test_all_gather_keeps_rank_order_and_shape() -> None:
    gathered = run(3, lambda comm: comm.all_gather(torch.full((2, 1), comm.rank)))
    assert all(x.tolist() == [[[0], [0]], [[1], [1]], [[2], [2]]] for x in gathered)


@pytest.mark.parametrize("lengths", [(3, 0, 1), (0, 0, 0), (2, 2, 2)])
def test_ragged_gather_returns_each_workers_own_length(lengths: tuple[int, ...]) -> None:
    gathered = run(3, lambda comm: comm.all_gather_ragged(torch.full((lengths[comm.rank],), comm.rank + 7)))
    for parts in gathered:
        assert [part.tolist() for part in parts] == [[rank + 7] * lengths[rank] for rank in range(3)]


def test_all_to_all_brings_each_worker_its_rows_in_rank_order() -> None:
    def worker(comm: LocalComm) -> Tensor:
        return comm.all_to_all(10 * comm.rank + torch.arange(6).view(3, 2))

    arrived = run(3, worker)
    assert [x.tolist() for x in arrived] == [
        [[first + 2 * rank, first + 2 * rank + 1] for first in (0, 10, 20)] for rank in range(3)
    ]


def test_broadcast_takes_the_sources_values() -> None:
    def worker(comm: LocalComm) -> Tensor:
        x = torch.tensor([comm.rank])
        comm.broadcast(x, source=2)
        return x

    assert [x.item() for x in run(3, worker)] == [2, 2, 2]


def test_what_a_collective_returned_is_the_callers_to_change() -> None:
    def worker(comm: LocalComm) -> list[float]:
        x = torch.tensor([float(comm.rank)])
        gathered = comm.all_gather(x)
        gathered += 100 * (comm.rank + 1)
        arrived = comm.all_to_all(x.repeat(2))
        arrived += 7
        comm.all_reduce(x)
        x += comm.rank
        return [*gathered.flatten().tolist(), *arrived.tolist(), x.item()]

    assert run(2, worker) == [[100.0, 101.0, 7.0, 8.0, 1.0], [200.0, 201.0, 7.0, 8.0, 2.0]]


def count(call: Callable[[LocalComm], object], world_size: int) -> list[dict[str, float]]:
    def worker(comm: LocalComm) -> dict[str, float]:
        call(comm)
        return comm.ledger.take()

    return run(world_size, worker)


def ledger(collectives: int, payload: int, padding: int, wire: float) -> dict[str, float]:
    names = ("num_collectives", "payload_bytes", "padding_bytes", "wire_bytes")
    return dict(zip(names, (collectives, payload, padding, wire), strict=True))


def test_the_ledger_counts_payload_padding_and_the_rings_bytes() -> None:
    x = torch.zeros(5)  # 20 bytes
    assert count(lambda comm: comm.all_reduce(x.clone()), 4)[0] == ledger(1, 20, 0, 20 * 2 * 3 / 4)
    assert count(lambda comm: comm.all_gather(x), 4)[0] == ledger(1, 20, 0, 20 * 3)
    assert count(lambda comm: comm.all_to_all(torch.zeros(4, 5)), 4)[0] == ledger(1, 80, 0, 80 * 3 / 4)
    assert count(lambda comm: comm.broadcast(x.clone()), 4)[0] == ledger(1, 20, 0, 20 * 3 / 4)
    # Sizes 4 bytes each; then the longest, 3 elements of 4 bytes, of which worker r has r to send.
    ragged = count(lambda comm: comm.all_gather_ragged(torch.zeros(comm.rank)), 4)
    assert ragged == [ledger(2, 4 + 12, 4 * (3 - rank), 16 * 3) for rank in range(4)]


def test_nothing_but_the_sizes_is_sent_where_nobody_has_anything() -> None:
    assert count(lambda comm: comm.all_gather_ragged(torch.zeros(0)), 3) == [ledger(1, 4, 0, 8)] * 3


def test_the_ledger_starts_anew_when_taken() -> None:
    comm = LocalComm.alone()
    comm.ledger.add(8, 1.5)
    assert comm.ledger.take() == ledger(1, 8, 0, 12.0)
    assert comm.ledger.take() == ledger(0, 0, 0, 0.0)


def test_one_worker_has_no_collectives() -> None:
    comm, x = LocalComm.alone(), torch.arange(3.0)
    comm.all_reduce(x)
    comm.broadcast(x)
    assert comm.all_gather(x).tolist() == [[0.0, 1.0, 2.0]]
    assert comm.all_to_all(x[None]).tolist() == [[0.0, 1.0, 2.0]]
    assert [part.tolist() for part in comm.all_gather_ragged(x)] == [[0.0, 1.0, 2.0]]
    assert comm.ledger.take() == ledger(0, 0, 0, 0.0)


@pytest.mark.parametrize(
    "other",
    [
        lambda comm: comm.all_reduce(torch.zeros(3)),
        lambda comm: comm.all_gather(torch.zeros(2)),
        lambda comm: comm.all_gather(torch.zeros(3, dtype=torch.int32)),
        lambda comm: comm.all_to_all(torch.zeros(2, 3)),
        lambda comm: comm.broadcast(torch.zeros(3)),
    ],
)
def test_different_collectives_are_an_error_and_not_a_hang(other: Callable[[LocalComm], object]) -> None:
    def worker(comm: LocalComm) -> None:
        other(comm) if comm.rank == 1 else comm.all_gather(torch.zeros(3))

    with pytest.raises(CommunicationError, match="different collectives"):
        run(2, worker)


def test_a_worker_that_ended_is_an_error_for_those_that_wait() -> None:
    def worker(comm: LocalComm) -> None:
        if comm.rank != 1:
            comm.all_reduce(torch.zeros(1))

    with pytest.raises(CommunicationError, match="worker 1 has ended"):
        run(3, worker)


def test_a_workers_own_error_is_what_is_raised() -> None:
    def worker(comm: LocalComm) -> None:
        if comm.rank == 1:
            raise KeyError("mine")
        comm.all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="mine"):
        run(3, worker)


def test_a_worker_that_does_not_come_is_an_error_for_all_and_its_late_call_too() -> None:
    late = threading.Event()
    errors = {}

    def worker(comm: LocalComm) -> None:
        if comm.rank == 1:
            late.wait(10)
        x = torch.full((1,), 7.0)
        try:
            comm.all_reduce(x)
        except CommunicationError as error:
            errors[comm.rank] = str(error)
        x.fill_(777.0)  # what an abandoned call brought must reach nobody
        late.set()

    run(2, worker, timeout_seconds=0.2)
    assert set(errors) == {0, 1}
    assert all("workers [1] did not come within 0.2 s" in error for error in errors.values())


def test_after_trouble_no_call_succeeds() -> None:
    outcomes = []

    def worker(comm: LocalComm) -> None:
        for _ in range(2):
            try:
                comm.all_gather(torch.zeros(1 + comm.rank))
                outcomes.append("arrived")
            except CommunicationError:
                outcomes.append("refused")

    run(2, worker)
    assert outcomes == ["refused"] * 4


def test_a_hung_worker_is_not_waited_for_for_ever() -> None:
    end = threading.Event()

    def worker(comm: LocalComm) -> None:
        if comm.rank == 1:
            end.wait(60)
        comm.all_reduce(torch.zeros(1))

    with pytest.raises(CommunicationError, match=r"workers \[1\] did not come"):
        run(2, worker, timeout_seconds=0.2)
    end.set()

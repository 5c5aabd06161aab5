"""The model of collectives over a link: numbers worked by hand, and the ledger's bytes."""

import pytest
import torch

from sage import network
from sage.exchange.comm import LocalComm
from sage.network import Call, Link, bucket_shares, exact_calls, exposed_seconds, wire_bytes

FRAMES = 1538 / 1448
"""An Ethernet frame of 1,500 bytes has 8 + 14 + 4 + 12 bytes around it; TCP and IP take 32 + 20 of it."""
MIB = 2**20


def test_a_collective_takes_its_messages_one_after_the_other() -> None:
    link = Link(8e6, 1e-3)  # a microsecond a byte on the wire
    message = 1e-3 + 1000 * FRAMES * 1e-6
    assert link.seconds(Call("all_reduce", 4000), 4) == pytest.approx(6 * message, rel=1e-12)
    assert link.seconds(Call("all_gather", 1000), 4) == pytest.approx(3 * message, rel=1e-12)
    assert link.seconds(Call("all_to_all", 4000), 4) == pytest.approx(3 * message, rel=1e-12)
    assert link.seconds(Call("broadcast", 1000), 5) == pytest.approx(3 * message, rel=1e-12)
    calls = [Call("all_gather", 1000), Call("all_reduce", 4000)]
    assert link.total_seconds(calls, 4) == pytest.approx(9 * message, rel=1e-12)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "broadcast"])
def test_one_worker_waits_for_nobody(kind: str) -> None:
    assert Link(1e9).seconds(Call(kind, 1e9), 1) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("world_size", [2, 4, 5])
@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "all_to_all", "broadcast"])
def test_the_bytes_on_the_wire_are_the_ledgers(kind: str, world_size: int) -> None:
    def worker(comm: LocalComm) -> float:
        getattr(comm, kind)(torch.zeros(world_size, 60 // world_size))
        return comm.ledger.wire_bytes

    for counted in LocalComm.run(world_size, worker):
        predicted = wire_bytes([Call(kind, 240)], world_size)  # type: ignore[arg-type]
        assert predicted == pytest.approx(counted, rel=1e-12)


def test_the_gradient_is_divided_as_distributed_data_parallel_does() -> None:
    # 40 MiB: the first MiB, then 25 MiB, then the rest
    assert bucket_shares(10 * MIB) == pytest.approx([1 / 40, 25 / 40, 14 / 40], rel=1e-12)
    assert bucket_shares(1000) == [1.0]


def test_what_overlaps_with_the_backward_pass_is_not_waited_for() -> None:
    n = 26 * MIB // 4  # 26 MiB in buckets of 1 and 25 MiB, whose gradients are there after 1 and 26 s of 26
    for seconds_per_mib, exposed in (
        (2, 50),  # the first is reduced from 1 to 3, the second from 26 to 76
        (30, 755),  # from 1 to 31, then from 31 to 781
        (1e-9, 25e-9),
    ):
        # two workers: each sends as many bytes as there are
        link = Link(8 * FRAMES * MIB / seconds_per_mib, 0.0)
        assert exposed_seconds(n, 4, 26.0, link, 2) == pytest.approx(exposed, rel=1e-6)
        assert exposed_seconds(n, 2, 0.0, link, 2) == pytest.approx(13 * seconds_per_mib, rel=1e-12)
        flat = link.total_seconds(exact_calls(n, 2), 2)
        assert flat == pytest.approx(13 * seconds_per_mib, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "value"), [("1gbit", 1e9), ("100 Mbit/s", 1e8), ("2.5Gbit", 2.5e9), ("64kbit", 64e3)]
)
def test_speeds_are_read_as_people_write_them(text: str, value: float) -> None:
    assert network.parse_speed(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "value"), [("50us", 5e-5), ("0.1 ms", 1e-4), ("0s", 0), ("3µs", 3e-6)])
def test_times_are_read_as_people_write_them(text: str, value: float) -> None:
    assert network.parse_seconds(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("text", ["", "1", "gbit", "-1gbit", "1 gigabit", "0gbit", "1e9gbit", "1GB"])
def test_another_speed_is_an_error_that_shows_what_is_expected(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number and a unit, as in 100mbit"):
        network.parse_speed(text)


def test_a_speed_is_shown_in_three_digits() -> None:
    shown = {1e9: "1.00 Gbit/s", 99.96e6: "100 Mbit/s", 12.34e9: "12.3 Gbit/s", 5e3: "5.00 kbit/s"}
    assert {speed: network.readable_speed(speed) for speed in shown} == shown
    assert network.readable_speed(999.9e6) == "1.00 Gbit/s"

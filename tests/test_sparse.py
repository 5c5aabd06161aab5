"""The messages and the selections that the sparsifiers share."""

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers import build_reducer
from reducers.sparse import Sparsifier, pack, resolve_threshold, target_count, unpack
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Slot
from tests.cases import LAYOUT, N, gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_message_carries_indices_and_values_bit_for_bit(dtype: torch.dtype) -> None:
    indices = torch.tensor([0, 2**24 + 1, 5])  # 2^24 + 1 is no float32
    values = torch.tensor([float("nan"), -0.0, 1e-40], dtype=dtype)
    send = torch.full((2**24 + 3,), 7.0, dtype=dtype)
    send[indices] = values
    message = pack(send, indices)
    assert message.dtype == torch.int32
    assert message.nbytes == 3 * (4 + dtype.itemsize)
    assert send[indices].tolist() == [0, 0, 0]
    assert send[[1, 2**24, -1]].tolist() == [7, 7, 7]
    # As the second of two that were gathered: a float64 then begins in the middle of 8 bytes.
    for one in torch.stack([message, message]):
        got_indices, got_values = unpack(one, dtype)
        assert got_indices.tolist() == indices.tolist()
        assert got_values.numpy().tobytes() == values.numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_message_is_empty(dtype: torch.dtype) -> None:
    message = pack(torch.zeros(3, dtype=dtype), torch.empty(0, dtype=torch.int64))
    indices, values = unpack(message, dtype)
    assert indices.numel() == values.numel() == message.numel() == 0


@pytest.mark.parametrize("name", ["threshold", "sage", "topk", "global_topk"])
@pytest.mark.parametrize("exchange", ["gather", "union"])
def test_a_gradient_that_may_be_overwritten_gives_the_same_bits(name: str, exchange: str) -> None:
    def worker(comm: LocalComm, grad_is_mean: bool) -> list[Tensor]:
        reducer, memory, seen = build(name, density=0.1, exchange=exchange), torch.zeros(N), []
        for step in range(4):
            mean = gradient(comm.rank, step)
            reducer.accumulate(memory, mean, grad_is_mean=grad_is_mean)
            assert bool((mean == 0).all()) == grad_is_mean
            reducer.reduce(memory, mean, comm)
            seen += [mean, memory.clone()]
        return seen

    kept, given = (LocalComm.run(2, lambda comm, own=own: worker(comm, own)) for own in (False, True))
    for a, b in zip(kept[0] + kept[1], given[0] + given[1], strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_k_is_the_floor_and_at_least_one() -> None:
    assert [target_count(0.01, n) for n in (1, 99, 100, 250)] == [1, 1, 1, 2]


def test_the_automatic_threshold_is_the_published_table() -> None:
    # The published configurations at density 0.001, truncated there: ResNet-18, GoogLeNet, the LSTM.
    assert resolve_threshold("auto", 0.001, 11_173_962) == pytest.approx(0.00473, abs=1e-5)
    assert resolve_threshold("auto", 0.001, 6_166_250) == pytest.approx(0.00637, abs=1e-5)
    assert resolve_threshold("auto", 0.001, 28_949_319) == pytest.approx(0.002938, abs=1e-6)
    assert resolve_threshold(0.02, 0.001, 100) == 0.02


def build(name: str, layout: list[Slot] = LAYOUT, **settings: object) -> Sparsifier:
    reducer = build_reducer(name, layout, worker=0, **settings)
    assert isinstance(reducer, Sparsifier)
    return reducer


def selected_by(name: str, send: Tensor, **settings: object) -> set[int]:
    before = send.clone()
    build(name, **settings).reduce(send, torch.zeros(N), LocalComm.alone())
    return set((before != send).nonzero().view(-1).tolist())


def largest(values: np.ndarray, k: int) -> set[int]:
    return set(np.argsort(-np.abs(values), kind="stable")[:k].tolist())


def test_topk_takes_the_largest_of_each_tensor() -> None:
    send = gradient(0, 0)
    expected = set()
    for slot in LAYOUT:
        part = send[slot.start : slot.stop].numpy()
        expected |= {slot.start + j for j in largest(part, max(1, int(0.1 * slot.size)))}
    assert selected_by("topk", send, density=0.1) == expected


def test_global_topk_takes_the_largest_of_all() -> None:
    send = gradient(0, 0)
    assert selected_by("global_topk", send.clone(), density=0.1) == largest(send.numpy(), int(0.1 * N))


def test_the_hard_threshold_takes_what_reaches_it() -> None:
    send = gradient(0, 0)
    send[5] = 0.02
    expected = {j for j, value in enumerate(send.numpy()) if abs(value) >= np.float32(0.02)}
    assert 5 in expected
    assert selected_by("threshold", send, threshold=0.02) == expected


def test_the_union_exchange_sends_every_workers_values_at_every_selected_index() -> None:
    sends = [torch.zeros(N), torch.zeros(N)]
    sends[0][3], sends[1][3] = 1.0, 0.1  # only worker 0 selects 3
    sends[0][9], sends[1][9] = 0.1, 2.0  # only worker 1 selects 9
    sends[0][20] = sends[1][20] = 0.1  # nobody selects 20

    def worker(comm: LocalComm) -> tuple[list[float], list[float]]:
        send, mean = sends[comm.rank].clone(), torch.zeros(N)
        build("threshold", threshold=0.5, exchange="union").reduce(send, mean, comm)
        return mean[[3, 9, 20]].tolist(), send[[3, 9, 20]].tolist()

    half = np.float32(0.1) / 2
    for mean, left in LocalComm.run(2, worker):
        assert mean == pytest.approx([0.5 + half, 1 + half, 0.0], rel=2**-23)
        assert left == [0.0, 0.0, np.float32(0.1)]


def test_the_gather_exchange_keeps_what_a_worker_did_not_select() -> None:
    def worker(comm: LocalComm) -> tuple[list[float], list[float]]:
        send = torch.zeros(N)
        send[3] = 1.0 if comm.rank == 0 else 0.25
        mean = torch.zeros(N)
        build("threshold", threshold=0.5).reduce(send, mean, comm)
        return mean[3].item(), send[3].item()

    assert LocalComm.run(2, worker) == [(0.5, 0.0), (0.5, 0.25)]


@pytest.mark.parametrize("name", ["threshold", "sage", "topk", "global_topk"])
def test_reduce_without_accumulate_selects_the_same(name: str) -> None:
    fused, plain = build(name, density=0.1), build(name, density=0.1)
    for step in range(3):
        send, grad = gradient(0, step), gradient(1, step)
        whole = send + grad
        fused.accumulate(send, grad)
        assert torch.equal(fused.select(send, Place(0, 1)), plain.select(whole, Place(0, 1)))


@pytest.mark.parametrize("name", ["threshold", "topk", "global_topk"])
def test_candidates_of_another_density_are_forgotten(name: str) -> None:
    """As where Accordion decides: between accumulate and reduce."""
    moved, send = build(name, density=0.02), torch.zeros(N)
    moved.accumulate(send, 10 * gradient(0, 0))
    moved.aim(0.2)
    selected = moved.select(send, Place(0, 1))
    assert torch.equal(selected, build(name, density=0.2).select(send, Place(0, 1)))


def test_more_than_2_to_the_31_elements_are_refused() -> None:
    with pytest.raises(ValueError, match="int32"):
        build("topk", [Slot("huge", 0, (2**31,))])

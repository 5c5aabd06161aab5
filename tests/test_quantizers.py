"""Codes of a few bits, and what quantisers make of numbers worked out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reducers
from benchmarks.gpu.waits import Waits
from reducers import REDUCERS
from reducers.kernels.codes import num_bytes, pack, unpack
from reducers.quantizer import Buckets, Quantizer
from sage.exchange.comm import LocalComm
from sage.interfaces import Reducer, Seeds
from sage.network import Call, wire_bytes
from tests.cases import layout_of

CPU = torch.device("cpu")


def build(name: str, *shapes: tuple[int, ...], worker: int = 2, **settings: Any) -> Reducer:
    config = REDUCERS[name].Settings.model_validate(settings)
    return reducers.build(config, layout_of(shapes), seeds=Seeds(1, worker), device=CPU)


def built(name: str, *shapes: tuple[int, ...], worker: int = 2, **settings: Any) -> Quantizer:
    reducer = build(name, *shapes, worker=worker, **settings)
    assert isinstance(reducer, Quantizer)
    return reducer


def decoded(reducer: Quantizer, send: Tensor) -> Tensor:
    message = reducer.encode(send)
    assert message.dtype == torch.uint8
    assert len(message) == reducer.message_bytes
    return reducer.decode(message)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 1003])
def test_packed_codes_are_their_lowest_bits_one_after_the_other(bits: int, n: int) -> None:
    codes = np.random.RandomState(n).randint(-(2 ** (bits - 1)), 2 ** (bits - 1), size=n).astype(np.int8)
    unpacked = np.unpackbits(codes.view(np.uint8)[:, None], axis=1, bitorder="little")[:, :bits]
    packed = pack(torch.from_numpy(codes), bits)
    assert num_bytes(n, bits) == len(packed)
    assert packed.tolist() == np.packbits(unpacked.ravel(), bitorder="little").tolist()
    assert unpack(packed, n, bits).tolist() == codes.tolist()


def test_buckets_begin_with_their_tensors_and_end_with_zeros() -> None:
    buckets, x = Buckets(layout_of(((5,), (0,), (2, 2), (1,))), 4), torch.arange(1.0, 11.0)
    rows = buckets.rows(x)
    assert rows.tolist() == [[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 8, 9], [10, 0, 0, 0]]
    assert torch.equal(buckets.flat(rows), x)


UNBIASED = [
    ("qsgd", {}),
    ("qsgd", {"bits": 4, "bucket": 3}),
    ("qsgd", {"bits": 2}),
    ("terngrad", {"clip": None}),
    ("natural", {}),
]


@pytest.mark.parametrize(("name", "settings"), UNBIASED)
def test_a_drawn_code_is_right_in_the_mean(name: str, settings: dict[str, Any]) -> None:
    reducer, x = built(name, (5,), (1,), **settings), torch.tensor([0.3, -1.0, 0.02, 0.0, 2.0, 0.7])
    found = torch.stack([decoded(reducer, x) for _ in range(4000)]).double()
    # Five standard errors, of which an element's is its own; what never varies is rounded, at most twice.
    error = 5 * found.std(0) / 4000**0.5 + 2.0**-22
    assert ((found.mean(0) - x).abs() <= error).all()
    assert (found.std(0) > 0).any()


def test_two_workers_draw_differently() -> None:
    x = torch.linspace(-1, 1, 100)
    for name in ("qsgd", "terngrad", "natural"):
        first, second = (decoded(built(name, (100,), worker=worker), x) for worker in (2, 3))
        assert not torch.equal(first, second)


def test_a_level_is_at_most_the_last_one() -> None:
    # In float32 127 / x times x is above 127 for about one x in eight.
    x = torch.rand(2000, generator=torch.Generator().manual_seed(1)) + 0.5
    assert ((127 / x) * x > 127).any()
    reducer = built("qsgd", *[(1,)] * 2000)
    assert torch.allclose(decoded(reducer, -x), -x, rtol=2.0**-22, atol=0)


def test_terngrad_clips_at_standard_deviations_but_sends_what_is_all_alike() -> None:
    many = torch.cat([torch.tensor([1.0, -1.0]).repeat(50), torch.tensor([10.0])])
    clipped = decoded(built("terngrad", (101,)), many).abs().max().item()
    assert clipped == pytest.approx(2.5 * many.double().std(correction=0).item(), rel=1e-6)
    assert decoded(built("terngrad", (101,), clip=None), many).abs().max() == 10
    alike = torch.tensor([3.0, 0.25, 0.25, 0.25])
    assert torch.equal(decoded(built("terngrad", (1,), (3,)), alike), alike)


def test_powers_of_two_are_their_own_natural_codes_between_two_limits() -> None:
    powers = [2.0**exponent for exponent in range(-107, 19)]
    x = torch.tensor([*powers, *(-power for power in powers), 0.0, 2.0**-109, 2.0**30, -(2.0**30)])
    expected = [*x.tolist()[:-3], 0.0, 2.0**18, -(2.0**18)]
    assert decoded(built("natural", (len(x),)), x).tolist() == expected


def test_one_bit_has_two_means_for_a_tensor_or_a_row() -> None:
    x = torch.tensor([1.0, 3.0, -2.0, -4.0, 0.0, -6.0, -1.0, -2.0])
    by_tensor = decoded(built("onebit", (2, 3), (2,)), x)
    # of the first tensor: (1 + 3 + 0) / 3 and -(2 + 4 + 6) / 3; of the second there is no positive one
    assert by_tensor.tolist() == pytest.approx([4 / 3, 4 / 3, -4, -4, 4 / 3, -4, -1.5, -1.5], rel=2.0**-23)
    by_row = decoded(built("onebit", (2, 3), (2,), scales="row"), x)
    assert by_row.tolist() == [2.0, 2.0, -2.0, -5.0, 0.0, -5.0, -1.5, -1.5]


@pytest.mark.parametrize("name", ["qsgd", "terngrad", "natural", "onebit"])
def test_tensors_without_elements_are_none(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 4.0])
    assert torch.equal(
        decoded(built(name, (1,), (0, 3), (2,)), x.clone()), decoded(built(name, (1,), (2,)), x)
    )


@pytest.mark.parametrize("name", ["qsgd", "natural"])
def test_a_quantiser_does_not_wait_for_the_device(name: str) -> None:
    reducer, waits = built(name, (100, 3), (5,)), Waits()
    with waits.counted():
        decoded(reducer, torch.ones(305))
    assert not waits.found


def test_a_block_has_a_scale_and_its_owner_keeps_the_second_error() -> None:
    sends = [torch.tensor([7.0, 3.25, 7.0, 1.0]), torch.tensor([3.5, 1.375, 7.0, 2.0])]

    def worker(comm: LocalComm) -> tuple[list[float], list[float]]:
        reducer = build("block_int", (2,), (2,), bits=4, block=2)
        send, mean = sends[comm.rank].clone(), torch.empty(4)
        reducer.reduce(send, mean, comm)
        return mean.tolist(), send.tolist()

    # What arrives is (7, 3, 7, 1) and (3.5, 1.5, 7, 2): scales 1, and once 0.5. The second worker's average
    # (7, 1.5) is sent as (7, 2), and twice the error stays there; the first one's needs no rounding.
    mean = [5.25, 2.25, 7.0, 2.0]
    assert LocalComm.run(2, worker) == [(mean, [0.0, 0.25, 0.0, 0.0]), (mean, [0.0, -0.125, 0.0, -1.0])]


def test_what_a_worker_sends_in_blocks_does_not_grow_with_the_workers() -> None:
    reducer = build("block_int", (2560,))
    wire = [
        wire_bytes([Call("all_to_all", expected * w / (w + 1)), Call("all_gather", expected / (w + 1))], w)
        for w in (2, 5, 10)
        for expected in [reducer.expected_payload_bytes(w)]
    ]
    # 2 (W - 1) / W times 10 blocks of 4 + 256 bytes
    assert wire == pytest.approx([2600, 2600 * 1.6, 2600 * 1.8], rel=1e-12)

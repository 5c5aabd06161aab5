"""Packed signs, the vote on them, and the scaled signs."""

import numpy as np
import pytest
import torch

from reducers import quantize
from reducers.quantize import CHUNK, majority, num_bytes, pack, pack_by_numpy, pack_by_torch, unpack
from reducers.sign_norm import SignNorm, SignNormSettings
from reducers.signsgd import SignSGD, SignSGDSettings
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds
from tests.cases import layout_of

CPU = torch.device("cpu")


def test_eight_signs_are_a_byte_and_the_sign_of_zero_is_plus() -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-45, -2.0, 3.0])
    packed = pack(x)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [0b00101101, 0b10]
    assert unpack(packed, 10).tolist() == [1, -1, 1, 1, -1, 1, -1, -1, -1, 1]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_two_forms_of_pack_agree_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    x[:: max(1, n // 5)] = 0
    x[1 :: max(1, n // 7)] = float("nan")
    assert torch.equal(pack_by_numpy(x), pack_by_torch(x))
    assert pack_by_torch(x).shape == (num_bytes(n),)


def test_every_byte_is_packed_and_unpacked() -> None:
    every = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little"))  # (2048,)
    signs = 2.0 * every - 1
    for form in (pack_by_numpy, pack_by_torch):
        assert form(signs).tolist() == list(range(256))
    assert torch.equal(unpack(torch.arange(256, dtype=torch.uint8), 2048), signs)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_the_majority_is_the_sign_of_the_sum_of_signs(world_size: int) -> None:
    rng = torch.Generator().manual_seed(world_size)
    signs = 2.0 * torch.randint(2, (world_size, 400), generator=rng) - 1
    for count in range(world_size + 1):  # every count of votes, ties included
        signs[:, count] = torch.where(torch.arange(world_size) < count, 1.0, -1.0)
    votes = torch.stack([pack(row) for row in signs])
    expected = torch.where(signs.sum(0) >= 0, 1.0, -1.0)
    assert torch.equal(unpack(majority(votes), 400), expected)


def test_a_tensor_s_signs_are_scaled_by_its_mean_magnitude() -> None:
    layout = layout_of(((3,), (2, 1), (1,)))
    reducer = SignNorm(SignNormSettings(), layout, seeds=Seeds(1, 2), device=CPU)
    send, mean = torch.tensor([3.0, -6.0, 0.0, 0.5, -1.5, 0.0]), torch.empty(6)
    reducer.reduce(send, mean, LocalComm.alone())
    assert mean.tolist() == [3.0, -3.0, 3.0, 1.0, -1.0, 0.0]
    assert send.tolist() == [0.0, -3.0, -3.0, -0.5, -0.5, 0.0]


@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_pieces_give_what_the_whole_gives(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Integers, and sizes that are powers of two: every sum and mean is exact in any order.
    layout = layout_of(((64,), (1,), (2, 2), (0,), (32,), (2,)))
    rng = torch.Generator().manual_seed(chunk)
    sends = torch.randint(-20, 21, (3, 103), generator=rng).float()

    def reduced(comm: LocalComm) -> list[torch.Tensor]:
        seeds, results = Seeds(1, 2), []
        for reducer in (
            SignNorm(SignNormSettings(), layout, seeds=seeds, device=CPU),
            SignSGD(SignSGDSettings(), layout, seeds=seeds, device=CPU),
        ):
            send, mean = sends[comm.rank].clone(), torch.empty(103)
            reducer.reduce(send, mean, comm)
            results += [send, mean]
        return results

    whole = LocalComm.run(3, reduced)
    monkeypatch.setattr(quantize, "CHUNK", chunk)
    for worker, expected in zip(LocalComm.run(3, reduced), whole, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(worker, expected, strict=True))

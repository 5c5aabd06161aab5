"""Packed signs, the vote on them, and the scaled signs."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.waits import Waits
from reducers.kernels.signs import (
    ScaledSigns,
    num_bytes,
    pack,
    plain_pack,
    plain_unpack,
    unpack,
)
from reducers.kernels.signs_cpu import BYTES, CHUNK
from reducers.sign_norm import SignNorm, SignNormSettings
from reducers.vote import majority
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds
from tests.cases import layout_of

CPU = torch.device("cpu")
Form = Callable[[Tensor, Tensor], None]


def packed(x: Tensor, form: Form = pack) -> Tensor:
    out = torch.full((num_bytes(x.numel()),), 99, dtype=torch.uint8)
    form(x, out)
    return out


def unpacked(signs: Tensor, n: int, form: Form = unpack, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(n, dtype=dtype)
    form(signs, out)
    return out


@pytest.mark.parametrize(("packing", "unpacking"), [(pack, unpack), (plain_pack, plain_unpack)])
def test_eight_signs_are_a_byte_and_the_sign_of_zero_is_plus(packing: Form, unpacking: Form) -> None:
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-45, -2.0, 3.0])
    signs = packed(x, packing)
    assert signs.tolist() == [0b00101101, 0b10]
    assert unpacked(signs, 10, unpacking).tolist() == [1, -1, 1, 1, -1, 1, -1, -1, -1, 1]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_forms_of_packed_signs_agree_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    x = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=dtype)
    x[:: max(1, n // 5)] = 0
    x[1 :: max(1, n // 7)] = float("nan")
    signs = packed(x)
    assert torch.equal(signs, packed(x, plain_pack))
    assert torch.equal(unpacked(signs, n, dtype=dtype), unpacked(signs, n, plain_unpack, dtype))


def test_every_byte_is_packed_and_unpacked() -> None:
    every = torch.from_numpy(np.unpackbits(np.arange(256, dtype=np.uint8), bitorder="little"))  # (2048,)
    signs = 2.0 * every - 1
    for packing, unpacking in ((pack, unpack), (plain_pack, plain_unpack)):
        assert packed(signs, packing).tolist() == list(range(256))
        assert torch.equal(unpacked(torch.arange(256, dtype=torch.uint8), 2048, unpacking), signs)


WORLD_SIZES = (1, 2, 8, 9, 17)
EDGES = ([0, 1], [0, 5], [0, 0, 1, 1, 9, 64, 4000, 4001, 10007, 10007], [0, 3, 8 * BYTES, 24 * BYTES])


def made(edges: list[int], world_size: int, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """The workers' numbers (n,), their signs (W, bytes), in rows that are not adjacent, and scales."""
    rng = torch.Generator().manual_seed(world_size)
    given = [torch.randn(edges[-1], generator=rng, dtype=dtype) for _ in range(world_size)]
    signs = torch.stack([torch.cat([torch.ones(5, dtype=torch.uint8), packed(x)]) for x in given])[:, 5:]
    return given, signs, torch.rand(world_size, len(edges) - 1, generator=rng)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_both_forms_of_an_average_agree_bit_for_bit(
    edges: list[int], world_size: int, dtype: torch.dtype
) -> None:
    given, signs, scales = made(edges, world_size, dtype)
    scales[-1, -1] = float("inf")
    scales[0, 0] = float("nan")
    parts = ScaledSigns(edges)
    for rank, send in enumerate(given):
        results = []
        for form in (parts.average, parts.plain_average):
            left, mean = send.clone(), torch.full_like(send, 7)
            form(signs, scales, rank, left, mean)
            results.append((left, mean))
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours.nan_to_num(nan=1e30), theirs.nan_to_num(nan=1e30))


def test_the_forms_for_a_device_do_not_wait_for_it() -> None:
    (x,), signs, scales = made(EDGES[2], 1, torch.float32)
    parts, mean = ScaledSigns(EDGES[2]), torch.empty_like(x)
    parts.plain_average(signs, scales, 0, x, mean)  # the first one prepares for the device
    waits = Waits()
    with waits.counted():
        packed(x, plain_pack)
        parts.plain_norms(x)
        parts.plain_average(signs, scales, 0, x, mean)
    assert not waits.found


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_average_is_the_mean_of_scaled_signs(world_size: int) -> None:
    edges = EDGES[2]
    given, signs, scales = made(edges, world_size, torch.float64)
    owners = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    sent = [np.where(x >= 0, 1, -1) * s.numpy()[owners] for x, s in zip(given, scales.double(), strict=True)]
    left, mean = given[-1].clone(), torch.empty(edges[-1], dtype=torch.float64)
    ScaledSigns(edges).average(signs, scales, world_size - 1, left, mean)
    # 16 additions and a division of numbers below 1, and a subtraction, in float64.
    assert np.allclose(mean, np.mean(sent, 0), rtol=0, atol=17 * 2.0**-53)
    assert torch.equal(left, given[-1] - torch.from_numpy(sent[-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_norms_are_sums_of_magnitudes(edges: list[int], dtype: torch.dtype) -> None:
    (x,), _, _ = made(edges, 1, dtype)
    parts = ScaledSigns(edges)
    expected = [float(np.abs(x.double().numpy()[start:stop]).sum()) for start, stop in pairwise(edges)]
    # The CPU's form adds in float64 and rounds once; torch's adds at most 10,000 float32 numbers, in parts.
    assert np.allclose(parts.norms(x), expected, rtol=2.0**-23, atol=0)
    assert np.allclose(parts.plain_norms(x), expected, rtol=2.0**-24 * 10_000, atol=0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 8, 9, 16, 17])
def test_the_majority_is_the_sign_of_the_sum_of_signs(world_size: int) -> None:
    rng = torch.Generator().manual_seed(world_size)
    signs = 2.0 * torch.randint(2, (world_size, 400), generator=rng) - 1
    for count in range(world_size + 1):  # every count of votes, ties included
        signs[:, count] = torch.where(torch.arange(world_size) < count, 1.0, -1.0)
    votes = torch.stack([packed(row) for row in signs])
    expected = torch.where(signs.sum(0) >= 0, 1.0, -1.0)
    assert torch.equal(unpacked(majority(votes), 400), expected)


def test_a_tensor_s_signs_are_scaled_by_its_mean_magnitude() -> None:
    layout = layout_of(((3,), (2, 1), (1,)))
    reducer = SignNorm(SignNormSettings(), layout, seeds=Seeds(1, 2), device=CPU)
    send, mean = torch.tensor([3.0, -6.0, 0.0, 0.5, -1.5, 0.0]), torch.empty(6)
    reducer.reduce(send, mean, LocalComm.alone())
    assert mean.tolist() == [3.0, -3.0, 3.0, 1.0, -1.0, 0.0]
    assert send.tolist() == [0.0, -3.0, -3.0, -0.5, -0.5, 0.0]

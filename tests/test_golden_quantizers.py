"""The published quantisers' recorded codes, scales and outputs (golden/README.md says how they were made).

Norms and means are float32 sums, whose order differs: they may be off by a few roundings. Codes are not: no
draw and no element of these inputs lies that close to where a code changes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from reducers.kernels.codes import unpack
from reducers.natural import Natural
from reducers.onebit import OneBit
from reducers.qsgd import QSGD
from reducers.quantizer import part
from reducers.sign_norm import SignNorm
from reducers.terngrad import TernGrad
from sage.draws import Draws
from sage.exchange.comm import LocalComm
from sage.interfaces import Reducer, Seeds
from tests.test_golden import GOLDEN, LAYOUT, NUM_STEPS, N, gradient

SUM_TOLERANCE = 1e-6
"""Relative, of sums of at most 8,192 float32 numbers of one sign in blocks: 16 roundings of 2^-24."""
LR = 0.1
"""Of the recorded EF-signSGD."""


class RecordedDraws(Draws):
    """The recorded integers as the upper bits of words."""

    def __init__(self, integers: np.ndarray, bits: int) -> None:
        super().__init__(0)
        self.integers = torch.from_numpy(integers.astype(np.int64) << 32 - bits)

    def words(self, size: int, device: torch.device) -> Tensor:
        return self.integers.to(torch.int32)


def draws_of(name: str, rank: int, step: int) -> RecordedDraws:
    if name == "natural":
        rng = np.random.RandomState(600_000 + 1000 * rank + step)
        return RecordedDraws(rng.randint(0, 0x7FFFFF, size=N), 23)
    rng = np.random.RandomState(500_000 + 1000 * rank + step)
    return RecordedDraws(rng.randint(0, 1 << 24, size=N), 24)


def recorded(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}_w2.npz"))


def built(name: str, **settings: Any) -> Reducer:
    config = REDUCERS[name].Settings.model_validate(settings)
    return reducers.build(config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))


def is_near(ours: Tensor, theirs: np.ndarray, relative: float) -> bool:
    return bool(np.abs(ours.numpy() - theirs).max() <= relative * np.abs(theirs).max())


def codes_and_scales(reducer: Reducer, message: Tensor) -> tuple[Tensor, Tensor]:
    """A message as the recorded forms of codes (n,) and scales (m,)."""
    if isinstance(reducer, QSGD):
        norms, packed = part(message, reducer._buckets.count)
        return unpack(packed, N, 8), norms
    if isinstance(reducer, TernGrad):
        scales, packed = part(message, len(LAYOUT))
        return unpack(packed, N, 2), scales
    return message, torch.zeros(0)


@pytest.mark.parametrize("name", ["qsgd", "terngrad", "natural"])
def test_codes_are_the_published_ones_and_the_mean_within_the_scales_rounding(name: str) -> None:
    golden = recorded(name)
    scales = {"qsgd": "norms", "terngrad": "scale"}.get(name)

    def worker(comm: LocalComm) -> None:
        reducer = built(name)
        assert isinstance(reducer, QSGD | TernGrad | Natural)
        for index, step in enumerate(golden["steps"].tolist()):
            send, mean = gradient(comm.rank, step), torch.empty(N)
            reducer.generator = draws_of(name, comm.rank, step)
            codes, ours = codes_and_scales(reducer, reducer.encode(send))
            assert np.array_equal(codes.numpy(), golden["codes"][index, comm.rank])
            if scales:
                expected = golden[scales][index, comm.rank]
                assert np.allclose(ours, expected, rtol=SUM_TOLERANCE, atol=0)
            reducer.reduce(send, mean, comm)
            assert is_near(mean, golden["out"][index], SUM_TOLERANCE if scales else 0.0)

    LocalComm.run(2, worker)


def by_element(of_tensors: np.ndarray) -> np.ndarray:
    return np.repeat(of_tensors, [slot.size for slot in LAYOUT])


def masks(bits: np.ndarray) -> np.ndarray:
    """(T, W, N) bool"""
    return np.unpackbits(bits, axis=-1)[..., :N].astype(bool)


def test_one_bit_sgd_makes_each_published_step_from_the_published_memory() -> None:
    golden = recorded("onebit")
    negative = masks(golden["neg_bits"])

    def worker(comm: LocalComm) -> None:
        reducer, memory = built("onebit"), np.zeros(N, np.float32)
        assert isinstance(reducer, OneBit)
        outs = iter(golden["out"])
        for step in range(NUM_STEPS):
            wanted = gradient(comm.rank, step).numpy() + memory
            means = [golden[key][step, comm.rank] for key in ("mean_neg", "mean_pos")]
            mask = negative[step, comm.rank]
            memory = wanted - np.where(mask, *map(by_element, means))

            send, mean = torch.from_numpy(wanted.copy()), torch.empty(N)
            ours, _ = part(reducer.encode(send), 2 * reducer.num_parts)
            assert np.allclose(ours, np.concatenate(means), rtol=SUM_TOLERANCE, atol=0)
            reducer.reduce(send, mean, comm)
            # what left send is near one of two means, which are far apart
            assert np.array_equal((wanted - send.numpy()) < 0, mask)
            assert is_near(send, memory, SUM_TOLERANCE)
            if step in golden["steps"]:
                assert is_near(mean, next(outs), SUM_TOLERANCE)
        assert np.array_equal(memory, golden["memory_last"][comm.rank])

    LocalComm.run(2, worker)


def test_sign_norm_makes_each_published_step_of_ef_signsgd_in_units_of_the_gradient() -> None:
    """The published memory is in units of the parameters, p = lr g + e, its first gradient is not multiplied
    by lr, and its output is a sum over workers. In units of the gradient: a = p / lr."""
    golden = recorded("efsignsgd")
    positive = masks(golden["pos_bits"])

    def worker(comm: LocalComm) -> None:
        reducer, memory = built("sign_norm"), np.zeros(N, np.float32)
        assert isinstance(reducer, SignNorm)
        outs = iter(golden["out"])
        for step in range(NUM_STEPS):
            grad = gradient(comm.rank, step).numpy()
            wanted = memory + (np.float32(LR) * grad if step else grad)
            scale = golden["scale"][step, comm.rank]
            mask = positive[step, comm.rank]
            memory = wanted - by_element(scale) * np.where(mask, np.float32(1), np.float32(-1))

            send, mean = torch.from_numpy(wanted / np.float32(LR)), torch.empty(N)
            before = send.clone()
            reducer.reduce(send, mean, comm)
            assert np.array_equal((before - send).numpy() > 0, mask)
            assert is_near(send, memory / LR, SUM_TOLERANCE)
            if step in golden["steps"]:
                assert is_near(2 * mean, next(outs), SUM_TOLERANCE)
        assert np.array_equal(memory, golden["memory_last"][comm.rank])

    LocalComm.run(2, worker)

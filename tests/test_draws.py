"""Random numbers from a counter."""

import math

import pytest
import torch
from torch import Tensor

from sage.draws import CHUNK, STEP, Draws, as_int64, bits_at
from sage.interfaces import Stateful
from tests.cases import CASES, Case

CPU = torch.device("cpu")
DRAWING = ("sage", "atomo", "random_k", "random_block", "qsgd", "terngrad", "natural")
NUM = 100_000


def assert_uniform(numbers: Tensor, bins: int) -> None:
    """By Pearson's chi-square of integers below bins: its mean is bins - 1, its variance 2 (bins - 1)."""
    expected = numbers.numel() / bins
    chi = float(((numbers.flatten().bincount(minlength=bins) - expected) ** 2 / expected).sum())
    # 5.2 standard deviations, 2e-7 under the normal; its right tail is heavier: below 1e-5 from 15 bins on.
    assert abs(chi - (bins - 1)) <= 5.2 * math.sqrt(2 * (bins - 1))


def test_the_numbers_are_splitmix64s() -> None:
    # Of the seed 1234567, by the published C code (https://prng.di.unimi.it/splitmix64.c).
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(number) % 2**64 for number in bits_at(1234567, torch.arange(1, 4))] == first
    keys = torch.tensor([1234567, as_int64(1234567 + STEP)])
    assert bits_at(keys, torch.tensor([1, 1])).tolist() == [as_int64(number) for number in first[:2]]


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_every_part_of_the_bits_is_uniform_within_a_draw_and_over_draws(seed: int) -> None:
    draws = Draws(seed)
    within = draws.bits(NUM, CPU)
    over = torch.stack([draws.bits(3, CPU)[2] for _ in range(NUM // 10)])  # one number of each draw
    for numbers in (within, over):
        for shift in range(0, 64, 4):
            assert_uniform(numbers >> shift & 15, 16)
        pairs = (numbers[1:] >> 60 & 15) * 16 + (numbers[:-1] >> 60 & 15)
        assert_uniform(pairs, 256)
        assert len(numbers.unique()) == len(numbers)


def test_numbers_below_a_bound_are_uniform_whatever_the_bound() -> None:
    for high in (1, 2, 3, 7, 100, 2**31 - 1):
        drawn = Draws(4).below(torch.full((NUM,), high))
        assert 0 <= int(drawn.min()) <= int(drawn.max()) < high
        if 1 < high <= 100:
            assert_uniform(drawn, high) if high > 15 else assert_uniform(
                drawn[1:] * high + drawn[:-1], high**2
            )


def test_fractions_are_uniform_in_the_unit_interval() -> None:
    drawn = Draws(5).uniform((NUM // 100, 100), CPU)
    assert drawn.dtype == torch.float64
    assert drawn.shape == (NUM // 100, 100)
    assert 0 <= drawn.min() <= drawn.max() < 1
    assert_uniform((drawn * 1000).long(), 1000)
    assert torch.equal((drawn * 2**53).round(), drawn * 2**53)


def test_a_draw_is_the_same_however_it_is_cut_up() -> None:
    draws = Draws(9)
    drawn, key = draws.bits(2 * CHUNK + 3, CPU), Draws(9).key()
    assert torch.equal(drawn, bits_at(key, torch.arange(2 * CHUNK + 3)))
    assert draws.bits(0, CPU).shape == (0,)


def test_words_are_the_halves_of_the_bits_and_fractions_their_upper_24_bits() -> None:
    bits, words, fractions = Draws(9).bits(51, CPU), Draws(9).words(101, CPU), Draws(9).fractions(101, CPU)
    halves = [half for number in bits.tolist() for half in (number % 2**32, number % 2**64 >> 32)]
    assert [word % 2**32 for word in words.tolist()] == halves[:101]
    assert fractions.dtype == torch.float32
    assert fractions.tolist() == [(half >> 8) / 2**24 for half in halves[:101]]


def test_about_normal_numbers_have_its_first_moments() -> None:
    drawn = Draws(6).normal(NUM, CPU).double()
    # Five standard errors; the fourth moment of a sum of four uniform numbers is 3 - 1.2 / 4.
    error = 5 / NUM**0.5
    assert abs(drawn.mean()) <= error
    assert abs((drawn**2).mean() - 1) <= error * (2.7 - 1) ** 0.5
    assert abs((drawn**3).mean()) <= error * (drawn**6).mean() ** 0.5
    assert abs((drawn**4).mean() - 2.7) <= error * (drawn**8).mean() ** 0.5
    assert abs((drawn[1:] * drawn[:-1]).mean()) <= error


def test_the_state_is_a_seed_and_a_count() -> None:
    draws, other = Draws(7), Draws(8)
    draws.bits(3, CPU)
    state = draws.state_dict()
    assert state == {"seed": 7, "count": 1}
    expected = draws.bits(5, CPU)
    other.load_state_dict(state)
    assert torch.equal(other.bits(5, CPU), expected)
    other.manual_seed(7)
    assert not torch.equal(other.bits(5, CPU), expected)
    assert torch.equal(other.bits(5, CPU), expected)


def parts_of(owner: Stateful) -> list[object]:
    """What a checkpoint holds of an object and of its parts."""
    values = [getattr(owner, name) for name in owner.state_names]
    return values + [part for value in values if isinstance(value, Stateful) for part in parts_of(value)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_reducer_draws_from_a_generator_of_one_device(case: Case) -> None:
    """Its state could not be resumed on another: torch's generators have other states on a GPU."""
    parts = parts_of(case.build())
    assert not [part for part in parts if isinstance(part, torch.Generator)]
    assert any(isinstance(part, Draws) for part in parts) == (
        case.reducer in DRAWING or "powersgd" in str(case)
    )

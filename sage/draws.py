"""Random numbers from a counter: the same bits on every device, and a state of two integers."""

import torch
from torch import Tensor

from sage.interfaces import Stateful

STEP, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""SplitMix64's constants."""
CHUNK = 16_384
"""Numbers that a CPU computes at a time: they stay in a core's cache."""
NORMAL_SCALE = (3 / (2**32 - 1)) ** 0.5
"""1 / the standard deviation of a sum of four uniform integers below 2^16."""


class Draws(Stateful):
    """A generator whose numbers depend on seed, draw and index alone, computed on the device that uses them.

    Draw c of a seed s has the key mix(s + c STEP), and its index i the 64 bits mix(key + i STEP), modulo
    2^64: a stream of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators", figure 13), which passes BigCrush. Integer operations alone make them: every device has the
    same numbers, and a checkpoint from one resumes on another.
    """

    state_names = ("seed", "count")

    def __init__(self, seed: int) -> None:
        self.seed, self.count = seed, 0

    def manual_seed(self, seed: int) -> None:
        """Start anew from a seed."""
        self.seed, self.count = seed, 0

    def key(self) -> int:
        """The next draw's key, in [0, 2^64)."""
        self.count += 1
        return _mix(self.seed + self.count * STEP)

    def bits(self, size: int, device: torch.device) -> Tensor:
        """(size,) int64, 64 uniform bits each."""
        key, chunk = self.key(), CHUNK if device.type == "cpu" else max(1, size)
        found = torch.empty(size, dtype=torch.int64, device=device)
        for start in range(0, size, chunk):
            part = found[start : start + chunk]
            part.copy_(bits_at(key, torch.arange(start, start + len(part), device=device)))
        return found

    def below(self, highs: Tensor) -> Tensor:
        """A number in [0, high) for each of highs (count,) int64, uniform up to a relative high 2^-63."""
        return modulo(self.bits(len(highs), highs.device), highs)

    def uniform(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """float64 in [0, 1): multiples of 2^-53."""
        bits = self.bits(torch.Size(shape).numel(), device)
        return (_shifted(bits, 11).double() * 2.0**-53).view(shape)

    def words(self, size: int, device: torch.device) -> Tensor:
        """(size,) int32, 32 uniform bits each: the halves of 64, which cost half as much."""
        return self.bits(-(-size // 2), device).view(torch.int32)[:size]

    def fractions(self, size: int, device: torch.device) -> Tensor:
        """(size,) float32 in [0, 1): multiples of 2^-24, from the upper bits of words."""
        return (self.words(size, device) >> 8).bitwise_and_(2**24 - 1).float().mul_(2.0**-24)

    def normal(self, size: int, device: torch.device) -> Tensor:
        """(size,) float32, about normal, of mean 0 and variance 1: the sum of four uniform numbers.

        Its fourth moment is 2.7 instead of 3. A logarithm and a cosine (Box and Muller 1958) would be exactly
        normal, and differ between devices in their last bits.
        """
        bits = self.bits(size, device)
        total = sum((bits >> shift & 0xFFFF for shift in (16, 32, 48)), bits & 0xFFFF)
        return (total - 2 * 0xFFFF).float() * NORMAL_SCALE


def bits_at(key: int | Tensor, indices: Tensor) -> Tensor:
    """64 uniform bits for each of indices int64, in a draw with this key. A tensor of keys int64 has one for
    each index."""
    x = indices * as_int64(STEP)
    x += key if isinstance(key, Tensor) else as_int64(key)
    # x ^= x >> 30;  x *= FIRST_FACTOR;  x ^= x >> 27;  x *= SECOND_FACTOR;  x ^= x >> 31
    x ^= _shifted(x, 30)
    x *= as_int64(FIRST_FACTOR)
    x ^= _shifted(x, 27)
    x *= as_int64(SECOND_FACTOR)
    x ^= _shifted(x, 31)
    return x


def modulo(bits: Tensor, highs: int | Tensor) -> Tensor:
    """Numbers in [0, high), from 63 of 64 uniform bits each."""
    return _shifted(bits, 1) % highs


def as_int64(x: int) -> int:
    """The int64 with the bits of x modulo 2^64."""
    return (x + 2**63) % 2**64 - 2**63


def _shifted(x: Tensor, count: int) -> Tensor:
    """x >> count, filled with zeros; torch's own fills with the sign."""
    return (x >> count).bitwise_and_(2 ** (64 - count) - 1)


def _mix(x: int) -> int:
    """bits_at of one number that is not below zero."""
    x %= 2**64
    x = (x ^ x >> 30) * FIRST_FACTOR % 2**64
    x = (x ^ x >> 27) * SECOND_FACTOR % 2**64
    return x ^ x >> 31

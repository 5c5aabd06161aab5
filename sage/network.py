"""How long collectives take over a link: the model that the report's advisor and --dry-run share.

A message of B bytes takes a + 8 f B / b seconds over a link of latency a and b bits per second, f being what
frames and headers add: the model of Hockney 1994, "The communication challenge for MPP". The collectives'
algorithms and their times are those of Thakur, Rabenseifner and Gropp 2005, "Optimization of collective
communication operations in MPICH", sections 4.1 and 4.5. All links are alike, nothing else uses them, and
every worker starts at once. Imports no torch.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2
from typing import Literal, NamedTuple

FRAMING = 1538 / 1448
"""Bytes on an Ethernet for each byte of data: a frame of 1,500 bytes has 38 around it and, for TCP over IPv4
with timestamps, 52 of headers in it."""
LATENCY_SECONDS = 50e-6
"""Of a message between two hosts by TCP over Ethernet, about."""
BUCKET_BYTES, FIRST_BUCKET_BYTES = 25 * 2**20, 2**20
"""The buckets of torch's DistributedDataParallel: bucket_cap_mb, and its constant for the first one."""


class Call(NamedTuple):
    """A collective, and the bytes that one worker hands to it."""

    kind: Literal["all_reduce", "all_gather", "all_to_all", "broadcast"]
    payload_bytes: float


@dataclass(frozen=True)
class Link:
    """What joins two workers."""

    bits_per_second: float
    latency_seconds: float = LATENCY_SECONDS

    def seconds(self, call: Call, world_size: int) -> float:
        """The seconds of one collective of W workers, each of which hands in B bytes.

        ring all-reduce   2 (W - 1) messages of B / W bytes
        ring all-gather   W - 1 messages of B bytes
        all-to-all        W - 1 messages of B / W bytes, one to each other worker
        broadcast         ceil(log2 W) messages of B bytes, down a binomial tree
        """
        if world_size == 1:
            return 0.0
        if call.kind == "all_reduce":
            return 2 * (world_size - 1) * self._message(call.payload_bytes / world_size)
        if call.kind == "all_gather":
            return (world_size - 1) * self._message(call.payload_bytes)
        if call.kind == "all_to_all":
            return (world_size - 1) * self._message(call.payload_bytes / world_size)
        return ceil(log2(world_size)) * self._message(call.payload_bytes)

    def total_seconds(self, calls: Iterable[Call], world_size: int) -> float:
        """The seconds of collectives one after the other."""
        return sum(self.seconds(call, world_size) for call in calls)

    def _message(self, num_bytes: float) -> float:
        return self.latency_seconds + 8 * FRAMING * num_bytes / self.bits_per_second


def wire_bytes(calls: Iterable[Call], world_size: int) -> float:
    """What one worker sends: 2 (W - 1) / W B of an all-reduce, (W - 1) B of an all-gather, and (W - 1) / W B
    of an all-to-all, and on average of a broadcast."""
    factors = {
        "all_reduce": 2 * (world_size - 1) / world_size,
        "all_gather": world_size - 1,
        "all_to_all": (world_size - 1) / world_size,
        "broadcast": (world_size - 1) / world_size,
    }
    return sum(factors[call.kind] * call.payload_bytes for call in calls)


def exact_calls(num_elements: int, bytes_per_element: int) -> list[Call]:
    """What the exact average sends in a step: 4 bytes an element, or 2 in a 16-bit format."""
    return [Call("all_reduce", bytes_per_element * num_elements)]


def exposed_seconds(
    num_elements: int, bytes_per_element: int, backward_seconds: float, link: Link, world_size: int
) -> float:
    """How much longer the backward pass takes when the exact average overlaps with it, as in torch's
    DistributedDataParallel (Li et al. 2020, arXiv 2006.15704, section 4.2).

    A bucket is reduced once its gradients are there and the one before it is done. The gradients come at an
    even pace over the backward pass.
    """
    finished = done = 0.0
    for share in bucket_shares(num_elements):
        done += share
        size = share * bytes_per_element * num_elements
        ready = done * backward_seconds
        finished = max(finished, ready) + link.seconds(Call("all_reduce", size), world_size)
    return max(0.0, finished - backward_seconds)


def bucket_shares(num_elements: int) -> list[float]:
    """The part of the gradient that each bucket holds; buckets are filled with float32 gradients."""
    left = 4.0 * num_elements
    sizes: list[float] = []
    while left > 0:
        sizes.append(min(left, BUCKET_BYTES if sizes else FIRST_BUCKET_BYTES))
        left -= sizes[-1]
    return [size / (4.0 * num_elements) for size in sizes]


# --- quantities as people write them ---------------------------------------------------------------

_BITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "tbit": 1e12}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_speed(text: str) -> float:
    """'1gbit', '1 Gbit/s' -> 1e9 bits per second. Raises ValueError."""
    return _parse(text.lower().removesuffix("/s"), _BITS, f"as in 100mbit or 25gbit, got {text!r}")


def parse_seconds(text: str) -> float:
    """'50us', '0.1 ms' -> seconds. Raises ValueError."""
    return _parse(text.lower(), _SECONDS, f"as in 50us or 0.1ms, got {text!r}", zero_is_fine=True)


def _parse(text: str, units: dict[str, float], expected: str, zero_is_fine: bool = False) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zµ]+)\s*", text)
    if not found or found[2] not in units or not (zero_is_fine or float(found[1])):
        raise ValueError(f"expected a number and a unit, {expected}")
    return float(found[1]) * units[found[2]]


def readable_speed(bits_per_second: float) -> str:
    """2.5e9 -> '2.50 Gbit/s'."""
    units = ("kbit/s", "Mbit/s", "Gbit/s", "Tbit/s")
    value, index = bits_per_second / 1e3, 0
    while value >= 999.5 and index < len(units) - 1:
        value, index = value / 1e3, index + 1
    return f"{value:#.3g}".rstrip(".") + f" {units[index]}"

"""How long a call takes on the device and on the host, and under which settings of torch."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

NUM_WARM_UP, NUM_MEASURED, LEAST_MEASURED = 5, 15, 3
BUSY_CYCLES = 3_000_000
"""What keeps a GPU busy for about two milliseconds, while the host queues the next call."""


@dataclass(frozen=True)
class Timing:
    """Medians in milliseconds."""

    alone: float
    """From an idle device until the device is done, as a call costs by itself: at least what the host needs
    to queue it."""
    queued: float
    """What the device needs where the host is ahead, as after a backward pass. The same on a CPU."""
    host: float
    """Until the call returns: what the host needs to queue it, and its waits for the device."""


def timed(
    call: Callable[[], object],
    device: torch.device,
    before: Callable[[], object] = lambda: None,
    seconds: float = 4.0,
) -> Timing:
    """Time a call; before() is called before each of them, and is not measured. After so many seconds the few
    calls made so far have to do."""
    alone, host = _repeat(call, device, before, seconds, busy=False)
    if device.type != "cuda":
        return Timing(alone, alone, host)
    queued, _ = _repeat(call, device, before, seconds, busy=True)
    return Timing(alone, queued, host)


def _repeat(
    call: Callable[[], object], device: torch.device, before: Callable[[], object], seconds: float, busy: bool
) -> tuple[float, float]:
    """Median milliseconds on the device and on the host."""
    ends_at = time.monotonic() + seconds
    times: list[tuple[float, float]] = []
    for _ in range(NUM_WARM_UP + NUM_MEASURED):
        before()
        times.append(_time_once(call, device, busy))
        if time.monotonic() > ends_at and len(times) > LEAST_MEASURED:
            break
    kept = times[min(NUM_WARM_UP, len(times) - LEAST_MEASURED) :]
    on_device, on_host = zip(*kept, strict=True)
    return statistics.median(on_device), statistics.median(on_host)


def _time_once(call: Callable[[], object], device: torch.device, busy: bool) -> tuple[float, float]:
    if device.type != "cuda":
        started = time.perf_counter()
        call()
        passed = 1000 * (time.perf_counter() - started)
        return passed, passed
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if busy:
        torch.cuda._sleep(BUSY_CYCLES)
    begin.record()
    started = time.perf_counter()
    call()
    passed = 1000 * (time.perf_counter() - started)
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)), passed


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Run the with-block in torch's deterministic mode, as runs do by default, or not in it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)

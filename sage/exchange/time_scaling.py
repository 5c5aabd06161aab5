"""Scaling by time: as many elements as the exchange may take time for, over the link as it is now."""

import time
from collections.abc import Callable, Mapping
from dataclasses import astuple
from statistics import median
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from sage.config import Named
from sage.exchange.clock import Stopwatch
from sage.exchange.late import LateValues, stream_for_reading
from sage.exchange.scaling import BoundedSettings, BuildDense, Scaling, clamp
from sage.exchange.step_times import StepMarks, StepTimes, TimedComm, ledger_of
from sage.interfaces import Communicator, Progress, Reducer

NUM_UNUSED = 2
"""The first steps' times are not used: they hold what is made and compiled once."""
NUM_FITTED = 5
"""A figure of the model is the median of so many last steps': one that was disturbed changes nothing ..."""
NUM_COMPRESSIONS = 16
"""... but compression, which does not depend on the link, is a line through so many, of which so many also
say by how much steps take longer than predicted."""
NUM_SETTLED = 3
"""After so many measured steps the density moves."""
FIRST_AIM, LEAST_AIM, MOST_AIM = 0.75, 0.3, 0.9
"""The share of the allowed time that is aimed at, while it is not known how much steps differ; its bounds."""
MOST_RISE, MOST_FALL = 1.5, 4.0
"""The density of one step / that of the step before, and the reverse."""
LEAST_CHANGE = 0.05
"""What differs by less than this share is left as it is."""
DENSE_GAIN = 0.9
"""The dense average begins where it is predicted to take at most this share of the sparse exchange's time, by
the slowest of the last steps: it sends much more than they did."""
FIRST_PATIENCE, MOST_PATIENCE = 20, 1280
"""A dense average that ends within so many steps was a mistake: the next one waits so many, twice as many
each time."""


class TimeSettings(BoundedSettings):
    name: Literal["time"] = "time"
    share: float = Field(default=0.2, gt=0, lt=1)
    """Of a step's time, what the exchange may take."""
    milliseconds: float | None = Field(default=None, gt=0)
    """Or so many milliseconds, however long a step is; null: the share counts."""
    dense: Literal["float32", "bfloat16"] = "float32"
    """What travels where the whole gradient is sent."""


class TimeScaling(Scaling):
    """The density at which an exchange takes as long as it may: a share of the step, or milliseconds.

    The seconds of a sparse exchange are modelled as

        compression + messages latency + bytes / bandwidth,   compression = c0 + c1 d,   bytes = b d

    d being the density that is sent. latency is that of the small message below, the least of the last
    steps; the seconds a byte are (communication - messages latency) / bytes, the median of the last steps;
    c0, c1 the line through the last steps' compression (Theil 1950: the median slope). Aimed at is the
    allowed time divided by what all but one of the last steps took longer than predicted, so that most are
    within it. The density that follows is approached by limited steps, and is bounded.

    A dense all-reduce has compression, messages and bytes of its own: where it is predicted to take no longer
    than the sparse exchange it takes the step, memory included, so that the residual is sent with it; and no
    longer where that changes.

    That the network sets how much is sent is the idea of DC2 (Abdelmoniem and Canini, INFOCOM 2021, "DC2:
    Delay-aware compression control") and Kimad (2023, arXiv 2312.08053), which follow a measured delay and
    bandwidth; the model, and that the dense average takes part, are our own.

    Cost: one all-reduce of 32 bytes a step, which agrees on the slowest worker's compression and rest and, as
    who comes last does not wait, on the least communication: so all workers compute the same density. On a
    GPU the host reads events of two steps ago and what was agreed on a step ago, and waits for neither. The
    density depends on the time that steps took: a run does not repeat bit for bit.
    """

    Settings = TimeSettings
    serves_buckets = False
    state_names = (
        *("density", "is_dense", "age", "patience", "num_measured", "last"),
        *("rests", "latencies", "byte_seconds", "compressions", "densities", "overshoots"),
        *("dense_compressions", "bytes_per_density", "num_messages", "compression_slope", "misses"),
    )

    def __init__(
        self,
        config: TimeSettings,
        reducer: Reducer,
        build_dense: BuildDense,
        *,
        device: torch.device,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(config, reducer, build_dense, device=device)
        self.config, self.dense, self._device = config, build_dense(config.dense), device
        self._watch, self._stream = Stopwatch(device, host_seconds=now), stream_for_reading(device)
        self._lag = 1 if self._watch.on_gpu else 0
        self._waiting: list[StepMarks] = []  # steps whose times are to be agreed on
        self._agreed: list[tuple[LateValues, StepTimes]] = []  # and those to be read
        self._step: StepMarks | None = None
        self.last: list[float] = []
        """A step's times that are to be agreed on, of a checkpoint."""

        self.density = clamp(reducer.target_density, config.lowest, config.highest)
        self.is_dense = False
        self.age, self.patience = 0, 0  # steps since the dense average began or ended; see FIRST_PATIENCE
        self.num_measured = 0
        # The last steps' figures:
        self.rests, self.latencies, self.byte_seconds = list[float](), list[float](), list[float]()
        self.compressions, self.densities, self.overshoots = list[float](), list[float](), list[float]()
        self.dense_compressions, self.misses = list[float](), list[float]()
        self.bytes_per_density, self.num_messages, self.compression_slope = 0.0, 1.0, 0.0
        self._predicted, self._shown = 0.0, dict[str, float]()

    @classmethod
    def check(cls, config: Named, reducer: type[Reducer], reducer_config: Named, simulated: bool) -> None:
        super().check(config, reducer, reducer_config, simulated)
        if simulated:
            raise ValueError(
                "scaling.name: expected another than time with --simulate, which has no link to measure"
            )

    def notes(self) -> list[str]:
        return ["scaling time: the density follows measured times, so the run does not repeat bit for bit"]

    # --- the protocol -----------------------------------------------------------------------------

    def begin_step(self, progress: Progress, comm: Communicator) -> None:
        # 1. The last step's times are known now; all workers agree on them.
        begin = self._watch.now()
        if self._waiting:
            self._waiting[-1].next_begin = begin
        measured = self._next_measured()
        message = self._message(measured)
        start = self._watch.now()
        comm.all_reduce(message, "max")
        if measured is not None:
            self._agreed.append((LateValues(message, self._stream), measured))
        if len(self._agreed) > self._lag:
            self._learn(*self._agreed.pop(0), comm)
        agreed = (start, self._watch.now())

        # 2. The density that follows.
        self._decide(comm.world_size)
        self.current = self.dense if self.is_dense else self.reducer
        self.reducer.set_density(self.density)
        timed = TimedComm(comm, self._watch)
        given = (self.density, self.is_dense, self._predicted)
        self._step = StepMarks(begin, agreed, timed, ledger_of(comm), *given)

    def watched(self, comm: Communicator) -> Communicator:
        assert self._step is not None
        return self._step.comm

    def end_step(self, comm: Communicator) -> None:
        step, self._step = self._step, None
        assert step is not None
        step.end, step.density = self._watch.now(), self.current.density
        before, now = step.counted, ledger_of(comm)
        step.counted = (now[0] - before[0], now[1] - before[1])
        self._waiting.append(step)

    def _next_measured(self) -> StepTimes | None:
        """This worker's times of the oldest step that is not agreed on, once they can be read."""
        if self.last:
            kept, self.last = StepTimes(*self.last), []
            return kept
        if len(self._waiting) > self._lag:
            return self._waiting.pop(0).times(self._watch)
        return None

    def _message(self, measured: StepTimes | None) -> Tensor:
        """(4,) float64: its largest elements are what all agree on."""
        t = measured or StepTimes()
        values = [t.compression, -t.communication, -t.latency, t.rest]
        return torch.tensor(values, dtype=torch.float64).to(self._device, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The last step's own times are kept where they need not be waited for."""
        if self._waiting and not self._watch.on_gpu:
            return {**super().state_dict(), "last": list(astuple(self._waiting[-1].times(self._watch)))}
        return super().state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copied = {name: list(value) if isinstance(value, list) else value for name, value in state.items()}
        super().load_state_dict(copied)
        self._waiting, self._agreed = [], []

    # --- the model --------------------------------------------------------------------------------

    def _learn(self, values: LateValues, own: StepTimes, comm: Communicator) -> None:
        """Take a step that all workers have agreed on."""
        compression, communication, latency, rest = values.read(comm).tolist()
        communication, latency = -communication, -latency
        self.num_measured += 1
        if self.num_measured <= NUM_UNUSED:
            return
        _keep(self.latencies, latency)
        _keep(self.rests, rest if rest >= 0 else (median(self.rests) if self.rests else 0.0))
        if own.wire_bytes > 0:
            in_messages = own.num_collectives * min(self.latencies)
            _keep(self.byte_seconds, max(0.0, communication - in_messages) / own.wire_bytes)
        if own.is_dense:
            _keep(self.dense_compressions, compression)
        elif own.density > 0:
            _keep(self.compressions, compression, NUM_COMPRESSIONS)
            _keep(self.densities, own.density, NUM_COMPRESSIONS)
            _keep(self.overshoots, own.density / own.target)
            self.bytes_per_density, self.num_messages = own.wire_bytes / own.density, own.num_collectives
            self.compression_slope = _slope(self.densities, self.compressions, self.compression_slope)
        exchange = compression + communication + latency
        if own.predicted > 0:
            _keep(self.misses, exchange / own.predicted, NUM_COMPRESSIONS)
        self._shown = {
            "exchange_milliseconds": 1000 * exchange,
            "step_milliseconds": 1000 * (exchange + self.rests[-1]),
            "link_megabits": 8e-6 / self._per_byte() if self._per_byte() > 0 else 0.0,
        }

    def allowed_seconds(self) -> float:
        """What an exchange may take: x <= share (x + rest), or a number."""
        share, milliseconds = self.config.share, self.config.milliseconds
        if milliseconds is not None:
            return milliseconds / 1000
        return median(self.rests) * share / (1 - share)

    def _per_byte(self) -> float:
        return median(self.byte_seconds) if self.byte_seconds else 0.0

    def _fixed_seconds(self) -> float:
        """Of a sparse exchange, whatever is sent; the agreement's message included."""
        pairs = zip(self.densities, self.compressions, strict=True)
        compression = median([seconds - self.compression_slope * density for density, seconds in pairs])
        return compression + (self.num_messages + 1) * min(self.latencies)

    def _seconds_per_density(self) -> float:
        return self.compression_slope + self._per_byte() * self.bytes_per_density

    def _dense_seconds(self, world_size: int) -> float:
        compression = median(self.dense_compressions) if self.dense_compressions else 0.0
        wire_bytes = self.dense.expected_payload_bytes(world_size) * 2 * (world_size - 1) / world_size
        per_byte = self._per_byte() if self.is_dense else max(self.byte_seconds, default=0.0)
        return compression + 2 * min(self.latencies) + per_byte * wire_bytes

    def _aim(self) -> float:
        """The share of the allowed time that is aimed at."""
        if len(self.misses) < NUM_FITTED:
            return FIRST_AIM
        return clamp(1 / sorted(self.misses)[-2], LEAST_AIM, MOST_AIM)

    def _sparse_seconds(self, density: float) -> float:
        """Of the exchange at a target density."""
        return self._fixed_seconds() + self._seconds_per_density() * density * median(self.overshoots)

    def _wanted(self) -> float:
        """The density that fills the allowed time."""
        left = self._aim() * self.allowed_seconds() - self._fixed_seconds()
        if left <= 0:
            return self.config.lowest
        slope = self._seconds_per_density() * median(self.overshoots)  # of the target, not of what is sent
        if slope * self.config.highest <= left:
            return self.config.highest
        return max(left / slope, self.config.lowest)

    def _decide(self, world_size: int) -> None:
        """Set density and is_dense."""
        self.age += 1
        if len(self.rests) < NUM_SETTLED or not self.densities:
            return  # a dense average is not the first to be measured, so that there are densities later on
        wanted = self._wanted()
        sparse, dense = self._sparse_seconds(wanted), self._dense_seconds(world_size)
        if self.is_dense:
            if dense > sparse:
                is_mistake = self.age <= max(self.patience, FIRST_PATIENCE)
                self.patience = min(2 * self.patience, MOST_PATIENCE) if is_mistake else 0
                self.patience = max(self.patience, FIRST_PATIENCE)
                self._switch(False)
                self.density = wanted
        elif self.age > self.patience and self.age >= NUM_FITTED and dense <= DENSE_GAIN * sparse:
            self._switch(True)
        else:
            self.density = _step_to(wanted, self.density)
        self._predicted = 0.0 if self.is_dense else self._sparse_seconds(self.density)
        self._shown["allowed_milliseconds"] = 1000 * self.allowed_seconds()

    def _switch(self, is_dense: bool) -> None:
        """What the link showed to the other kind of exchange is one figure among this one's."""
        self.is_dense, self.age = is_dense, 0
        self.byte_seconds = [self._per_byte()]

    def metrics(self) -> Mapping[str, float]:
        target = 1.0 if self.is_dense else self.density
        return {"target_density": target, "dense": float(self.is_dense), **self._shown}


def _keep(values: list[float], value: float, count: int = NUM_FITTED) -> None:
    """Add one, and forget the first of more than count."""
    values.append(value)
    del values[:-count]


def _slope(x: list[float], y: list[float], before: float) -> float:
    """The median slope of the lines through two points, at least 0; what it was before where too few of the
    x differ."""
    pairs = [(i, j) for j in range(len(x)) for i in range(j) if abs(x[i] - x[j]) > LEAST_CHANGE * x[i]]
    slopes = [(y[i] - y[j]) / (x[i] - x[j]) for i, j in pairs]
    return max(0.0, median(slopes)) if len(slopes) >= NUM_COMPRESSIONS else before


def _step_to(wanted: float, density: float) -> float:
    """The next density on the way from one to another."""
    if abs(wanted - density) <= LEAST_CHANGE * density:
        return density
    return clamp(wanted, density / MOST_FALL, density * MOST_RISE)

"""Collectives and their ledger: over processes (DistComm) and over threads of one process (LocalComm).

The public methods count and time, then call the private ones: bytes and communication time are known in one
place for all reducers, sizes and padding included.
"""

import math
import re
import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sage.exchange.clock import Clock
from sage.exchange.deadline import Deadline
from sage.exchange.threads import ThreadRoom
from sage.interfaces import CommunicationError, Communicator

Result = TypeVar("Result")
WhileWaiting = Callable[[], AbstractContextManager[None]]
"""Entered by a worker while it waits for the others."""
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The older name is deprecated where torch has the newer one."""
SHARE_OF_TIMEOUT = 0.9
"""How much of a group's timeout a read waits in somebody's own loop. After all of it torch's watchdog ends
the process, and with it all waits elsewhere."""


@dataclass
class Ledger:
    """Counts what one worker hands to collectives."""

    num_collectives: int = 0
    payload_bytes: int = 0
    """Handed to collectives: values, indices, sizes and padding."""
    padding_bytes: int = 0
    """The part of payload_bytes that is padding."""
    wire_bytes: float = 0.0
    """Sent by this worker under the ring algorithm."""

    def add(self, payload_bytes: int, wire_factor: float, padding_bytes: int = 0) -> None:
        self.num_collectives += 1
        self.payload_bytes += payload_bytes
        self.padding_bytes += padding_bytes
        self.wire_bytes += payload_bytes * wire_factor

    def take(self) -> dict[str, float]:
        """The counts by name since the last call."""
        taken = asdict(self)
        vars(self).update(asdict(Ledger()))
        return taken


class CountingComm(Communicator):
    """A communicator that counts into a ledger and times itself; subclasses do the communication."""

    def __init__(self, rank: int, world_size: int, clock: Clock | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.ledger = Ledger()
        self._clock = clock or Clock(torch.device("cpu"))

    def all_reduce(self, x: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        if self.world_size > 1:
            self.ledger.add(x.nbytes, 2 * (self.world_size - 1) / self.world_size)
            with self._clock.part("communicate"):
                self._all_reduce(x, op)

    def all_gather(self, x: Tensor) -> Tensor:
        return self._counted_gather(x, padding_bytes=0) if self.world_size > 1 else x.unsqueeze(0)

    def all_gather_ragged(self, x: Tensor) -> list[Tensor]:
        """Two collectives: the lengths (int32), then everything padded to the longest."""
        if self.world_size == 1:
            return [x]
        lengths = self.all_gather(torch.full((1,), x.numel(), dtype=torch.int32, device=x.device))
        counts: list[int] = self.read(lengths).flatten().tolist()  # host synchronisation: the workers' sizes
        longest = max(counts)
        if longest == 0:
            return [x] * self.world_size
        padded = x.new_zeros(longest)
        padded[: x.numel()] = x
        gathered = self._counted_gather(padded, (longest - x.numel()) * x.element_size())
        return [row[:count] for row, count in zip(gathered, counts, strict=True)]

    def all_to_all(self, x: Tensor) -> Tensor:
        assert len(x) == self.world_size
        if self.world_size == 1:
            return x
        self.ledger.add(x.nbytes, (self.world_size - 1) / self.world_size)  # a worker's own row stays
        with self._clock.part("communicate"):
            return self._all_to_all(x)

    def broadcast(self, x: Tensor, source: int = 0) -> None:
        if self.world_size > 1:
            self.ledger.add(x.nbytes, (self.world_size - 1) / self.world_size)
            with self._clock.part("communicate"):
                self._broadcast(x, source)

    def _counted_gather(self, x: Tensor, padding_bytes: int) -> Tensor:
        self.ledger.add(x.nbytes, self.world_size - 1, padding_bytes)
        with self._clock.part("communicate"):
            return self._all_gather(x)

    @abstractmethod
    def _all_reduce(self, x: Tensor, op: str) -> None: ...

    @abstractmethod
    def _all_gather(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _all_to_all(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _broadcast(self, x: Tensor, source: int) -> None: ...


def failed_collective(name: str, error: RuntimeError) -> CommunicationError:
    """A collective's error in one line, without the source line before it and the advice after it."""
    reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
    return CommunicationError(f"{name} failed: {reason}")


class DistComm(CountingComm):
    """Over the processes of a group of torch.distributed. Raises CommunicationError when a collective fails;
    on a GPU, where it is only enqueued, when what it has computed is read."""

    _OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    _last_given: ClassVar[Tensor | None] = None
    """What the process's last collective was given. gloo's threads let go of it a little later than the
    caller: if they were the last, torch 2.6 would need Python's lock (GIL) for that, which
    destroy_process_group holds while it waits for these threads."""

    def __init__(
        self,
        clock: Clock | None = None,
        deadline: Deadline | None = None,
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """deadline: for reading from a GPU; None: such a read waits until torch itself ends the process.
        group: None is the default one. rank is this process's in the group."""
        super().__init__(dist.get_rank(group), dist.get_world_size(group), clock)
        self._deadline, self.group = deadline, group

    def another(self, clock: Clock | None = None) -> "DistComm":
        return DistComm(clock, self._deadline, group=self.group)

    def read(self, x: Tensor) -> Tensor:
        return self._deadline.read(x) if self._deadline else x.cpu()

    def around_collective(self) -> AbstractContextManager[None]:
        """Entered around each collective: for a subclass that measures or orders them."""
        return nullcontext()

    def _all_reduce(self, x: Tensor, op: str) -> None:
        self._call("all_reduce", x, lambda: dist.all_reduce(x, self._OPS[op], group=self.group))

    def _all_gather(self, x: Tensor) -> Tensor:
        gathered = x.new_empty(self.world_size * x.numel())
        self._call("all_gather", x, lambda: _all_gather_single(gathered, x.reshape(-1), self.group))
        return gathered.view(self.world_size, *x.shape)

    def _all_to_all(self, x: Tensor) -> Tensor:
        arrived = torch.empty_like(x)
        self._call("all_to_all", x, lambda: dist.all_to_all_single(arrived, x.contiguous(), group=self.group))
        return arrived

    def _broadcast(self, x: Tensor, source: int) -> None:
        self._call("broadcast", x, lambda: dist.broadcast(x, group=self.group, group_src=source))

    def _call(self, name: str, x: Tensor, collective: Callable[[], Any]) -> None:
        DistComm._last_given = x
        try:
            with self.around_collective():
                collective()
        except RuntimeError as error:  # gloo raises RuntimeError, NCCL its subclasses
            raise failed_collective(name, error) from error
        if self._deadline is not None and self._deadline.applies_to(x):
            self._deadline.enqueued(name, x.device)


class LocalComm(CountingComm):
    """Over threads of one process, combined in rank order: the same bits in every run.

    Workers that call different collectives get a CommunicationError, as do those that wait for one that has
    ended.
    """

    def __init__(
        self,
        rank: int,
        room: ThreadRoom,
        clock: Clock | None = None,
        while_waiting: WhileWaiting = nullcontext,
    ) -> None:
        super().__init__(rank, room.world_size, clock)
        self._room, self._while_waiting = room, while_waiting

    @classmethod
    def alone(cls, clock: Clock | None = None) -> "LocalComm":
        """The communicator of a single worker."""
        return cls(0, ThreadRoom(1, timeout_seconds=0), clock)

    def another(self, clock: Clock | None = None, while_waiting: WhileWaiting | None = None) -> "LocalComm":
        """Another communicator of the same worker, with its own ledger."""
        return LocalComm(self.rank, self._room, clock, while_waiting or self._while_waiting)

    def collect(self, name: str, value: Result) -> list[Result]:
        """Every worker's value, of any type, in rank order; not counted."""
        return self._meet(name, value, list)

    @classmethod
    def run(
        cls, world_size: int, worker: Callable[["LocalComm"], Result], timeout_seconds: float = 60.0
    ) -> list[Result]:
        """Call worker(comm) in world_size threads and return their results in rank order.

        Raises what the first worker to fail raised.
        """
        room = ThreadRoom(world_size, timeout_seconds)
        results: list[Any] = [None] * world_size
        errors: list[BaseException] = []

        def run_one(rank: int) -> None:
            try:
                results[rank] = worker(cls(rank, room))
            except BaseException as error:
                errors.append(error)
            finally:
                room.leave(rank)

        threads = [threading.Thread(target=run_one, args=(rank,), daemon=True) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        deadline = math.inf  # until one fails; a hung one is not waited for longer than the others waited
        try:
            for thread in threads:
                while thread.is_alive() and time.monotonic() < deadline:
                    thread.join(0.1)
                    if errors and deadline == math.inf:
                        deadline = time.monotonic() + timeout_seconds
        except KeyboardInterrupt:  # a thread that computes while the interpreter ends may crash it
            room.fail("the run was interrupted")
            for thread in threads:
                thread.join(timeout_seconds)
            raise
        if errors:
            raise errors[0]
        return results

    def _all_reduce(self, x: Tensor, op: str) -> None:
        x.copy_(self._meet(_call("all_reduce", x, op), x, _sum if op == "sum" else _max))

    def _all_gather(self, x: Tensor) -> Tensor:
        return self._meet(_call("all_gather", x), x, torch.stack).clone()

    def _all_to_all(self, x: Tensor) -> Tensor:
        return self._meet(_call("all_to_all", x), x, _transposed)[self.rank].clone()

    def _broadcast(self, x: Tensor, source: int) -> None:
        x.copy_(self._meet(_call("broadcast", x, source), x, lambda xs: xs[source].clone()))

    def _meet(self, call: str, x: Any, combine: Callable[[list[Any]], Result]) -> Result:
        """The combination shares no storage with any x, and is not to be changed."""
        with self._while_waiting():
            result = self._room.meet(self.rank, call, x, combine)
        self._room.check(f"worker {self.rank} comes from {call}")  # another may have failed meanwhile
        return result


def _call(name: str, x: Tensor, *arguments: object) -> str:
    return f"{name}({', '.join(map(str, (x.dtype, tuple(x.shape), *arguments)))})"


def _sum(xs: list[Tensor]) -> Tensor:
    total = xs[0].clone()
    for x in xs[1:]:
        total += x
    return total


def _transposed(xs: list[Tensor]) -> Tensor:
    """(W, W, ...): the rows for the first worker, then those for the second."""
    return torch.stack(xs, 1)


def _max(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).amax(dim=0)


def connect_comm(
    world_size: int, clock: Clock | None = None, deadline: Deadline | None = None
) -> CountingComm:
    """The communicator of this process: of the default process group, or of a single worker."""
    return DistComm(clock, deadline) if world_size > 1 else LocalComm.alone(clock)


def current_comm(device: torch.device) -> CountingComm:
    """The communicator of this process, for tensors on a device: of the default process group where there is
    one, else of a single worker."""
    if not (dist.is_available() and dist.is_initialized()):
        return LocalComm.alone()
    return comm_of(None, device)


def comm_of(group: dist.ProcessGroup | None, device: torch.device, clock: Clock | None = None) -> DistComm:
    """The communicator of a group's processes for tensors on a device. group: None is the default one."""
    return DistComm(clock, deadline_of(group, device), group=group)


def deadline_of(group: dist.ProcessGroup | None, device: torch.device) -> Deadline | None:
    """For reading what a group's collectives have computed on a device; None: on a CPU they are done when
    they return. group: None is the default one."""
    if device.type != "cuda":
        return None
    return Deadline(SHARE_OF_TIMEOUT * timeout_of(group, device).total_seconds())


def timeout_of(group: dist.ProcessGroup | None, device: torch.device) -> timedelta:
    """How long a group's collectives on a device may take."""
    group = group or dist.group.WORLD
    assert group is not None  # there is one
    found: timedelta = group._get_backend(device).options._timeout
    return found

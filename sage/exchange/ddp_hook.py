"""Any reducer inside DistributedDataParallel: an Exchange a bucket, overlapped with backward.

DDP hands its buckets over in the same order on all workers, as soon as their gradients are there. One thread
exchanges them in that order, on a stream and in a process group of its own, while backward goes on.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from sage.exchange.comm import DistComm
from sage.exchange.exchange import Exchange, State
from sage.exchange.gradient import HALVES, memory_shape
from sage.exchange.progress import StepCounter
from sage.interfaces import Communicator, Progress, Slot, lay_out

Build = Callable[[list[Slot], Tensor, Communicator], Exchange]
"""Makes the Exchange of a layout, of a tensor (n,) like its flat gradient, over a communicator."""
Job = Callable[[], None]


class BucketGradient:
    """A bucket of DDP as an Exchange takes it: flat is its buffer, or a float32 copy where that has 16
    bits."""

    def __init__(self, layout: list[Slot], buffer: Tensor, finds_unused: bool) -> None:
        """finds_unused: a parameter whose gradient is zero everywhere may be one that was not used."""
        self._layout, self._finds_unused = layout, finds_unused
        self._buffer = self.flat = buffer  # (n,)
        self._wide = buffer.new_zeros(buffer.shape, dtype=torch.float32) if buffer.dtype in HALVES else None

    def hold(self, buffer: Tensor) -> None:
        """Take this step's buffer (n,)."""
        self._buffer = buffer
        self.flat = buffer if self._wide is None else self._wide

    def collect(self, read: Callable[[Tensor], Tensor] = Tensor.cpu) -> list[bool]:
        """Bring the gradients into flat; for each slot, whether its parameter has one. Where parameters may
        be unused this waits for the device, by read."""
        if self._wide is not None:
            self._wide.copy_(self._buffer)
        if not self._finds_unused:
            return [True] * len(self._layout)
        parts = [self._buffer[slot.start : slot.stop].any() for slot in self._layout]
        return [bool(is_used) for is_used in read(torch.stack(parts)).tolist()]

    def distribute(self, used: Sequence[bool]) -> None:
        """Bring flat into the buffer; DDP knows itself which parameters are not used."""
        if self._wide is not None:
            self._buffer.copy_(self._wide)


@dataclass
class Part:
    """What one bucket has."""

    names: tuple[str, ...]
    gradient: BucketGradient
    exchange: Exchange


@dataclass
class Step:
    """One backward."""

    progress: Progress
    is_usable: bool = True
    parts: list[Part] = field(default_factory=list)
    """Of the buckets so far."""
    moved: list[Exchange] = field(default_factory=list)
    """Those that have a state to put back where a later bucket cannot be used."""
    results: list[tuple[torch.futures.Future[Tensor], Tensor]] = field(default_factory=list)
    """What DDP waits for: each bucket's future and buffer."""
    done: threading.Event = field(default_factory=threading.Event)


class DDPHook:
    """Exchanges the gradients of a DistributedDataParallel model, in place of its all-reduce.

    After backward() every gradient is the estimate of the workers' mean. Where some worker's gradient was not
    finite is_usable is False on all of them, all gradients are NaN, and memory and reducers are as they were:
    a GradScaler skips the step; without one skip optimizer.step() yourself. To put back what earlier buckets
    have moved, a copy of the state is kept: as much memory again.

    A bucket is an exchange of its own: a method that compares elements of the whole gradient (global_topk,
    sage's threshold) compares those of a bucket, and scaling by error keeps its share of each bucket's.
    """

    def __init__(
        self,
        ddp: DistributedDataParallel,
        build: Build,
        *,
        overlap: bool = True,
        scaler: torch.amp.GradScaler | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Register with DDP, before its first backward.

        overlap: exchange in a thread, while backward goes on; else at once, with the same bits. scaler: the
        GradScaler of the loop, so that the memory is kept in unscaled units.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise ValueError(
                f"expected a model in DistributedDataParallel, got {type(ddp).__name__}: "
                "for a model without it use reducers.attach"
            )
        self._ddp, self._module = weakref.ref(ddp), ddp.module
        self._names: dict[Tensor, str] = {p: name for name, p in ddp.module.named_parameters()}
        self._finds_unused = ddp.find_unused_parameters or ddp.static_graph
        self._build, self._scaler = build, scaler
        self.comm = DistComm(group=_another_group(ddp))
        self.steps = StepCounter(steps_per_epoch)
        self.is_usable = True
        """Whether the last backward's gradients can be used: the same on all workers."""
        self._parts: dict[tuple[str, ...], Part] = {}
        self._before: State | None = None
        """Where buckets that are new take their state from: that of another division."""
        self._step: Step | None = None
        self._is_passive = False
        self._error: BaseException | None = None
        self._stream: torch.cuda.Stream | None = None
        self._jobs: SimpleQueue[Job | None] | None = SimpleQueue() if overlap else None
        if self._jobs is not None:
            threading.Thread(target=_work, args=(self._jobs,), daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        ddp.register_comm_hook(self, _take_bucket)

    # --- what a loop calls ----------------------------------------------------------------------------

    def set_progress(self, *, epoch: float | None = None, lr: float | None = None) -> None:
        """Say where training stands, before backward: for schedules that follow the epoch (it may be a
        fraction) or the learning rate. What was given last stays."""
        self.steps.set(epoch, lr)

    def prime(self, compute_loss: Callable[[], Tensor]) -> None:
        """Let DDP arrange its buckets before the first step: one backward whose gradients nobody uses.

        DDP arranges them anew after its first backward. A run that is to resume with the same bits calls this
        at its start and after each load_state_dict, on all workers, with a loss of any batch. The model's
        buffers and torch's global generators are put back; what else the loss changes is the caller's.
        """
        buffers = [(buffer, buffer.detach().clone()) for buffer in self._module.buffers()]
        devices = {parameter.device for parameter in self._names if parameter.is_cuda}
        self._is_passive = True
        try:
            with torch.random.fork_rng(devices):
                compute_loss().backward()
        finally:
            self._is_passive = False
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        for parameter in self._names:
            parameter.grad = None

    @property
    def exchanges(self) -> list[Exchange]:
        """One a bucket, in the order of the last backward."""
        return [part.exchange for part in self._parts.values()]

    @property
    def density(self) -> float:
        """Elements a worker sent in the last step / n, mean over workers."""
        sizes = [exchange.layout[-1].stop for exchange in self.exchanges]
        sent = sum(size * exchange.density for size, exchange in zip(sizes, self.exchanges, strict=True))
        return sent / sum(sizes) if sizes else 1.0

    def state_dict(self) -> State:
        """All that the next step depends on, by parameter name and by bucket; each worker's is its own."""
        state = self._before or _merge(self._parts.values())
        return {"step": self.steps.step, **state}

    def load_state_dict(self, state: State) -> None:
        """Take a state_dict, also one of an AttachedExchange of the same model, or of other buckets. Errors
        (KeyError, ValueError) come with the next backward, when the buckets are known."""
        self._parts, self._before = {}, {name: state[name] for name in ("parameters", "buckets")}
        self.steps.step = state["step"]

    # --- what DDP calls -------------------------------------------------------------------------------

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange a bucket; the future is ready when all buckets of this backward are."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        future = torch.futures.Future[Tensor](devices=[buffer.device] if buffer.is_cuda else [])
        if self._is_passive:
            future.set_result(buffer)
            return future
        self._check()
        step = self._step = self._step or Step(self.steps.progress())
        step.results.append((future, buffer))
        is_last, ready = bucket.is_last(), _now(buffer)
        self._do(step, lambda: self._exchange(step, parameters, buffer, is_last), buffer, ready)
        if is_last:
            self._step = None
            self._do(step, lambda: self._end(step), buffer, ready)
            _after_backward(lambda: self._wait(step))
        return future

    def _check(self) -> None:
        """Raise what cannot work."""
        if self._error is not None:
            raise self._error
        if not getattr(self._ddp(), "_divide_by_initial_world_size", True):
            raise ValueError("join: expected divide_by_initial_world_size=True, got False")

    def _wait(self, step: Step) -> None:
        """Wait for the thread, and raise in backward what was raised there."""
        step.done.wait()
        if self._error is not None:
            raise self._error
        self.is_usable = step.is_usable
        self.steps.step += 1

    def _do(self, step: Step, job: Job, buffer: Tensor, ready: torch.cuda.Event | None) -> None:
        """Do a job after all others, in the thread where there is one."""
        if self._jobs is None:
            self._run(step, job, buffer, ready)
        else:
            self._jobs.put(lambda: self._run(step, job, buffer, ready))

    # --- in the thread --------------------------------------------------------------------------------

    def _run(self, step: Step, job: Job, buffer: Tensor, ready: torch.cuda.Event | None) -> None:
        try:
            with torch.no_grad(), self._on_stream(buffer, ready):
                job()
        except BaseException as error:
            self._error = self._error or error
            step.done.set()  # backward raises it

    def _on_stream(self, buffer: Tensor, ready: torch.cuda.Event | None) -> AbstractContextManager[Any]:
        """On a GPU: a stream of the hook's own, after the gradients are there."""
        if ready is None:
            return nullcontext()
        torch.cuda.set_device(buffer.device)
        self._stream = self._stream or torch.cuda.Stream(buffer.device, priority=-1)
        self._stream.wait_event(ready)
        buffer.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def _exchange(self, step: Step, parameters: list[Tensor], buffer: Tensor, is_last: bool) -> None:
        """Exchange one bucket. All workers agree whether it can be used: if not, no later one is
        exchanged."""
        if self._error is not None:
            return
        part = self._part_of(parameters, buffer)
        step.parts.append(part)
        if not step.is_usable:
            return
        part.gradient.hold(buffer)
        if not is_last:
            part.exchange.back_up()
        step.is_usable = part.exchange.step(part.gradient, step.progress, scaler=self._scaler)
        if step.is_usable:
            step.moved.append(part.exchange)

    def _end(self, step: Step) -> None:
        """Put back what was moved where the step cannot be used; let DDP go on."""
        try:
            if not step.is_usable:
                for exchange in step.moved:
                    exchange.restore()
                for _, buffer in step.results:
                    buffer.fill_(torch.nan)
            if self._error is None:
                self._parts, self._before = {part.names: part for part in step.parts}, None
        finally:
            for future, buffer in step.results:
                future.set_result(buffer)
            step.done.set()

    def _part_of(self, parameters: list[Tensor], buffer: Tensor) -> Part:
        """A bucket's part. One that is new takes its state, by names, from those that were before."""
        names = tuple(self._names[parameter] for parameter in parameters)
        if names in self._parts:
            return self._parts[names]
        layout = lay_out((self._names[parameter], memory_shape(parameter)) for parameter in parameters)
        if buffer.layout is not torch.strided or buffer.numel() != layout[-1].stop:
            expected = f"{layout[-1].stop} dense elements"
            raise ValueError(
                f"bucket of {names[0]}: expected {expected}, got {buffer.numel()} ({buffer.layout})"
            )
        gradient = BucketGradient(layout, buffer, self._finds_unused)
        gradient.hold(buffer)
        part = Part(names, gradient, self._build(layout, gradient.flat, self.comm))
        if self._before is None and self._parts:
            self._before = _merge(self._parts.values())
        if self._before is not None:
            part.exchange.load_state_dict(self._before)
        return part


def _take_bucket(hook: DDPHook, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP registers: it wants a function."""
    return hook.take(bucket)


def _work(jobs: "SimpleQueue[Job | None]") -> None:
    """Do jobs in their order; holds no hook while it waits."""
    while (job := jobs.get()) is not None:
        job()
        del job


def _now(buffer: Tensor) -> torch.cuda.Event | None:
    """The point where a buffer's gradients are there; None on the CPU, where they are."""
    return torch.cuda.current_stream(buffer.device).record_event() if buffer.is_cuda else None


def _after_backward(call: Job) -> None:
    """Call at the end of backward, which raises what the call raises; at once where a worker that has joined
    takes part without a backward of its own."""
    if torch._C._current_graph_task_id() == -1:
        call()
    else:
        Variable._execution_engine.queue_callback(call)


def _another_group(ddp: DistributedDataParallel) -> dist.ProcessGroup:
    """Another group of DDP's processes, with its timeout: collectives of the two never mix."""
    group = ddp.process_group
    device = next(ddp.module.parameters()).device
    made = dist.new_group(
        dist.get_process_group_ranks(group),
        timeout=group._get_backend(device).options._timeout,
        backend=None if group == dist.group.WORLD else dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)  # this process is in it
    return made


def _merge(parts: Iterable[Part]) -> State:
    """The states of all buckets as one."""
    states = [part.exchange.state_dict() for part in parts]
    return {
        "parameters": {name: values for state in states for name, values in state["parameters"].items()},
        "buckets": [bucket for state in states for bucket in state["buckets"]],
    }

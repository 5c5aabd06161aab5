"""Any reducer inside DistributedDataParallel: an Exchange a bucket, overlapped with backward.

DDP hands its buckets over in the same order on all workers, as soon as their gradients are there. One thread
exchanges them in that order, on a stream and in a process group of its own, while backward goes on.
"""

import threading
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn import SyncBatchNorm
from torch.nn.parallel import DistributedDataParallel

from sage.exchange.absent import named
from sage.exchange.bucket import BucketGradient, BucketHook, Part, Step, merge
from sage.exchange.clock import Clock, HiddenClock
from sage.exchange.comm import comm_of, timeout_of
from sage.exchange.echo import Build
from sage.exchange.exchange import ExchangeNorms, State
from sage.exchange.gradient import layout_of
from sage.interfaces import seed_of

Job = Callable[[], None]


class DDPHook(BucketHook):
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
        model: nn.Module | None = None,
        clock: Clock | None = None,
        restores: bool = True,
    ) -> None:
        """Register with DDP, before its first backward.

        overlap: exchange in a thread, while backward goes on; else at once, with the same bits. scaler: the
        GradScaler of the loop, so that the memory is kept in unscaled units. model: whose names the
        parameters have, where it is but a part of DDP's module. clock: times what the thread does. restores:
        false keeps no copy for a step that cannot be used, for a loop that ends there.
        """
        if not isinstance(ddp, DistributedDataParallel):
            raise ValueError(
                f"expected a model in DistributedDataParallel, got {type(ddp).__name__}: "
                "for a model without it use reducers.attach, after fully_shard reducers.hook_fsdp"
            )
        if overlap and any(isinstance(module, SyncBatchNorm) for module in ddp.modules()):
            # NCCL may hang where two groups' collectives start in another order on another worker.
            raise ValueError(
                "overlap: expected False for a model with SyncBatchNorm, whose backward has collectives, too"
            )
        self._ddp, self._module = weakref.ref(ddp), ddp.module
        named = (model or ddp.module).named_parameters()
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in named}
        self._finds_unused = ddp.find_unused_parameters or ddp.static_graph
        self._build, self._restores = build, restores
        self._clock = clock or Clock(torch.device("cpu"))
        first = next(iter(self._names))
        comm = comm_of(_another_group(ddp), first.device, self._clock)
        super().__init__(comm, scaler=scaler, steps_per_epoch=steps_per_epoch)
        self.nonfinite: tuple[str, Tensor] | None = None
        """Where they cannot: Exchange.nonfinite of the first bucket that is to blame."""
        self.measure = False
        """Whether the next backward is to measure norms."""
        self._seed: int | None = None
        """Where buckets that are new take their own generators' seeds from."""
        self._before: State | None = None
        """Where buckets that are new take their state from: that of another division."""
        self._is_passive = False
        self._stream: torch.cuda.Stream | None = None
        self._jobs: SimpleQueue[Job | None] | None = SimpleQueue() if overlap else None
        if self._jobs is not None:
            given = (self._jobs, torch.get_num_threads())
            threading.Thread(target=_work, args=given, daemon=True).start()
            weakref.finalize(self, self._jobs.put, None)
        layout = layout_of((name, parameter) for parameter, name in self._names.items())
        self._warm_up(build, layout, first)
        ddp.register_comm_hook(self, _take_bucket)

    # --- what a loop calls ----------------------------------------------------------------------------

    def prime(self, compute_loss: Callable[[], Tensor]) -> None:
        """Let DDP arrange its buckets before the first step: one backward whose gradients nobody uses.

        DDP arranges them anew after its first backward. A run that is to resume with the same bits calls this
        at its start and after each load_state_dict, on all workers, with a loss of any batch. The model's
        buffers and torch's global generators are put back; what else the loss changes is the caller's.
        """
        self._is_passive = True
        try:
            prime(self._module, compute_loss)
        finally:
            self._is_passive = False

    def metrics(self) -> Mapping[str, float | Tensor]:
        """The reducer's metrics: of each the mean over the buckets that have it, weighted by their
        elements."""
        sums: dict[str, float | Tensor] = {}
        sizes: dict[str, int] = {}
        for exchange in self.exchanges:
            size = exchange.layout[-1].stop
            for name, value in exchange.metrics().items():
                sums[name] = sums.get(name, 0.0) + size * value
                sizes[name] = sizes.get(name, 0) + size
        return {name: value / sizes[name] for name, value in sums.items()}

    def norms(self) -> dict[str, Tensor]:
        """Of the last backward, where it was measured: gradient_norm of this worker and ExchangeNorms.values,
        over all buckets."""
        measured = [exchange.measured for exchange in self.exchanges if exchange.measured is not None]
        if not measured:
            return {}
        gradient_norm = torch.stack([norm.double() for norm, _ in measured]).norm()
        return {
            "gradient_norm": gradient_norm,
            **ExchangeNorms.of_all([norms for _, norms in measured]).values(),
        }

    def state_dict(self) -> State:
        return {"step": self.steps.step, **self._state()}

    def load_state_dict(self, state: State) -> None:
        """Take a state_dict, also one of an AttachedExchange of the same model, or of other buckets. Errors
        (ValueError) come with the next backward, when the buckets are known."""
        self._parts, self._before = {}, {name: state[name] for name in ("parameters", "buckets")}
        self.steps.step = state["step"]

    def reseed(self, seed: int) -> None:
        """Restart this worker's own generators from a seed, with the next backward."""
        self._before, self._parts, self._seed = self._state(), {}, seed

    def _state(self) -> State:
        """Of all buckets."""
        return self._before or merge(self._parts.values())

    # --- what DDP calls -------------------------------------------------------------------------------

    def take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange a bucket; the future is ready when all buckets of this backward are."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        future = torch.futures.Future[Tensor](devices=[buffer.device] if buffer.is_cuda else [])
        if self._is_passive:
            future.set_result(buffer)
            return future
        self._check()
        step = self._step = self._step or Step(self.steps.progress(), self.measure)
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
        self.is_usable, self.nonfinite = step.is_usable, step.nonfinite
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
            self._error = self._error or named(error, self.comm, self.steps.step)
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
        if step.is_usable:
            part.gradient.hold(buffer)
            with self._clock.part(HiddenClock.EXCHANGE):
                step.exchange(part, self._scaler, keeps=self._restores and not is_last)

    def _end(self, step: Step) -> None:
        """Put back what was moved where the step cannot be used; let DDP go on."""
        try:
            if not step.is_usable:
                step.put_back()
                for _, buffer in step.results:
                    buffer.fill_(torch.nan)
            if self._error is None:
                self._parts, self._before = {part.names: part for part in step.parts}, None
                self._seed = None
        finally:
            for future, buffer in step.results:
                future.set_result(buffer)
            step.done.set()

    def _part_of(self, parameters: list[Tensor], buffer: Tensor) -> Part:
        """A bucket's part. One that is new takes its state, by names, from those that were before."""
        names = tuple(self._names[parameter] for parameter in parameters)
        if names in self._parts:
            return self._parts[names]
        layout = layout_of((self._names[parameter], parameter) for parameter in parameters)
        if buffer.layout is not torch.strided or buffer.numel() != layout[-1].stop:
            expected = f"{layout[-1].stop} dense elements"
            raise ValueError(
                f"bucket of {names[0]}: expected {expected}, got {buffer.numel()} ({buffer.layout})"
            )
        gradient = BucketGradient(layout, buffer, self._finds_unused)
        gradient.hold(buffer)
        part = Part(names, gradient, self._build(layout, gradient.flat, self.comm))
        if self._before is None and self._parts:
            self._before = merge(self._parts.values())
        if self._before is not None:
            part.exchange.load_state_dict(self._before)
        if self._seed is not None:
            part.exchange.reseed(seed_of(self._seed, *names))
        return part


def prime(module: nn.Module, compute_loss: Callable[[], Tensor]) -> None:
    """Make a backward whose gradients nobody uses, and put back the module's buffers and torch's global
    generators: DistributedDataParallel arranges its buckets by it. module: what it wraps."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    parameters = list(module.parameters())
    with torch.random.fork_rng({parameter.device for parameter in parameters if parameter.is_cuda}):
        compute_loss().backward()
    with torch.no_grad():
        for buffer, values in buffers:
            buffer.copy_(values)
    for parameter in parameters:
        parameter.grad = None


def _take_bucket(hook: DDPHook, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP registers: it wants a function."""
    return hook.take(bucket)


def _work(jobs: "SimpleQueue[Job | None]", num_threads: int) -> None:
    """Do jobs in their order; holds no hook while it waits."""
    torch.set_num_threads(num_threads)  # OpenMP's number is a thread's own
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
        timeout=timeout_of(group, device),
        backend=None if group == dist.group.WORLD else dist.get_backend(group),
        use_local_synchronization=True,
    )
    assert isinstance(made, dist.ProcessGroup)  # this process is in it
    return made

"""Training through DistributedDataParallel (DDP), which exchanges gradients while backward computes the
next ones: `overlap`.

The exchange is the reducer's, one a bucket, in a hook of DDP; the plain float32 mean is DDP's own all-reduce,
without a hook. The parameters, their gradients and the optimizer are those of the flat loop.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from sage.exchange.clock import HiddenClock, Moment
from sage.exchange.comm import failed_collective
from sage.exchange.ddp_hook import DDPHook, prime
from sage.exchange.gradient import layout_of
from sage.interfaces import Progress, Stateful, TrainingError
from sage.training.metrics import Meter
from sage.training.nonfinite import Named, NonFiniteFinder, StepNumbers, parts_of
from sage.training.settings import DEFAULT_BUCKET_MB, is_plain_average
from sage.training.state import TaskSnapshot
from sage.training.train import Trainer, TrainingParts

UNUSED = "overlap.find_unused_parameters: expected true, since a step has not used all parameters, got false"


class LossModule(nn.Module):
    """A task's model with its loss, as the module that DDP wraps."""

    def __init__(self, model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self._loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self._loss(batch)


class OverlappedTrainer(Trainer):
    """A trainer whose gradients are exchanged while backward computes the next ones.

    Of its seconds, backward ends when the last gradient is computed; reduce is what the step then waits for,
    of which communicate is spent in collectives; hidden is what the exchange took before, beside the other
    phases, which add up to the wall time without it. DDP's own all-reduce does not say what it hides: there
    is no hidden then, and all of reduce is communicate. Nor does it leave a worker's own gradient to be
    measured, so that step lines have no norms.
    """

    def _set_up_exchange(self, parts: TrainingParts) -> None:
        self._parts, self._ddp = parts, self._wrap(LossModule(self.task.model, self._loss))
        self._loss = self._loss_through_ddp
        timer = self.clock
        self._hook: DDPHook | None = None
        numbers: StepNumbers
        if is_plain_average(self.settings):
            self._plain = PlainAverage(self.trained, self.comm)
            self.average, numbers = self._plain, MeanNumbers(self.task.model)
        else:
            timer = self._hidden = HiddenClock(self.clock)
            self._hook = self._make_hook(timer)
            self.comm = self._hook.comm
            self.average, numbers = self._hook, BucketNumbers(self._hook, self.device)
        self.meter = Meter(self.comm.ledger.take, timer, self.side, self.device)
        self.finder = NonFiniteFinder(numbers, self.position, self.store)
        self._prime()

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        overlap = self.settings.overlap
        assert overlap is not None
        return DistributedDataParallel(
            module,
            # DDP's own default has a smaller first bucket.
            bucket_cap_mb=None if overlap.bucket_mb == DEFAULT_BUCKET_MB else overlap.bucket_mb,
            find_unused_parameters=overlap.find_unused_parameters,
            gradient_as_bucket_view=True,
            **_without_sync(),
        )

    def _make_hook(self, clock: HiddenClock) -> DDPHook:
        return DDPHook(
            self._ddp,
            partial(self._parts.build_part, reads_late=self.reads_late),
            steps_per_epoch=self.steps_per_epoch,
            model=self.task.model,
            clock=clock,
            restores=self.settings.on_nonfinite == "skip",
        )

    def _prime(self) -> None:
        """Let DDP arrange its buckets by one backward that nobody uses, so that a resumed run has those of
        the run that it resumes."""
        snapshot = TaskSnapshot(self.task)
        snapshot.take()

        def compute_loss() -> Tensor:
            with self._autocast():
                return self._loss(next(self.task.train_batches(0)))

        if self._hook is None:
            prime(self._ddp.module, compute_loss)
        else:
            self._hook.prime(compute_loss)
        snapshot.put_back()

    def notes(self) -> list[str]:
        """Those of a reducer of the whole gradient."""
        layout = layout_of((name, p) for name, p in self.task.model.named_parameters() if p.requires_grad)
        nothing = torch.empty(0, device=self.device)  # needs no memory as large as the model
        return self._parts.compress(layout, nothing, self._parts.seeds).notes()

    # --- one step -------------------------------------------------------------------------------------

    def _loss_through_ddp(self, batch: Any) -> Tensor:
        try:
            loss: Tensor = self._ddp(batch)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" in str(error):
                raise TrainingError(UNUSED) from None
            raise
        return loss

    def _begin_gradient(self) -> None:
        self._drop_gradient()
        if self._hook is not None:
            progress, _ = self._progress()
            self._hook.set_progress(epoch=progress.epoch, lr=progress.lr)
            self._hook.measure = self._is_logging_step()

    def _add_gradient(self, batch: Any, count: int, is_last: bool) -> Tensor:
        with nullcontext() if is_last else self._ddp.no_sync():
            return super()._add_gradient(batch, count, is_last)

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """The last one of a step also exchanges: what that takes after all gradients are computed is the
        phase "reduce"."""
        if not is_last:
            super()._backward(loss, is_last)
            return
        computed: list[Moment] = []
        _at_the_end_of_backward(loss, lambda: computed.append(self.clock.become("reduce")))
        try:
            with self.clock.phase("backward"):
                loss.backward()
                if self._hook is None:
                    self.clock.add("communicate", computed[0], self.clock.now())
        except RuntimeError as error:
            if self._hook is None and computed:  # DDP's own collectives are waited for then
                raise failed_collective("all_reduce", error) from error
            raise
        if self._hook is None:
            self._plain.count()
        else:
            self._hidden.end_step(computed[0])

    def _end_gradient(self) -> list[bool]:
        """DDP knows itself which parameters are not used."""
        return []

    def _drop_gradient(self) -> None:
        for parameter in self.trained:
            parameter.grad = None

    def exchange_gradient(
        self, progress: Progress, used: list[bool], measure: bool, found: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What is left to do once backward has exchanged: clip the mean, and return the norms."""
        clip = self.settings.clip
        if clip.norm is not None:
            with self.clock.phase("optimizer"):
                torch.nn.utils.clip_grad_norm_(self.trained, clip.norm)
        return self._hook.norms() if self._hook is not None and measure else {}


class PlainAverage(Stateful):
    """DDP's own all-reduce, as far as it is counted."""

    density = 1.0

    def __init__(self, trained: Iterable[nn.Parameter], comm: Any) -> None:
        self._num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
        self._comm = comm

    def count(self) -> None:
        """A step's all-reduce, of the whole gradient in all."""
        self._comm.ledger.add(self._num_bytes, 2 * (self._comm.world_size - 1) / self._comm.world_size)

    def metrics(self) -> Mapping[str, float | Tensor]:
        return {}


class MeanNumbers:
    """Those of DDP's own mean: where a worker's gradient is not finite, the mean is not, on all of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def norm(self) -> Tensor:
        norms = torch._foreach_norm([grad for _, grad in self._named()])
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    def largest(self) -> Named:
        named = self._named()
        magnitudes = torch._foreach_norm([grad for _, grad in named], torch.inf)
        return [
            (f"the largest magnitude of {name}", magnitude)
            for (name, _), magnitude in zip(named, magnitudes, strict=True)
        ]

    def gradients(self) -> Named:
        return self._named()

    def memories(self) -> Named:
        return []

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            (f"the workers' mean gradient of {name}", parameter.grad)
            for name, parameter in self._model.named_parameters()
            if parameter.grad is not None and parameter.numel()
        ]


class BucketNumbers:
    """Those of a hook, whose workers have agreed whether a step's gradients can be used."""

    def __init__(self, hook: DDPHook, device: torch.device) -> None:
        self._hook, self._device = hook, device

    def norm(self) -> Tensor:
        return torch.tensor(0.0 if self._hook.is_usable else torch.nan, device=self._device)

    def largest(self) -> Named:
        return self.gradients()

    def gradients(self) -> Named:
        found = self._hook.nonfinite
        return [(f"the gradient of {found[0]}", found[1])] if found else []

    def memories(self) -> Named:
        for exchange in self._hook.exchanges:
            yield from parts_of("what was not sent", exchange.layout, exchange.feedback.memory)


def _without_sync() -> dict[str, Any]:
    """DDP's options to let every worker keep its own buffers (BatchNorm's) while it trains, and, where torch
    has that one, to leave the first weights alone: run() gives every worker rank 0's."""
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return {name: False for name in (buffers, "init_sync") if name in known}


def _at_the_end_of_backward(loss: Tensor, call: Callable[[], Any]) -> None:
    """Call once backward from the loss has computed all gradients, before DDP waits for their exchange."""

    def on_start(_: Tensor) -> None:
        Variable._execution_engine.queue_callback(call)  # before DDP's, which comes with the last gradient

    loss.register_hook(on_start)

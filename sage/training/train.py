"""The training loop: compute_gradient, exchange_gradient, apply; what is logged; what ends a run."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sage.console import say
from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm
from sage.exchange.echo import warm_up
from sage.exchange.exchange import Exchange, norm
from sage.exchange.feedback import Feedback
from sage.exchange.gradient import GradientBuffer
from sage.exchange.scaling import Scaling
from sage.interfaces import (
    Communicator,
    Place,
    Progress,
    Reducer,
    Seeds,
    Slot,
    Stopped,
    Task,
    TrainingError,
    seed_of,
)
from sage.runfolder.checkpoint import CheckpointWriter, read_state
from sage.runfolder.manifest import BEST, Checkpoint
from sage.runfolder.record import Recorder
from sage.training.agree import (
    Agreement,
    Evidence,
    LateAgreement,
    Request,
    find_difference,
    wait_for_all,
)
from sage.training.compiled import compiled_loss
from sage.training.evaluation import Evaluate, broadcast, values_over_workers
from sage.training.metrics import Meter
from sage.training.nonfinite import FlatNumbers, NonFiniteFinder
from sage.training.optim import clip_norm
from sage.training.precision import tf32
from sage.training.settings import RunSettings
from sage.training.state import BestWeights, Position, Saved, TaskSnapshot, TrainingState, best_epoch
from sage.workers.store import RendezvousStore


class Compression(NamedTuple):
    """What compresses a flat gradient."""

    reducer: Reducer
    feedback: Feedback
    scaling: Scaling
    """Of this reducer."""

    def notes(self) -> list[str]:
        """What the user of these settings should know, a line each."""
        return [*self.reducer.notes(), *self.scaling.notes()]


Compress = Callable[[list[Slot], Tensor, Seeds], Compression]
"""Makes what compresses the flat gradient of a layout. The tensor (n,) is like that gradient."""


@dataclass(frozen=True)
class TrainingParts:
    """What is trained, and how: built from the configuration. The flat gradient and what compresses it are
    made when they are asked for, since they are as large as the model."""

    task: Task
    optimizer: torch.optim.Optimizer
    compress: Compress
    seeds: Seeds

    def seeds_of(self, layout: Sequence[Slot]) -> Seeds:
        """Those of a part of the gradient: two parts draw differently."""
        names = [slot.name for slot in layout]
        return Seeds(seed_of(self.seeds.common, *names), seed_of(self.seeds.worker, *names))

    def build_part(
        self, layout: list[Slot], like: Tensor, comm: Communicator, reads_late: bool = False
    ) -> Exchange:
        """The exchange of a part of the gradient; the part's tensor (n,) is like the given one."""
        reducer, feedback, scaling = self.compress(layout, like, self.seeds_of(layout))
        return Exchange(feedback, reducer, comm, layout, reads_late=reads_late, scaling=scaling)

    @cached_property
    def gradient(self) -> GradientBuffer:
        return GradientBuffer(self.task.model)

    @cached_property
    def compression(self) -> Compression:
        """Of the whole gradient."""
        return self.compress(self.gradient.layout, self.gradient.flat, self.seeds)


@dataclass(frozen=True)
class RunServices:
    """What a trainer uses and does not own: communicators, clock, files."""

    comm: CountingComm
    """For the exchange: its ledger counts."""
    side: Communicator
    """For what is not part of the method (metrics, checks, the first weights): not counted."""
    clock: Clock
    recorder: Recorder
    store: RendezvousStore
    writer: CheckpointWriter | None = None
    """Writes the run's checkpoints; None: there are none."""
    reads_late: bool = False
    """Whether the host has to wait for the device to learn its numbers, as for a GPU: then it does so as
    seldom as it can."""


class GradientAverage(Saved, Protocol):
    """What has put the mean in place of the workers' gradients: an Exchange, or one a bucket."""

    @property
    def density(self) -> float: ...

    def metrics(self) -> Mapping[str, float | Tensor]: ...


class Trainer:
    """Trains a task with a reducer and error feedback over the workers of a communicator."""

    simulated = False

    def __init__(self, settings: RunSettings, parts: TrainingParts, services: RunServices) -> None:
        self.settings = settings
        self.task, self.optimizer = parts.task, parts.optimizer
        self.comm, self.side, self.clock = services.comm, services.side, services.clock
        self.recorder, self.store, self.writer = services.recorder, services.store, services.writer
        self.reads_late = services.reads_late
        self.trained = [p for p in self.task.model.parameters() if p.requires_grad]
        self.device = self.trained[0].device

        self.base_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.global_batch = self.task.batch_per_worker * self.comm.world_size * settings.accumulate_steps
        self.steps_per_epoch = settings.steps_of(self.task.steps_per_epoch)
        self.position = Position(self.steps_per_epoch)
        self._loss: Callable[[Any], Tensor] = (
            compiled_loss(self.task) if settings.compile else lambda batch: self.task.loss(batch)
        )
        self._snapshot = TaskSnapshot(self.task) if settings.on_nonfinite == "skip" else None

        self._set_up_exchange(parts)
        self.agreement = self._make_agreement()
        own: dict[str, Saved]
        own = {"exchange": self.average, "meter": self.meter, "task": self.task}
        self.state = TrainingState(self.task.model, self.optimizer, self.position, own, self.device)
        keeps_best = settings.checkpoint.best and self.comm.rank == 0
        self._best = BestWeights(self.task.model, self.task.higher_is_better) if keeps_best else None

    def _set_up_exchange(self, parts: TrainingParts) -> None:
        """Make what exchanges the gradients, what measures it, and what finds numbers that are not finite."""
        self.gradient = parts.gradient
        warm_up(parts.build_part, self.gradient.layout, self.gradient.flat, self.comm.world_size)
        compression = self._compression = parts.compression
        self.exchange = Exchange(
            compression.feedback,
            compression.reducer,
            self.comm,
            self.gradient.layout,
            clock=self.clock,
            reads_late=self.reads_late,
            scaling=compression.scaling,
        )
        self.average: GradientAverage = self.exchange
        self.meter = Meter(self.comm.ledger.take, self.clock, self.side, self.device)
        numbers = FlatNumbers(self.gradient, compression.feedback)
        self.finder = NonFiniteFinder(numbers, self.position, self.store)

    def notes(self) -> list[str]:
        """What the user of the reducer's settings should know, a line each."""
        return self._compression.notes()

    # --- one step -------------------------------------------------------------------------------------

    def compute_gradient(self, batches: Iterator[Any]) -> tuple[Tensor, list[bool]]:
        """Make this worker's gradient of a step: the mean over as many of the next batches as the step takes.

        Returns the mean of their losses, a scalar, detached, and for each slot whether its parameter has a
        gradient.
        """
        self._begin_gradient()
        left = self.task.steps_per_epoch - self.position.index * self.settings.accumulate_steps
        count = min(self.settings.accumulate_steps, left)
        losses = []
        for index in range(count):
            with self.clock.phase("data"):
                batch = next(batches)
                if self._snapshot and index == 0:
                    self._snapshot.take()
            losses.append(self._add_gradient(batch, count, is_last=index == count - 1))
        loss = torch.stack(losses).mean() if count > 1 else losses[0]
        return loss, self._end_gradient()

    def _begin_gradient(self) -> None:
        """Make the gradient zero."""
        with self.clock.phase("backward"):
            self.gradient.zero()

    def _add_gradient(self, batch: Any, count: int, is_last: bool) -> Tensor:
        """Add the gradient of one of count batches, divided by count; returns its loss, a scalar,
        detached."""
        with tf32(self.settings.precision == "tf32"):
            with self.clock.phase("forward"), self._autocast():
                loss = self._loss(batch)
            self._backward(loss / count if count > 1 else loss, is_last)
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16")

    def _backward(self, loss: Tensor, is_last: bool) -> None:
        """is_last: of the step."""
        with self.clock.phase("backward"):
            loss.backward()

    def _end_gradient(self) -> list[bool]:
        """For each slot, whether its parameter has a gradient."""
        with self.clock.phase("backward"):
            return self.gradient.collect(self.side.read)

    def _drop_gradient(self) -> None:
        """Let nobody take a gradient that is not used for the mean."""
        self.gradient.distribute([False] * len(self.gradient.layout))

    def exchange_gradient(
        self, progress: Progress, used: list[bool], measure: bool, found: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Replace the flat gradient by the estimate of the workers' mean; returns norms, scalars on the
        device, if measure.

        used: which slots have a gradient on any worker. found: the flat gradient's norm, where it is known.
        """
        grad, clip = self.gradient.flat, self.settings.clip
        raw_norm = norm(grad, found, waits=not self.reads_late) if measure else None

        if clip.norm is not None and clip.before_reduce:
            with self.clock.phase("optimizer"):
                clip_norm(grad, clip.norm, found)
        norms = self.exchange.average(grad, progress, used=used, measure=measure)
        with self.clock.phase("optimizer"):
            if clip.norm is not None and not clip.before_reduce:
                clip_norm(grad, clip.norm)
            self.gradient.distribute(used)

        if raw_norm is None or norms is None:
            return {}
        return {"gradient_norm": raw_norm, **norms.values()}

    def apply(self, lr_factor: float) -> None:
        """One step of the optimizer, with the base learning rates times lr_factor."""
        with self.clock.phase("optimizer"):
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * lr_factor
            self.optimizer.step()

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train all epochs from the current position on; returns the summary.

        All that no other phase counts is phase "log": what is measured, written and shown. Raises
        TrainingError, CommunicationError from a collective, and Stopped.
        """
        with self.clock.phase("log"):
            self.meter.start()
            return self._run()

    def _run(self) -> dict[str, Any]:
        position = self.position
        with self.clock.phase("agree"):
            broadcast([parameter.data for parameter in self.task.model.parameters()], self.side)
        while position.epoch < self.settings.epochs and not self._has_reached_target():
            self._train_epoch()
            self._end_epoch()
            due = self.writer is not None and self.writer.is_due_after(position.epoch)
            with self.clock.phase("agree"):
                request = self.agreement.agree_between_steps()
            self._act_on(request, due)
        return self._summary(self._evaluate(self.task.evaluate_at_end))

    def _train_epoch(self) -> None:
        """Train what is left of the epoch."""
        position = self.position
        first_batch = position.index * self.settings.accumulate_steps
        batches = self.task.train_batches(position.epoch, first_batch)
        while position.index < self.steps_per_epoch:
            with self.clock.phase("agree"):
                self.store.set_step(position.step)
            request = self._train_step(batches)
            position.index, position.step = position.index + 1, position.step + 1
            self.recorder.step_done(position.step)
            self._act_on(request)

    def _end_epoch(self) -> None:
        """Evaluate, check that the replicas are equal, log, and move on to the next epoch."""
        position, task = self.position, self.task
        with self.clock.phase("agree"):
            self.agreement.settle()
        values = self._evaluate(task.evaluate)
        for name, value in values.items():
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {task.evaluated} {name} became {value} after epoch {position.epoch}"
                )
        with self.clock.phase("agree"):
            difference = find_difference(self.replicated(), self.side)
        if difference:
            raise TrainingError(f"the replicas differ after epoch {position.epoch}: {difference}")
        position.scores.append(values[task.score])
        with self.clock.phase("checkpoint"):  # on all workers, whose phases are averaged
            if self._best:
                self._best.consider(position.scores)
        self._log_epoch(values)
        position.epoch, position.index = position.epoch + 1, 0

    def _train_step(self, batches: Iterator[Any]) -> Request:
        """Train on the next batches, or skip them; returns what the workers request."""
        progress, lr_factor = self._progress()
        logging = self._is_logging_step()

        loss, used = self.compute_gradient(batches)
        with self.clock.phase("agree"):
            evidence = self.finder.evidence(loss, late=self.agreement.reads_late)
            request, used = self.agreement.agree(evidence, used, waits=logging)
        if request is Request.SKIP and self._skip_nonfinite(loss, logging):
            return request

        norms = self.exchange_gradient(progress, used, logging, evidence.norm)
        self.apply(lr_factor)

        self.meter.add_step(loss, self.average.density)
        self.position.log_due, self.position.skipped_in_a_row = False, 0
        if logging:
            self._log_step(progress, norms)
        return request

    def _progress(self) -> tuple[Progress, float]:
        """Where training stands, and what the base learning rates are multiplied by there."""
        position, steps = self.position, self.steps_per_epoch
        epoch = position.epoch + position.index / steps
        lr_factor = self.settings.schedule.factor(epoch, self.global_batch)
        return Progress(epoch, position.step, self.base_lrs[0] * lr_factor, steps), lr_factor

    def _is_logging_step(self) -> bool:
        position = self.position
        is_last = position.index == self.steps_per_epoch - 1
        return position.step % self.settings.log.every == 0 or is_last or position.log_due

    def _has_reached_target(self) -> bool:
        """Whether the last score is the target of stop_at_score or better."""
        target, scores = self.settings.stop_at_score, self.position.scores
        if target is None or not scores:
            return False
        return scores[-1] >= target if self.task.higher_is_better else scores[-1] <= target

    # --- skipped steps, checkpoints -------------------------------------------------------------------

    def _skip_nonfinite(self, loss: Tensor, logging: bool) -> bool:
        """Find what is not finite, on any worker, and undo what this step's forward pass changed; False where
        all is finite and only the sum was too large. Raises TrainingError where steps are not skipped."""
        position = self.position
        message = self.finder.find(loss)
        if not message:
            return False
        if self._snapshot is None:
            raise TrainingError(message)

        self._snapshot.put_back()
        self._drop_gradient()
        position.log_due = logging
        position.skipped, position.skipped_in_a_row = position.skipped + 1, position.skipped_in_a_row + 1
        message += f": step skipped, {position.skipped_in_a_row} in a row"
        if position.skipped_in_a_row >= self.settings.skip_limit:
            raise TrainingError(f"{message}, which is skip_limit")
        if self.comm.rank == 0:
            say(message)
        return True

    def _make_agreement(self) -> Agreement:
        """One that answers late where the host would have to wait for the device, unless steps are skipped:
        that is decided before anything of a step has changed."""
        is_due = self.writer.is_due if self.writer else _never
        if self.reads_late and self.settings.on_nonfinite == "stop":
            return LateAgreement(self.side, self.device, is_due, self._fail_late)
        return Agreement(self.side, self.device, is_due)

    def _fail_late(self, evidence: Evidence) -> None:
        """Raise TrainingError, on all workers, for an earlier step that was not finite on one of them."""
        raise TrainingError(self.finder.find_late(evidence))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take everything from a checkpoint. Raises ValueError where its files cannot be used."""
        place = Place(self.comm.rank, self.comm.world_size)
        self.state.restore(checkpoint, place, self.steps_per_epoch, self.settings.seed, self.holds_optimizer)
        if self._best and BEST in checkpoint.manifest.files:
            self._best.weights = read_state(checkpoint, BEST)

    @property
    def best_weights(self) -> dict[str, Any] | None:
        """The best epoch's weights so far, where this worker keeps them."""
        return self._best.weights if self._best else None

    @property
    def holds_optimizer(self) -> bool:
        """Whether this worker steps the optimizer, for itself or for others."""
        return True

    def _act_on(self, request: Request, due: bool = False) -> None:
        """Write a checkpoint where one is due or requested; raise Stopped where the run is to end."""
        if request is not Request.NOTHING or due:
            with self.clock.phase("agree"):
                request = max(request, self.agreement.settle())
        ends = request in (Request.STOP, Request.QUIT)
        if self.writer is not None and (ends or due or request is Request.SAVE):
            position = self.position
            with self.clock.phase("checkpoint"):
                shared = self.state.shared() if self.comm.rank == 0 else None
                own, sync, best = self.state.own(), self.recorder.sync, self.best_weights
                self.writer.save(position.step, position.epoch, shared, own, sync, best)
        if ends:
            # Rank 0 may host the store, so no worker exits before it is done.
            wait_for_all(self.side, self.device)
            raise Stopped(by_hand=request is Request.QUIT)

    # --- what is logged -------------------------------------------------------------------------------

    def _log_step(self, progress: Progress, norms: dict[str, Tensor]) -> None:
        average, position = self.average, self.position
        values = {"lr": progress.lr, "density": average.density, **average.metrics(), **norms}
        line = self.meter.step_line(values)
        if not all(math.isfinite(line[name]) for name in norms):
            where = f"at epoch {position.epoch}, step {position.step}"
            raise TrainingError(self.finder.find_in_memory() or f"a norm became infinite {where}")
        for name in values:
            if not math.isfinite(line[name]):  # of a reducer; a mean, so all workers find it
                where = f"at epoch {position.epoch}, step {position.step}"
                raise TrainingError(f"the metric {name} became {line[name]} {where}")
        line = {"kind": "step", "epoch": position.epoch, "step": position.step, **line}
        self.recorder.write(line)
        self.recorder.show_step(line)

    def _log_epoch(self, values: dict[str, float]) -> None:
        position = self.position
        score = {"name": self.task.score, "value": position.scores[-1]}
        line = {
            "kind": "epoch",
            "epoch": position.epoch,
            "step": position.step,
            self.task.evaluated: values,
            "score": score,
            "skipped": position.skipped,
            **self.meter.epoch_line(),
        }
        self.recorder.write(line)
        self.recorder.show_epoch(line, self.settings.epochs)
        position.log_due = False

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        with self.clock.phase("evaluate"):
            return values_over_workers(self.task, evaluate, self.side, self.device)

    def replicated(self) -> list[tuple[str, Tensor]]:
        """What must be the same on all workers, by name."""
        return [(name, parameter.data) for name, parameter in self.task.model.named_parameters()]

    def _summary(self, test: dict[str, float]) -> dict[str, Any]:
        totals, scores, target = self.meter.totals(), self.position.scores, self.settings.stop_at_score
        best = best_epoch(scores, self.task.higher_is_better)
        return {
            "world_size": self.comm.world_size,
            "simulated": self.simulated,
            "epochs": len(scores),
            "steps": self.position.step,
            "skipped": self.position.skipped,
            "parameters": sum(parameter.numel() for parameter in self.trained),
            "score": {
                "name": self.task.score,
                "higher_is_better": self.task.higher_is_better,
                "last": scores[-1],
                "best": scores[best],
                "best_epoch": best,
                "target": target,
                "reached": None if target is None else self._has_reached_target(),
            },
            **({"test": test} if test else {}),
            **totals,
            "density": {"target": getattr(self.settings.reducer, "density", None), **totals["density"]},
        }


def _never() -> bool:
    """No checkpoint is ever due."""
    return False

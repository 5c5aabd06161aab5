"""The loop: compute_gradient, exchange, apply; what is logged; what ends a run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sage.console import say
from sage.exchange.clock import Clock
from sage.exchange.comm import CountingComm
from sage.exchange.feedback import Feedback
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Communicator, Place, Progress, Reducer, Stopped, Task, TrainingError
from sage.runfolder.checkpoint import CheckpointWriter
from sage.runfolder.manifest import Checkpoint
from sage.runfolder.record import Recorder
from sage.training.agree import Agreement, Request, find_bad, find_difference
from sage.training.metrics import Meter
from sage.training.optim import clip_norm
from sage.training.settings import RunSettings
from sage.training.state import Position, TaskSnapshot, TrainingState
from sage.workers.store import RendezvousStore

Parts = tuple[Task, Reducer, Feedback, GradientBuffer, torch.optim.Optimizer]
"""What a trainer is built from, in its order."""
Sums = dict[str, tuple[float, float]]


class Trainer:
    """Trains a task with a reducer and feedback over the workers of comm.

    comm is counted; side carries what is not part of the method: metrics, checks, the first weights.
    """

    simulated = False

    def __init__(
        self,
        settings: RunSettings,
        task: Task,
        reducer: Reducer,
        feedback: Feedback,
        gradient: GradientBuffer,
        optimizer: torch.optim.Optimizer,
        comm: CountingComm,
        side: Communicator,
        clock: Clock,
        recorder: Recorder,
        store: RendezvousStore,
        writer: CheckpointWriter | None = None,
    ) -> None:
        """writer: writes the run's checkpoints; None: there are none."""
        self.settings, self.task, self.reducer, self.feedback = settings, task, reducer, feedback
        self.gradient, self.optimizer = gradient, optimizer
        self.comm, self.side, self.clock = comm, side, clock
        self.recorder, self.store, self.writer = recorder, store, writer
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.global_batch = task.batch_per_worker * comm.world_size
        device = gradient.flat.device
        self.meter = Meter(comm.ledger.take, clock, side, device)
        self.agreement = Agreement(side, device, writer.is_due if writer else lambda: False)
        self.position = Position(task.steps_per_epoch)
        own = {"feedback": feedback, "reducer": reducer, "meter": self.meter, "task": task}
        self.state = TrainingState(task.model, optimizer, self.position, own, device)
        self._snapshot = TaskSnapshot(task) if settings.on_nonfinite == "skip" else None

    # --- one step ------------------------------------------------------------------------------------------

    def compute_gradient(self, batch: Any) -> Tensor:
        """Fill the flat gradient with this worker's; returns its loss, a scalar, detached."""
        self.gradient.zero()
        autocast = torch.autocast(
            self.gradient.flat.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )
        with self.clock.phase("forward"), autocast:
            loss = self.task.loss(batch)
        with self.clock.phase("backward"):
            loss.backward()
        return loss.detach()

    def exchange(self, progress: Progress, measure: bool) -> dict[str, float]:
        """Replace the flat gradient by the estimate of the workers' mean; returns the norms, where asked
        for."""
        grad, clip, memory = self.gradient.flat, self.settings.clip, self.feedback.memory
        self.gradient.check()
        norms = [grad.norm()] if measure else []
        if clip.norm is not None and clip.before_reduce:
            clip_norm(grad, clip.norm)
        self.reducer.begin_step(progress)
        self.feedback.begin_step(progress)
        with self.clock.phase("reduce"):
            self.feedback.compensate(self.reducer, grad)
        norms += [memory.norm()] if measure else []
        with self.clock.phase("reduce"):
            self.reducer.reduce(memory, grad, self.comm)
            self.feedback.after_reduce(self.reducer)
        norms += [memory.norm()] if measure else []
        if clip.norm is not None and not clip.before_reduce:
            clip_norm(grad, clip.norm)
        named = _named_norms(*(norm.item() for norm in norms)) if measure else {}
        if not self.reducer.takes_feedback:  # what is left in send is no error
            named.pop("compression_error", None)
        return named

    def apply(self, lr_factor: float) -> None:
        """One step of the optimizer, with the base learning rates times lr_factor."""
        with self.clock.phase("optimizer"):
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * lr_factor
            self.optimizer.step()

    # --- the loop ------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train all epochs, from where the position stands; returns the summary.

        Raises TrainingError, CommunicationError from a collective, and Stopped.
        """
        at = self.position
        self._broadcast([parameter.data for parameter in self.task.model.parameters()])
        while at.epoch < self.settings.epochs and not (at.scores and self._reached(at.scores[-1])):
            self._train_epoch()
            values = self._evaluate(self.task.evaluate)
            for name, value in values.items():
                if not math.isfinite(value):
                    told = f"the {self.task.evaluated} {name} became {value} after epoch {at.epoch}"
                    raise TrainingError(told)
            if told := find_difference(self.replicated(), self.side):
                raise TrainingError(f"the replicas differ after epoch {at.epoch}: {told}")
            at.scores.append(values[self.task.score])
            self._log_epoch(values)
            at.epoch, at.index = at.epoch + 1, 0
            self._act_on(
                self.agreement.agree(), self.writer is not None and self.writer.is_due_after(at.epoch)
            )
        return self._summary(self._evaluate(self.task.evaluate_at_end))

    def _reached(self, score: float) -> bool:
        """Whether a score is the target of stop_at_score or better."""
        target = self.settings.stop_at_score
        return target is not None and (score >= target if self.task.higher_is_better else score <= target)

    def _train_epoch(self) -> None:
        """What is left of the epoch."""
        at = self.position
        batches = self.task.train_batches(at.epoch, at.index)
        while at.index < self.task.steps_per_epoch:
            self.store.set_step(at.step)
            request = self._train_step(batches)
            at.index, at.step = at.index + 1, at.step + 1
            self.recorder.step_done(at.step)
            self._act_on(request)

    def _train_step(self, batches: Iterator[Any]) -> Request:
        """One batch, used or dropped; what the workers request besides."""
        at, steps = self.position, self.task.steps_per_epoch
        with self.clock.phase("data"):
            batch = next(batches)
            if self._snapshot:
                self._snapshot.take()
        epoch = at.epoch + at.index / steps
        factor = self.settings.schedule.factor(epoch, self.global_batch)
        progress = Progress(epoch, at.step, self.base_lrs[0] * factor, steps)
        logging = at.step % self.settings.log.every == 0 or at.index == steps - 1 or at.owed
        loss = self.compute_gradient(batch)
        with self.clock.phase("agree"):
            request = self.agreement.agree(loss + self.gradient.flat.sum())
        if request is Request.DROP:
            told = self.store.collect(f"bad/{at.step}", find_bad(loss, self.gradient))
            if bad := [f"{what} on rank {rank}" for rank, what in enumerate(told) if what]:
                self._drop(bad[0], logging)
                return request  # else only the sum was too large
        norms = self.exchange(progress, measure=logging)
        self.apply(factor)
        self.meter.add_step(loss, self.reducer.density)
        at.owed, at.skipped_in_a_row = False, 0
        if logging:
            self._log_step(progress, norms)
        return request

    # --- dropped steps, checkpoints -------------------------------------------------------------------

    def _drop(self, bad: str, logging: bool) -> None:
        """Undo what this step's forward pass changed. Raises TrainingError where steps are not dropped."""
        at = self.position
        told = f"{bad} at epoch {at.epoch}, step {at.step}"
        if self._snapshot is None:
            raise TrainingError(told)
        self._snapshot.put_back()
        at.owed, at.skipped, at.skipped_in_a_row = logging, at.skipped + 1, at.skipped_in_a_row + 1
        told += f": step dropped, {at.skipped_in_a_row} in a row"
        if at.skipped_in_a_row >= self.settings.skip_limit:
            raise TrainingError(f"{told}, which is skip_limit")
        if self.comm.rank == 0:
            say(told)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises ValueError where its files cannot be used."""
        place, steps = Place(self.comm.rank, self.comm.world_size), self.task.steps_per_epoch
        self.state.restore(checkpoint, place, steps, self.settings.seed, self.holds_optimizer)

    @property
    def holds_optimizer(self) -> bool:
        """Whether this worker steps the optimizer, for itself or for others."""
        return True

    def _act_on(self, request: Request, due: bool = False) -> None:
        """Write a checkpoint where one is due or wished; raise Stopped where the run is to end."""
        ends = request in (Request.STOP, Request.QUIT)
        if self.writer is not None and (ends or due or request is Request.SAVE):
            at = self.position
            shared = self.state.shared() if self.comm.rank == 0 else None
            with self.clock.phase("checkpoint"):
                self.writer.save(at.step, at.epoch, shared, self.state.own(), self.recorder.sync)
        if ends:
            self._wait()  # rank 0 may hold the store: no one leaves alone
            raise Stopped(by_hand=request is Request.QUIT)

    def _wait(self) -> None:
        """For all workers."""
        self.side.all_reduce(torch.zeros(1, device=self.gradient.flat.device))

    # --- lines ----------------------------------------------------------------------------------------

    def _log_step(self, progress: Progress, norms: dict[str, float]) -> None:
        values = {"lr": progress.lr, "density": self.reducer.density, **self.reducer.metrics(), **norms}
        line = self.meter.step_line(values)
        at = self.position
        for name in norms:  # finite gradients whose norm is not, or a memory that has grown
            if not math.isfinite(line[name]):
                raise TrainingError(f"{name} became {line[name]} at epoch {at.epoch}, step {at.step}")
        line = {"kind": "step", "epoch": at.epoch, "step": at.step, **line}
        self.recorder.write(line)
        self.recorder.show_step(line)

    def _log_epoch(self, values: dict[str, float]) -> None:
        at, score = self.position, {"name": self.task.score, "value": self.position.scores[-1]}
        line = {"kind": "epoch", "epoch": at.epoch, "step": at.step, self.task.evaluated: values}
        line |= {"score": score, "skipped": at.skipped, **self.meter.epoch_line()}
        self.recorder.write(line)
        self.recorder.show_epoch(line, self.settings.epochs)
        at.owed = False

    def _evaluate(self, evaluate: Callable[[], Sums | None]) -> dict[str, float]:
        """The values over all workers' shares, with rank 0's buffers (BatchNorm's) on all of them."""
        with self.clock.phase("evaluate"):
            self._broadcast(list(self.task.model.buffers()))
            sums = evaluate()
            if sums is None:
                return {}
            packed = torch.tensor(list(sums.values()), dtype=torch.float64, device=self.gradient.flat.device)
            self.side.all_reduce(packed)  # (values, 2)
        values = dict(zip(sums, (packed[:, 0] / packed[:, 1]).tolist(), strict=True))
        return self.task.derive(values)

    def replicated(self) -> list[tuple[str, Tensor]]:
        """What the workers hold alike, by name."""
        return [(name, parameter.data) for name, parameter in self.task.model.named_parameters()]

    def _broadcast(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self.side.broadcast(tensor)

    def _summary(self, test: dict[str, float]) -> dict[str, Any]:
        better = max if self.task.higher_is_better else min
        totals, scores = self.meter.totals(), self.position.scores
        return {
            "world_size": self.comm.world_size,
            "simulated": self.simulated,
            "epochs": len(scores),
            "steps": self.position.step,
            "skipped": self.position.skipped,
            "parameters": self.gradient.flat.numel(),
            "score": {
                "name": self.task.score,
                "higher_is_better": self.task.higher_is_better,
                "last": scores[-1],
                "best": better(scores),
                "target": self.settings.stop_at_score,
                "reached": self._reached(scores[-1]) if self.settings.stop_at_score is not None else None,
            },
            **({"test": test} if test else {}),
            **totals,
            "density": {"target": getattr(self.settings.reducer, "density", None), **totals["density"]},
        }


def _named_norms(gradient: float, before: float, after: float) -> dict[str, float]:
    """gradient: of the raw gradient; before, after: of the send buffer around the reduction."""
    # ||send - sent||^2 / ||send||^2: what remains in send is send - sent
    error = 0.0 if before == 0 else (after / before) ** 2
    return {"gradient_norm": gradient, "residual_norm": after, "compression_error": error}

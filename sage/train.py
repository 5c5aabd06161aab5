"""The loop: compute_gradient, exchange, apply; what is logged; what ends a run."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor

from sage.board import Board
from sage.clock import Clock
from sage.comm import CountingComm
from sage.config import Named, Settings
from sage.feedback import FEEDBACKS, Feedback
from sage.gradient import GradientBuffer
from sage.interfaces import Communicator, Progress, Reducer, Task, TrainingError
from sage.metrics import Log, Meter, Recorder
from sage.optim import Clip, Schedule, clip_norm

Parts = tuple[Task, Reducer, Feedback, GradientBuffer, torch.optim.Optimizer]
"""What a trainer is built from, in its order."""
Sums = dict[str, tuple[float, float]]


class RunSettings(Settings):
    """A whole experiment: what `python run.py CONFIG --print-config` prints."""

    seed: int = Field(default=1, ge=0)
    epochs: int = Field(ge=1)
    stop_at_score: float | None = None
    """End after the first epoch whose score is this or better; null: train all epochs."""
    task: SerializeAsAny[Named]
    reducer: SerializeAsAny[Named]
    feedback: SerializeAsAny[Named]
    optimizer: SerializeAsAny[Named]
    schedule: Schedule = Schedule()
    clip: Clip = Clip()
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast with float32 parameters and gradients."""
    deterministic: bool = True
    """Repeat bit for bit on a GPU too; slower there."""
    timeout_seconds: float = Field(default=300.0, gt=0, le=1e6)
    """How long a collective waits for a worker before the run is given up."""
    world_size: int | None = Field(default=None, ge=1)
    """How many workers there are, where no launcher says so: one ./run.sh a worker, by hand."""
    log: Log = Log()


def check(
    settings: RunSettings,
    tasks: Mapping[str, type[Task]],
    reducers: Mapping[str, type[Reducer]],
    data: Path,
    world_size: int,
) -> None:
    """Raise ValueError, in one line, where the chosen parts cannot run, or not together; cheap."""
    tasks[settings.task.name].check(settings.task, data, world_size)
    feedback, reducer = FEEDBACKS[settings.feedback.name], reducers[settings.reducer.name]
    feedback.check(reducer, settings.reducer, settings.optimizer)


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
        board: Board,
    ) -> None:
        self.settings, self.task, self.reducer, self.feedback = settings, task, reducer, feedback
        self.gradient, self.optimizer = gradient, optimizer
        self.comm, self.side, self.clock = comm, side, clock
        self.recorder, self.board = recorder, board
        self.base_lrs = [group["lr"] for group in optimizer.param_groups]
        self.global_batch = task.batch_per_worker * comm.world_size
        self.meter = Meter(comm.ledger.take, clock, side, gradient.flat.device)
        self.step = 0

    # --- one step ------------------------------------------------------------------------------------------

    def compute_gradient(self, batch: Any) -> Tensor:
        """Fill the flat gradient with this worker's; returns its loss, a scalar, detached."""
        self.gradient.zero()
        autocast = torch.autocast(
            self.gradient.flat.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )
        with self.clock.phase("forward"), autocast:
            loss, _ = self.task.loss(batch)
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
        """Train all epochs; returns the summary. Raises TrainingError, and CommunicationError from a
        collective."""
        self._broadcast([parameter.data for parameter in self.task.model.parameters()])
        scores: list[float] = []
        for epoch in range(self.settings.epochs):
            self._train_epoch(epoch)
            values = self._evaluate(self.task.evaluate)
            for name, value in values.items():
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the {self.task.evaluated} {name} became {value} after epoch {epoch}"
                    )
            self._check_replicas(epoch)
            scores.append(values[self.task.score])
            score = {"name": self.task.score, "value": scores[-1]}
            line = {
                "kind": "epoch",
                "epoch": epoch,
                "step": self.step,
                self.task.evaluated: values,
                "score": score,
            }
            line |= self.meter.epoch_line()
            self.recorder.write(line)
            self.recorder.show_epoch(line, self.settings.epochs)
            if self._reached(scores[-1]):
                break
        return self._summary(scores, self._evaluate(self.task.evaluate_at_end))

    def _reached(self, score: float) -> bool:
        """Whether a score is the target of stop_at_score or better."""
        target = self.settings.stop_at_score
        return target is not None and (score >= target if self.task.higher_is_better else score <= target)

    def _train_epoch(self, epoch: int) -> None:
        steps = self.task.steps_per_epoch
        batches = self.task.train_batches(epoch)
        for index in range(steps):
            self.board.set_step(self.step)
            with self.clock.phase("data"):
                batch = next(batches)
            factor = self.settings.schedule.factor(epoch + index / steps, self.global_batch)
            progress = Progress(epoch + index / steps, self.step, self.base_lrs[0] * factor, steps)
            logging = self.step % self.settings.log.every == 0 or index == steps - 1
            loss = self.compute_gradient(batch)
            norms = self.exchange(progress, measure=logging)
            self.apply(factor)
            self.meter.add_step(loss, self.reducer.density)
            if logging:
                self._log_step(epoch, progress, norms)
            self.step += 1
            self.recorder.step_done(self.step)

    def _log_step(self, epoch: int, progress: Progress, norms: dict[str, float]) -> None:
        values = {"lr": progress.lr, "density": self.reducer.density, **self.reducer.metrics(), **norms}
        line, losses = self.meter.step_line(values)
        for step, loss in enumerate(losses, start=self.step + 1 - len(losses)):
            if not math.isfinite(loss):
                raise TrainingError(f"the loss became {loss} at epoch {epoch}, step {step}")
        for name in norms:  # a NaN that is never selected never reaches the loss
            if not math.isfinite(line[name]):
                raise TrainingError(f"{name} became {line[name]} at epoch {epoch}, step {self.step}")
        line = {"kind": "step", "epoch": epoch, "step": self.step, **line}
        self.recorder.write(line)
        self.recorder.show_step(line)

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

    def _check_replicas(self, epoch: int) -> None:
        """Raise TrainingError where a replicated tensor's bits are not the same on all workers."""
        names, tensors = zip(*self.replicated(), strict=True)
        checksums = self.side.all_gather(torch.stack([_checksum(t) for t in tensors]))  # (W, tensors)
        differs = (checksums != checksums[0]).nonzero()
        if len(differs):
            rank, index = differs[0].tolist()
            raise TrainingError(
                f"the replicas differ after epoch {epoch}: {names[index]} of ranks 0 and {rank}"
            )

    def replicated(self) -> list[tuple[str, Tensor]]:
        """What the workers hold alike, by name."""
        return [(name, parameter.data) for name, parameter in self.task.model.named_parameters()]

    def _broadcast(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self.side.broadcast(tensor)

    def _summary(self, scores: list[float], test: dict[str, float]) -> dict[str, Any]:
        better = max if self.task.higher_is_better else min
        totals = self.meter.totals()
        return {
            "world_size": self.comm.world_size,
            "simulated": self.simulated,
            "epochs": len(scores),
            "steps": self.step,
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


def _checksum(values: Tensor) -> Tensor:
    """A scalar int64: the sum, modulo 2^64, of the bits as integers times an odd weight of each place.

    An odd weight is invertible, so any single change shows; opposite changes at two places do not cancel.
    """
    bits = values.reshape(-1).view(torch.int32).long()
    return (bits * (2 * torch.arange(bits.numel(), device=bits.device) + 1)).sum()

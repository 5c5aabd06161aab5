"""The exchange of a model in a training loop of somebody's own, in one object."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sage.exchange.absent import naming_absent
from sage.exchange.comm import current_comm
from sage.exchange.echo import Build, warm_up
from sage.exchange.gradient import GradientBuffer, is_sharded
from sage.exchange.progress import StepCounter
from sage.interfaces import Communicator


class AttachedExchange:
    """Replaces a model's gradients by the estimate of their mean over the workers, once a step.

    gradient, exchange and steps are the parts, for whoever needs more than this object does.
    """

    def __init__(
        self,
        model: nn.Module,
        build: Build,
        comm: Communicator | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """build: makes the exchange. comm: which workers; None: those of current_comm.

        Gives every worker rank 0's parameters and buffers, as DistributedDataParallel does. Raises ValueError
        where the model's gradients cannot be served.
        """
        self.gradient = GradientBuffer(model)
        layout, like = self.gradient.layout, self.gradient.flat
        workers = comm or current_comm(like.device)
        self.exchange = build(layout, like, workers)
        self.steps = StepCounter(steps_per_epoch)
        copy_from_first(model, workers.another())
        warm_up(build, layout, like, workers.world_size)

    def step(
        self,
        *,
        epoch: float | None = None,
        lr: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> bool:
        """Exchange the gradients: after backward, before scaler.unscale_, clipping and the optimizer.

        epoch (may be a fraction) and lr: for schedules that follow them; what was given last stays. Returns
        whether the step can be used. Where it cannot, since a gradient of some worker is not finite, this is
        False on all of them: memory and reducer are as they were, and all gradients are NaN, so that a
        GradScaler skips the step; without one skip optimizer.step() yourself.

        Raises CommunicationError, which names the workers that did not come to this step, where it can be
        known; RuntimeError where the parameters have changed or the gradients are
        unscaled already; ValueError where a schedule follows what was not given.
        """
        self.steps.set(epoch, lr)
        with naming_absent(self.exchange.comm, self.steps.step):
            is_usable = self.exchange.step(self.gradient, self.steps.progress(), scaler=scaler)
        self.steps.step += 1
        return is_usable

    def steps_of_others(self, *, scaler: torch.amp.GradScaler | None = None) -> Iterator[bool]:
        """Take part, with gradients of zero, in the steps of workers that have more batches than this one.

        After a worker's last batch, on all workers, where their numbers of batches differ:

            for is_usable in exchange.steps_of_others():
                optimizer.step()

        Yields what step() returns, until no worker has a batch; the sum of gradients is divided by the number
        of all workers. As in DistributedDataParallel.join, but every worker's optimizer takes every step.
        """
        while True:
            self.gradient.distribute([False] * len(self.gradient.layout))  # no parameter has a gradient
            progress = self.steps.progress()
            with naming_absent(self.exchange.comm, self.steps.step):
                is_usable = self.exchange.step_of_others(self.gradient, progress, scaler=scaler)
            if is_usable is None:
                return
            self.steps.step += 1
            yield is_usable

    def zero_grad(self) -> None:
        """Set all gradients to zero: optimizer.zero_grad() does, too, but costs the next step a copy."""
        self.gradient.zero()

    @property
    def density(self) -> float:
        """Elements a worker sent in the last step / n, mean over workers."""
        return self.exchange.density

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, by parameter name; each worker's is its own."""
        return {"step": self.steps.step, **self.exchange.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state_dict, also one of a DDPHook of the same model. Raises ValueError where a parameter is
        missing, or a shape or type is another."""
        self.exchange.load_state_dict(state)
        self.steps.step = state["step"]


@torch.no_grad()
def copy_from_first(model: nn.Module, comm: Communicator) -> None:
    """Give every worker rank 0's parameters and buffers; of sharded ones each its shard."""
    if comm.world_size == 1:
        return
    for tensor in map(local_part, (*model.parameters(), *model.buffers())):
        values = tensor.contiguous()
        if values.numel():
            comm.broadcast(values.view(-1).view(torch.uint8))  # any type, bit for bit
            tensor.copy_(values)


def local_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded (a DTensor)."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]

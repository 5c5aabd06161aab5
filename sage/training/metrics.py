"""What a run measures: means over workers, totals, the lines of metrics.jsonl."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sage.exchange.clock import Clock
from sage.interfaces import Communicator, Stateful, TrainingError


def mean_over_workers(
    values: Sequence[float | Tensor], comm: Communicator, device: torch.device
) -> list[float]:
    """Each value's mean over workers, of which all have as many, in float64: one all-reduce, and on a GPU one
    host synchronisation. A tensor is a scalar on the device."""
    tensors = [value.to(device, non_blocking=True) for value in values if isinstance(value, Tensor)]
    numbers = [value for value in values if not isinstance(value, Tensor)]
    packed = torch.tensor(numbers, dtype=torch.float64).to(device, non_blocking=True)
    if tensors:
        packed = torch.cat([packed, torch.stack([tensor.double() for tensor in tensors])])  # (values,)
    comm.all_reduce(packed)
    means = comm.read(packed / comm.world_size).tolist()  # host synchronisation
    of_numbers, of_tensors = iter(means[: len(numbers)]), iter(means[len(numbers) :])
    return [next(of_tensors if isinstance(value, Tensor) else of_numbers) for value in values]


def density_summary(densities: list[float]) -> dict[str, float]:
    """Mean, standard deviation and 99th percentile over steps."""
    values = torch.tensor(densities, dtype=torch.float64)
    return {
        "mean": values.mean().item(),
        "std": values.std(correction=0).item(),
        "p99": values.quantile(0.99).item(),
    }


class Meter(Stateful):
    """Adds up losses, densities, bytes and seconds, and turns them into the lines of metrics.jsonl.

    Every worker calls the same methods; values in a line are means over workers.
    """

    BYTES = ("payload", "padding", "wire")
    KEPT = ("line", "epoch", "epoch_losses", "epoch_densities", "densities", "totals")

    def __init__(
        self,
        take_bytes: Callable[[], Mapping[str, float]],
        clock: Clock,
        side: Communicator,
        device: torch.device,
    ) -> None:
        """take_bytes: Ledger.take of the communicator that counts."""
        self._take_bytes, self._clock, self._side, self._device = take_bytes, clock, side, device
        self._losses: list[Tensor] = []  # of the steps since the last step line
        self._line: dict[str, float] = {}  # bytes and seconds since then
        self._epoch: dict[str, float] = {}
        self._epoch_losses: list[float] = []
        self._epoch_densities: list[float] = []
        self._densities: list[float] = []
        self._totals: dict[str, float] = {}
        self._wall = 0.0  # seconds since the last epoch line, up to the clock's last reading

    def start(self) -> None:
        """Measure seconds from now on."""
        self._clock.take()

    def add_step(self, loss: Tensor, density: float) -> None:
        """loss: a scalar on the device; it is read with the next step line, not now."""
        self._losses.append(loss.double().to(self._device))
        self._epoch_densities.append(density)
        # Here and not in _drain: a sum of floats depends on its grouping, which no checkpoint is to change.
        counted = self._take_bytes()
        self._add({f"{name}_bytes": float(counted[f"{name}_bytes"]) for name in self.BYTES})

    def step_line(self, values: Mapping[str, float | Tensor]) -> dict[str, Any]:
        """Means over workers: of values, and of bytes and seconds per step since the last step line. On a GPU
        this waits for its work."""
        count = len(self._losses)
        self._drain()
        per_step = {name: total / count for name, total in self._line.items()}
        self._line = {}
        means = self._means({**values, **per_step})
        seconds = {name: means.pop(f"seconds.{name}") for name in self._seconds_of(per_step)}
        return {"loss": self._epoch_losses[-1], **means, "seconds": seconds}

    def epoch_line(self) -> dict[str, Any]:
        """The totals since the last epoch line. Raises TrainingError where no step was used."""
        if not self._losses and not self._epoch_losses:
            raise TrainingError("every step of an epoch was skipped")
        self._drain()
        self._line = {}
        totals = self._means({**self._epoch, "seconds.wall": self._wall})
        for name, total in totals.items():
            self._totals[name] = self._totals.get(name, 0.0) + total
        line = {
            "train": {"loss": sum(self._epoch_losses) / len(self._epoch_losses)},
            "density": density_summary(self._epoch_densities),
            "bytes": {name: totals[f"{name}_bytes"] for name in self.BYTES},
            "seconds": {name: totals[f"seconds.{name}"] for name in self._seconds_of(totals)},
        }
        self._densities += self._epoch_densities
        self._epoch, self._epoch_losses, self._epoch_densities, self._wall = {}, [], [], 0.0
        return line

    def totals(self) -> dict[str, Any]:
        """The whole run's density, bytes and seconds."""
        return {
            "density": density_summary(self._densities),
            "totals": {
                **{f"{name}_bytes": self._totals[f"{name}_bytes"] for name in self.BYTES},
                "seconds": {name: self._totals[f"seconds.{name}"] for name in self._seconds_of(self._totals)},
            },
        }

    def state_dict(self) -> dict[str, Any]:
        self._drain()
        kept = {name: getattr(self, f"_{name}") for name in self.KEPT}
        losses = self._side.read(torch.stack(self._losses)).tolist() if self._losses else []
        return {"losses": losses, "wall": self._wall, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.KEPT:
            if type(state[name]) is not type(getattr(self, f"_{name}")):
                raise TypeError(f"{name}: expected a {type(getattr(self, f'_{name}')).__name__}")
        self._losses = [
            torch.tensor(loss, dtype=torch.float64, device=self._device) for loss in state["losses"]
        ]
        self._wall = float(state["wall"])
        for name in self.KEPT:
            setattr(self, f"_{name}", state[name])

    def _means(self, values: Mapping[str, float | Tensor]) -> dict[str, float]:
        """The means of values over the workers. In the same message the losses since the last step line are
        averaged, which then are the epoch's (some are left at its end where a step line was due at a step
        that was skipped)."""
        means = mean_over_workers([*self._losses, *values.values()], self._side, self._device)
        count = len(self._losses)
        self._losses.clear()
        self._epoch_losses += means[:count]
        return dict(zip(values, means[count:], strict=True))

    def _drain(self) -> None:
        """Move the clock's seconds into the sums of the line and of the epoch."""
        before = self._clock.taken_at
        self._add({f"seconds.{name}": seconds for name, seconds in self._clock.take().items()})
        self._wall += self._clock.taken_at - before

    def _add(self, values: Mapping[str, float]) -> None:
        for sums in (self._line, self._epoch):
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + value

    @staticmethod
    def _seconds_of(values: Mapping[str, float]) -> list[str]:
        return [name.removeprefix("seconds.") for name in values if name.startswith("seconds.")]

"""Where somebody's own training loop stands: its steps are counted, the rest is what it gives."""

from typing import Any

from sage.interfaces import Progress

NEEDED = {
    "epoch": "expected steps_per_epoch where the exchange is made, or the epoch with each step",
    "lr": "expected the learning rate with each step",
    "steps_per_epoch": "expected steps_per_epoch where the exchange is made",
}
"""What a loop that has not given it should do."""


class KnownProgress(Progress):
    """Progress of which only some is known: whoever asks for the rest gets a ValueError."""

    def __init__(self, **known: float | int | None) -> None:
        """known: Progress's fields; None: not known."""
        for name, value in known.items():
            if value is not None:
                object.__setattr__(self, name, value)  # the class is frozen

    def __getattr__(self, name: str) -> Any:  # called for what is not there
        if name in NEEDED:
            raise ValueError(f"{name}: {NEEDED[name]}, since the reducer or its feedback follows it")
        raise AttributeError(name)

    __repr__ = object.__repr__


class StepCounter:
    """Counts the steps of a loop. The epoch and learning rate that it has given last stay."""

    def __init__(self, steps_per_epoch: int | None = None) -> None:
        """steps_per_epoch: lets the epochs be counted, too."""
        if steps_per_epoch is not None and steps_per_epoch < 1:
            raise ValueError(f"steps_per_epoch: expected at least 1, got {steps_per_epoch}")
        self.step = 0
        self.steps_per_epoch = steps_per_epoch
        self._epoch: float | None = None
        self._lr: float | None = None

    def set(self, epoch: float | None = None, lr: float | None = None) -> None:
        """Take what the loop knows, from this step on; None: as before. epoch may be a fraction: 1.5 is
        half-way through the second epoch."""
        self._epoch = self._epoch if epoch is None else epoch
        self._lr = self._lr if lr is None else lr

    def progress(self) -> Progress:
        """Where training stands in the step that is not yet counted."""
        epoch = self._epoch
        if epoch is None and self.steps_per_epoch is not None:
            epoch = self.step / self.steps_per_epoch
        return KnownProgress(epoch=epoch, step=self.step, lr=self._lr, steps_per_epoch=self.steps_per_epoch)

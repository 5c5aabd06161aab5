"""Numbers of the device that the host reads later."""

from contextlib import nullcontext

import torch
from torch import Tensor

from sage.interfaces import Communicator


def stream_for_reading(device: torch.device) -> "torch.cuda.Stream | None":
    """On which a device's numbers can be read late; None: the device is no GPU, where nothing waits."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class LateValues:
    """Numbers of the device that the host reads later, without waiting for what the device was given to do
    since."""

    def __init__(self, values: Tensor, stream: "torch.cuda.Stream | None") -> None:
        """values: never changed. stream: on which they are read."""
        self.values, self._stream = values, stream
        self._ready = torch.cuda.Event() if stream else None
        if self._ready:
            self._ready.record()

    def read(self, comm: Communicator) -> Tensor:
        """A copy on the host."""
        if self._stream and self._ready:
            self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            return comm.read(self.values)

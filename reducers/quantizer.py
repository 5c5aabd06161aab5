"""What quantisers share: a message of one length on every worker, its codes and scales, buckets."""

from abc import abstractmethod

import torch
from torch import Tensor

from sage.interfaces import Communicator, Reducer, Slot


class Quantizer(Reducer):
    """Sends every element in a few bits: mean = sum_i C(a_i) / W by one all-gather, C(a) = decode(encode(a)).

    The workers' messages are decoded and added one after the other, in rank order.
    """

    n: int
    message_bytes: int

    @abstractmethod
    def encode(self, send: Tensor) -> Tensor:
        """send (n,) as a message (message_bytes,) uint8. send is not changed."""

    @abstractmethod
    def decode(self, message: Tensor) -> Tensor:
        """The numbers (n,) float32 in a message (message_bytes,)."""

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        messages = comm.all_gather(self.encode(send))  # (W, message_bytes)
        mean.zero_()
        for worker, message in enumerate(messages):
            decoded = self.decode(message)
            mean.add_(decoded)
            if worker == comm.rank:
                send.sub_(decoded)
        mean.div_(comm.world_size)

    def expected_payload_bytes(self, world_size: int) -> int:
        return self.message_bytes if world_size > 1 else 0


def join(scales: Tensor, codes: Tensor) -> Tensor:
    """A message: the bytes of scales (m,) float32, then codes (c,) uint8."""
    return torch.cat([scales.view(torch.uint8), codes])


def part(message: Tensor, num_scales: int) -> tuple[Tensor, Tensor]:
    """The reverse of join: scales (num_scales,) float32 and codes."""
    scales, codes = message.tensor_split([4 * num_scales])
    return scales.clone().view(torch.float32), codes  # a message may start at any byte


class Buckets:
    """A flat vector (n,) whose tensors are cut into buckets of `size` elements; zeros fill the last one."""

    def __init__(self, layout: list[Slot], size: int) -> None:
        self.n, self.size = layout[-1].stop, size
        self._sizes = [slot.size for slot in layout]
        # each tensor's elements, and then the zeros after them
        self._pieces = [piece for whole in self._sizes for piece in (whole, -whole % size)]
        self.count = sum(self._pieces) // size

    def rows(self, flat: Tensor) -> Tensor:
        """flat (n,) as (count, size)."""
        rows = flat.new_zeros(self.count * self.size)
        torch._foreach_copy_(rows.split(self._pieces)[::2], flat.split(self._sizes))
        return rows.view(self.count, self.size)

    def flat(self, rows: Tensor) -> Tensor:
        """The reverse of rows: (n,)."""
        flat = rows.new_empty(self.n)
        torch._foreach_copy_(flat.split(self._sizes), rows.view(-1).split(self._pieces)[::2])
        return flat

"""Blocks of small integers: each worker averages a share of the gradient, and sends it rounded again."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.kernels.codes import num_bytes, pack, unpack
from reducers.quantizer import Buckets
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot

LEAST = torch.finfo(torch.float32).tiny


class BlockIntSettings(Named):
    name: Literal["block_int"] = "block_int"
    bits: Literal[4, 8] = 8
    """Of an element: from -7 to 7, or from -127 to 127."""
    block: int = Field(default=256, ge=2, multiple_of=2)
    """Elements of a tensor that share a scale; each block costs 4 bytes."""


class BlockInt(Reducer):
    """C(a) = s round(a / s), s = max |block| / 127 or / 7; mean = C(sum_i C(a_i) / W), block by block.

    Two rounds, as in a ring all-reduce:
    all-to-all:  worker j gets all workers' C(a_i) of the j-th share of the blocks, and averages them
    all-gather:  all get C(average) of every share

    ZeRO++ (Wang et al. 2023, arXiv 2306.10209, section 3.3, qgZ), in one hop and with scales of float32. What
    a worker sends does not grow with the number of workers. The second rounding's error, W times over, stays
    with the share's owner, so that feedback brings it back like the first one's; the paper has no feedback.
    Blocks do not cross tensors, whose magnitudes differ. A NaN spreads over its block.
    """

    Settings: ClassVar[type[Named]] = BlockIntSettings

    def __init__(
        self, config: BlockIntSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.bits, self.block, self.top = config.bits, config.block, 2 ** (config.bits - 1) - 1
        self._blocks = Buckets(layout, config.block)
        self._row_bytes = 4 + num_bytes(config.block, config.bits)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        world_size, share = comm.world_size, self._share(comm.world_size)
        num_spare = world_size * share - self._blocks.count
        rows = torch.nn.functional.pad(self._blocks.rows(send), (0, 0, 0, num_spare))  # (W share, block)

        # 1. every worker's codes of a share go to the share's owner
        sent = self._encode(rows)  # (W share, row bytes)
        arrived = comm.all_to_all(sent.view(world_size, -1))

        # 2. the owner averages them, in rank order
        average = self._decode(arrived[0])  # (share, block)
        for message in arrived[1:]:
            average.add_(self._decode(message))
        average.div_(world_size)

        # 3. the averages' codes go to everybody
        answer = self._encode(average)
        decoded = self._decode(comm.all_gather(answer))
        mean.copy_(self._blocks.flat(decoded[: self._blocks.count]))

        # 4. what is left: a - C(a), and W (average - C(average)) of the own share
        rows.sub_(self._decode(sent))
        own = rows.view(world_size, share, self.block)[comm.rank]
        own.add_(average.sub_(self._decode(answer)), alpha=world_size)
        send.copy_(self._blocks.flat(rows[: self._blocks.count]))

    def _share(self, world_size: int) -> int:
        """The blocks that a worker averages."""
        return -(-self._blocks.count // world_size)

    def _encode(self, rows: Tensor) -> Tensor:
        """rows (r, block) as (r, row bytes) uint8: a scale, then codes."""
        scales = (rows.abs().amax(1, keepdim=True) / self.top).float().clamp_(min=LEAST)  # (r, 1)
        codes = (rows / scales).round_().clamp_(-self.top, self.top).to(torch.int8)
        packed = pack(codes.view(-1), self.bits).view(len(rows), -1)
        return torch.cat([scales.view(torch.uint8), packed], dim=1)

    def _decode(self, message: Tensor) -> Tensor:
        """The reverse: (r, block) float32, of any shape with the same bytes."""
        scales, packed = message.view(-1, self._row_bytes).tensor_split([4], dim=1)
        codes = unpack(packed.reshape(-1), packed.numel() * 8 // self.bits, self.bits)
        found = scales.reshape(-1).clone().view(torch.float32)  # a message may start at any byte
        return codes.view(-1, self.block) * found[:, None]

    def expected_payload_bytes(self, world_size: int) -> int:
        if world_size == 1:
            return 0
        return (world_size + 1) * self._share(world_size) * self._row_bytes

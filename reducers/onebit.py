"""1-bit SGD: whether an element is negative, and a tensor's mean of those that are, and of the others."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.kernels.signs import ScaledSigns, num_bytes, pack, unpack
from reducers.quantizer import Quantizer, join, part
from sage.config import Named
from sage.interfaces import Seeds, Slot


class OneBitSettings(Named):
    name: Literal["onebit"] = "onebit"
    scales: Literal["tensor", "row"] = "tensor"
    """What shares two means: a tensor, or a row of a matrix (of whatever belongs to one output). 1-d tensors
    are one row."""


class OneBit(Quantizer):
    """C(a_j) = mean of the negative elements where a_j < 0, else mean of the others, of its tensor or row.

    Seide et al. 2014, "1-bit stochastic gradient descent and its application to data-parallel distributed
    training of speech DNNs", section 3.2. The paper has two means for each output, which is scales: row;
    published code has two a tensor. It is made for error feedback. A NaN spreads over its tensor or row.
    """

    Settings: ClassVar[type[Named]] = OneBitSettings

    def __init__(
        self, config: OneBitSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n = layout[-1].stop
        edges = [0]
        for slot in layout:
            num_rows = slot.shape[0] if config.scales == "row" and len(slot.shape) > 1 else 1
            edges += [slot.start + slot.size * row // num_rows for row in range(1, num_rows + 1)]
        self._parts, self.num_parts = ScaledSigns(edges), len(edges) - 1
        self._sizes = torch.tensor(edges, device=device).diff()  # (parts,)
        self.message_bytes = 8 * self.num_parts + num_bytes(self.n)

    def encode(self, send: Tensor) -> Tensor:
        packed = torch.empty(num_bytes(self.n), dtype=torch.uint8, device=send.device)
        pack(send, packed)
        num_negative = self._parts.norms((send < 0).to(send.dtype))
        negative = -self._parts.norms(send.clamp(max=0)) / num_negative.clamp(min=1)
        positive = self._parts.norms(send.clamp(min=0)) / (self._sizes - num_negative).clamp(min=1)
        return join(torch.cat([negative, positive]), packed)

    def decode(self, message: Tensor) -> Tensor:
        means, packed = part(message, 2 * self.num_parts)
        negative, positive = (self._spread(half) for half in means.view(2, -1))
        signs = torch.empty_like(positive)
        unpack(packed, signs)
        return torch.where(signs > 0, positive, negative)

    def _spread(self, means: Tensor) -> Tensor:
        """means (parts,) as each element's own (n,)."""
        return means.repeat_interleave(self._sizes, output_size=self.n)

"""TernGrad: every element is -s, 0 or +s of its tensor's scale s, drawn so that the mean is right."""

from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.kernels.codes import num_bytes, pack, unpack
from reducers.kernels.signs import ScaledSigns
from reducers.quantizer import Quantizer, join, part
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Seeds, Slot


class TernGradSettings(Named):
    name: Literal["terngrad"] = "terngrad"
    clip: float | None = Field(default=2.5, gt=0)
    """What is larger than so many standard deviations of its tensor counts as so large, so that the scale is
    smaller and what is drawn varies less, at the price of a bias; null: nothing is clipped."""


class TernGrad(Quantizer):
    """C(a_j) = s_l sign(a_j) with probability |a_j| / s_l, else 0; s_l = max |a_l| after clipping.

    Wen et al. 2017, arXiv 1705.07878; two bits an element. A tensor's scale is this worker's own, as in
    published code; one shared by all workers would cost a collective more. Published code sends nothing of a
    tensor whose elements are all alike, as one of a single element, since they have no deviation; here
    nothing below the root mean square is clipped. A NaN spreads over its tensor.
    """

    Settings: ClassVar[type[Named]] = TernGradSettings
    state_names = ("generator",)
    worker_generators = state_names

    def __init__(
        self, config: TernGradSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n, self.clip = layout[-1].stop, config.clip
        self._split = [slot.size for slot in layout if slot.size]
        self._signs = ScaledSigns([0, *accumulate(self._split)])
        self._sizes = torch.tensor(self._split, device=device)  # (tensors,)
        self.num_tensors = len(self._split)
        self.message_bytes = 4 * self.num_tensors + num_bytes(self.n, 2)
        self.generator = Draws(seeds.worker)

    def encode(self, send: Tensor) -> Tensor:
        scales = self._scales(send)
        drawn = self.generator.fractions(self.n, send.device)
        # sign(a) where u s < |a|; a is clipped at s, and u < 1
        is_sent = drawn.mul_(self._spread(scales)) < send.abs()
        return join(scales, pack(send.sign().mul_(is_sent).to(torch.int8), 2))

    def decode(self, message: Tensor) -> Tensor:
        scales, packed = part(message, self.num_tensors)
        return self._spread(scales).mul_(unpack(packed, self.n, 2))

    def _spread(self, scales: Tensor) -> Tensor:
        """scales (tensors,) as each element's own (n,)."""
        return scales.repeat_interleave(self._sizes, output_size=self.n)

    def _scales(self, send: Tensor) -> Tensor:
        """(tensors,) float32."""
        parts = send.split(self._split)
        largest = torch.stack(torch._foreach_norm(parts, torch.inf)).float()
        if self.clip is None:
            return largest
        # mean = (sum of the positive - sum of the negative) / n;  variance = mean square - mean^2
        positive, magnitude = self._signs.norms(send.clamp(min=0)), self._signs.norms(send)
        mean = (2 * positive.double() - magnitude) / self._sizes
        square = torch.stack(torch._foreach_norm(parts, 2)).double().square() / self._sizes
        deviation = (square - mean.square()).clamp_(min=0).sqrt()
        bound = torch.maximum(self.clip * deviation, square.sqrt())
        return torch.minimum(largest, bound.float())

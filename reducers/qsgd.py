"""QSGD: every element rounded at random to one of a few levels of its bucket's norm; unbiased."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.kernels.codes import num_bytes, pack, unpack
from reducers.quantizer import Buckets, Quantizer, join, part
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Seeds, Slot

LARGEST = torch.finfo(torch.float32).max


class QSGDSettings(Named):
    name: Literal["qsgd"] = "qsgd"
    bits: Literal[2, 4, 8] = 8
    """Of an element: 2^(bits - 1) - 1 levels and a sign; 127 levels with 8 bits."""
    bucket: int = Field(default=128, ge=1)
    """Elements of a tensor that share a norm; each bucket costs 4 bytes."""


class QSGD(Quantizer):
    """E C(a) = a: y = s |a| / ||bucket||_2 is rounded up with the probability y - floor(y), else down.

    Alistarh et al. 2017, arXiv 1610.02132, with its buckets; codes of a fixed length instead of
    Elias's, which no processor decodes quickly. Published code lets y be rounded to s + 1, which flips the
    sign in 8 bits; here it is at most s. Each worker draws for itself. A NaN spreads over its bucket.
    """

    Settings: ClassVar[type[Named]] = QSGDSettings
    state_names = ("generator",)
    worker_generators = state_names

    def __init__(
        self, config: QSGDSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n, self.bits, self.levels = layout[-1].stop, config.bits, 2 ** (config.bits - 1) - 1
        self._buckets = Buckets(layout, config.bucket)
        self.message_bytes = 4 * self._buckets.count + num_bytes(self.n, self.bits)
        self.generator = Draws(seeds.worker)

    def encode(self, send: Tensor) -> Tensor:
        rows = self._buckets.rows(send)  # (buckets, size)
        # a norm whose square is no float32 becomes the largest; zeros, whose norm is 0, stay zeros
        norms = torch.linalg.vector_norm(rows, dim=1).float().clamp_(max=LARGEST)
        factors = (self.levels / norms).clamp_(max=LARGEST)
        # y = s / norm |a|
        wanted = self._buckets.flat(rows.abs_().mul_(factors[:, None]))
        return join(norms, pack(self._round(wanted).copysign_(send).to(torch.int8), self.bits))

    def _round(self, wanted: Tensor) -> Tensor:
        """wanted (n,), rounded up with its fraction as the probability, or else down."""
        level = wanted.floor()
        rounds_up = self.generator.fractions(self.n, wanted.device) < wanted.sub_(level)
        return level.add_(rounds_up).clamp_(max=self.levels)

    def decode(self, message: Tensor) -> Tensor:
        norms, packed = part(message, self._buckets.count)
        rows = self._buckets.rows(unpack(packed, self.n, self.bits).float())
        return self._buckets.flat(rows.mul_((norms / self.levels)[:, None]))

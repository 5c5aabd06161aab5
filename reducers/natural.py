"""Natural compression: every element rounded at random to a power of two, its sign and exponent in a byte."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.quantizer import Quantizer
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Seeds, Slot

LEAST, GREATEST = 18, 145
"""The biased exponents that a code has: 2^-109, which counts as zero, to 2^18."""


class NaturalSettings(Named):
    name: Literal["natural"] = "natural"


class Natural(Quantizer):
    """E C(a) = a: |a| = 2^e (1 + m) becomes 2^(e + 1) with probability m, else 2^e.

    Horvath et al. 2019, arXiv 1905.10988; the code is the sign and 7 bits of the exponent, as in
    published code: what becomes 2^-109 or less is zero, and what is above 2^18 counts as 2^18. One of 2^23
    numbers is drawn; published code draws one of 2^23 - 1, which is a bias of 2^-23. Each worker draws for
    itself. NaN and infinity are never sent.
    """

    Settings: ClassVar[type[Named]] = NaturalSettings
    state_names = ("generator",)
    worker_generators = state_names

    def __init__(
        self, config: NaturalSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n = self.message_bytes = layout[-1].stop
        self.generator = Draws(seeds.worker)

    def encode(self, send: Tensor) -> Tensor:
        bits = send.float().view(torch.int32)  # sign, 8 bits of exponent, 23 of mantissa
        drawn = (self.generator.words(self.n, send.device) >> 9).bitwise_and_(2**23 - 1)
        exponent = bits >> 23 & 255
        is_finite = exponent < 255
        exponent += (bits & 2**23 - 1) > drawn
        codes = exponent.clamp_(LEAST, GREATEST).sub_(LEAST).mul_(is_finite)
        return codes.bitwise_or_(bits >> 24 & 128).to(torch.uint8)

    def decode(self, message: Tensor) -> Tensor:
        codes = message.to(torch.int32)
        exponent = codes & 127
        # (sign << 31) | (exponent << 23); code 0 is the number 0
        bits = (exponent + LEAST << 23).mul_(exponent > 0)
        return bits.bitwise_or_((codes & 128) << 24).view(torch.float32)

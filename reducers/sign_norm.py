"""Signs scaled by the tensor's mean magnitude (EF-signSGD): one bit per element and a number per tensor."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.kernels.signs import ScaledSigns, num_bytes, pack
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Seeds, Slot


class SignNormSettings(Named):
    name: Literal["sign_norm"] = "sign_norm"


class SignNorm(Reducer):
    """C(a) = (||a||_1 / n_l) sign(a) for each tensor l, sign(0) = +1; mean = sum_i C(a_i) / W.

    Karimireddy et al. 2019, arXiv 1901.09847, algorithm 2 and section 6, in units of the gradient instead of
    the step (equal while the learning rate is constant). A NaN spreads over its tensor.
    """

    Settings: ClassVar[type[Named]] = SignNormSettings

    def __init__(
        self, config: SignNormSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.n, self.num_tensors = layout[-1].stop, len(layout)
        self._signs = ScaledSigns([0, *(slot.stop for slot in layout)])
        self._sizes = torch.tensor([float(max(1, slot.size)) for slot in layout], device=device)  # (tensors,)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        gathered = comm.all_gather(self._encode(send))  # (W, 4 tensors + ceil(n / 8))
        scales, packed = gathered.tensor_split([4 * self.num_tensors], dim=1)
        scales = scales.clone(memory_format=torch.contiguous_format).view(torch.float32)  # (W, tensors)
        self._signs.average(packed, scales, comm.rank, send, mean)

    def _encode(self, send: Tensor) -> Tensor:
        """One message (4 tensors + ceil(n / 8),) uint8: the scales' bits, then the signs."""
        message = torch.empty(4 * self.num_tensors + num_bytes(self.n), dtype=torch.uint8, device=send.device)
        scales, signs = message.tensor_split([4 * self.num_tensors])
        scales.copy_((self._signs.norms(send) / self._sizes).view(torch.uint8))
        pack(send, signs)
        return message

    def expected_payload_bytes(self, world_size: int) -> int:
        return 4 * self.num_tensors + num_bytes(self.n) if world_size > 1 else 0

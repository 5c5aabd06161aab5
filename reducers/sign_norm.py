"""Signs scaled by the tensor's mean magnitude (EF-signSGD): one bit per element and a number per tensor."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from reducers.quantize import num_bytes, pack, spans, unpack
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
        self._sizes = torch.tensor([float(max(1, slot.size)) for slot in layout], device=device)  # (tensors,)
        # A span of elements, its bytes, and the tensors' parts of it: (tensor, first, stop in the span).
        self._spans = [(e, b, _parts(e, layout)) for e, b in spans(self.n, device)]

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        gathered = comm.all_gather(self._encode(send))  # (W, 4 tensors + ceil(n / 8))
        scales = gathered[:, : 4 * self.num_tensors].clone(memory_format=torch.contiguous_format)
        scales = scales.view(torch.float32)  # (W, tensors)
        packed = gathered[:, 4 * self.num_tensors :]  # (W, ceil(n / 8))
        for elements, places, parts in self._spans:
            total = torch.zeros_like(send[elements])
            for rank in range(comm.world_size):
                decoded = unpack(packed[rank, places], total.numel())
                for tensor, first, stop in parts:
                    decoded[first:stop] *= scales[rank, tensor]
                total += decoded
                if rank == comm.rank:
                    send[elements] -= decoded
            torch.div(total, comm.world_size, out=mean[elements])

    def _encode(self, send: Tensor) -> Tensor:
        """One message (4 tensors + ceil(n / 8),) uint8: the scales' bits, then the signs."""
        norms = torch.zeros_like(self._sizes)
        message = torch.empty(4 * self.num_tensors + num_bytes(self.n), dtype=torch.uint8, device=send.device)
        signs = message[4 * self.num_tensors :]
        for elements, places, parts in self._spans:
            signs[places] = pack(send[elements])
            magnitude = send[elements].abs()
            for tensor, first, stop in parts:
                norms[tensor] += magnitude[first:stop].sum()
        message[: 4 * self.num_tensors] = (norms / self._sizes).view(torch.uint8)
        return message

    def expected_payload_bytes(self, world_size: int) -> int:
        return 4 * self.num_tensors + num_bytes(self.n) if world_size > 1 else 0


def _parts(elements: slice, layout: list[Slot]) -> list[tuple[int, int, int]]:
    """(tensor, first, stop) of every tensor with elements in a span, counted from the span's start."""
    start, end = elements.start, elements.stop
    return [
        (tensor, max(slot.start, start) - start, min(slot.stop, end) - start)
        for tensor, slot in enumerate(layout)
        if slot.size and slot.start < end and slot.stop > start
    ]

"""One flat gradient: every parameter's grad is a view of it."""

import torch
from torch import Tensor, nn

from sage.interfaces import lay_out


class GradientBuffer:
    """A flat gradient (n,) whose pieces are the model's param.grad, in the order of model.named_parameters().

    backward accumulates into an existing grad in place, so it keeps the views, and so do torch's optimizers
    and clipping. check() finds where something replaced a grad (zero_grad with set_to_none does).
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        kinds = {(p.dtype, p.device) for _, p in self._named}
        if len(kinds) != 1:
            raise ValueError(
                f"one dtype and device for all parameters is needed, got {len(kinds)} kinds of them"
            )
        ((dtype, device),) = kinds
        self.layout = lay_out((name, tuple(parameter.shape)) for name, parameter in self._named)
        self.flat = torch.zeros(self.layout[-1].stop, dtype=dtype, device=device)  # (n,)
        for slot, (_, parameter) in zip(self.layout, self._named, strict=True):
            parameter.grad = self.flat[slot.start : slot.stop].view(slot.shape)

    def zero(self) -> None:
        """Set all gradients to zero, for the next backward. Raises RuntimeError if a view was lost."""
        self.check()
        self.flat.zero_()

    def check(self) -> None:
        """Raise RuntimeError, naming the parameter, where a grad is no longer a view of the flat gradient."""
        base, item_bytes = self.flat.data_ptr(), self.flat.element_size()
        for slot, (_, parameter) in zip(self.layout, self._named, strict=True):
            grad: Tensor | None = parameter.grad
            if slot.size == 0:
                continue  # nothing to view, and no address to compare
            if grad is None or grad.data_ptr() != base + slot.start * item_bytes:
                raise RuntimeError(
                    f"the gradient of {slot.name} is no longer a view of the flat gradient: something "
                    "replaced it (zero_grad with set_to_none=True does); use GradientBuffer.zero()"
                )

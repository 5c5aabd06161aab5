"""One flat gradient of a model: where autograd can write into it, every param.grad is a view of it."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sage.interfaces import Slot, lay_out

HALVES = (torch.float16, torch.bfloat16)
"""Gradients of these types are exchanged through a float32 copy."""
MAKE_ANEW = "make a new GradientBuffer and Exchange, and load the old Exchange's state_dict into the new one"


Kind = tuple[torch.dtype, torch.device, torch.Size, tuple[int, ...]]
"""Of a parameter: type, device, shape, strides."""


def _kind(parameter: Tensor) -> Kind:
    return parameter.dtype, parameter.device, parameter.shape, tuple(parameter.stride())


@dataclass(frozen=True)
class _Part:
    """One parameter's part of the flat gradient."""

    slot: Slot
    parameter: nn.Parameter
    view: Tensor
    """Of the flat gradient, in the shape and, where possible, the strides of the parameter."""
    kind: Kind
    address: int
    """Address of the view's memory. Where a model is converted, torch converts its gradients, this view
    too."""


class GradientBuffer:
    """The flat gradient (n,) of a model's trained parameters, in the order of model.named_parameters().

    gradient.zero() or optimizer.zero_grad() > loss.backward() > used = gradient.collect() > an exchange of
    gradient.flat > gradient.distribute(used) > optimizer.step(). Exchange.step does what lies between
    backward and the optimizer.

    After zero(), backward writes into the views. zero_grad() removes them; then collect() copies. flat has
    the parameters' type, or float32 where that has 16 bits.
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises ValueError where the model's gradients cannot be served."""
        if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
            raise ValueError(
                "expected a model that is not wrapped, got DistributedDataParallel, which averages the "
                "gradients itself: give the module inside it (model.module), and train with that one"
            )
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        dtype, device = _common_kind(named)
        self._model = model
        self.layout = layout_of(named)
        n = self.layout[-1].stop
        self._grads = torch.zeros(n, dtype=dtype, device=device)  # what the views are of
        self.flat = torch.zeros(n, device=device) if dtype in HALVES else self._grads
        self._parts: list[_Part] = []
        for slot, (_, parameter) in zip(self.layout, named, strict=True):
            view = _view(self._grads[slot.start : slot.stop], parameter)
            self._parts.append(_Part(slot, parameter, view, _kind(parameter), view.data_ptr()))
        self._was_written = [False] * len(self._parts)
        """By backward, since the last collect()."""
        for index, part in enumerate(self._parts):
            part.parameter.grad = part.view
            part.parameter.register_post_accumulate_grad_hook(_Mark(self, index))

    def zero(self) -> None:
        """Set all gradients to zero and let the next backward write into flat."""
        self._grads.zero_()
        self._was_written = [False] * len(self._parts)
        for part in self._parts:
            part.parameter.grad = part.view if part.parameter.requires_grad else None

    def collect(self, read: Callable[[Tensor], Tensor] = Tensor.cpu) -> list[bool]:
        """Bring the gradients into flat; returns, for each slot, whether its parameter has one.

        Copies those that are not views. Where backward has left a view alone, waits once for the device, by
        read, to learn whether somebody else has written into it. Raises RuntimeError, which names the
        parameter, where the model's parameters are no longer those that the buffer was made of.
        """
        self._check_parameters()
        used = [self._collect_one(index, part) for index, part in enumerate(self._parts)]
        unknown = [index for index, is_used in enumerate(used) if is_used is None]
        if unknown:
            written = read(torch.stack([self._parts[index].view.any() for index in unknown])).tolist()
            used = [written.pop(0) if is_used is None else is_used for is_used in used]
        self._was_written = [False] * len(self._parts)
        if self.flat is not self._grads:
            self.flat.copy_(self._grads)
        return [bool(is_used) for is_used in used]

    def largest_magnitudes(self) -> list[Tensor]:
        """For each slot a scalar on the device: NaN where an element is, infinite only where one is."""
        largest = iter(torch._foreach_norm([part.view for part in self._parts if part.slot.size], torch.inf))
        zero = torch.zeros((), device=self.flat.device)
        return [next(largest) if part.slot.size else zero for part in self._parts]

    def distribute(self, used: Sequence[bool]) -> None:
        """Make flat the parameters' gradients; those that are not used get None, so that the optimizer leaves
        them as they are."""
        if self.flat is not self._grads:
            self._grads.copy_(self.flat)
        for part, is_used in zip(self._parts, used, strict=True):
            part.parameter.grad = part.view if is_used else None

    def _collect_one(self, index: int, part: _Part) -> bool | None:
        """Whether a parameter has a gradient; None: its view may have been written without a backward."""
        grad = part.parameter.grad
        if grad is None:
            part.view.zero_()
            return False
        if _is_view(grad, part.view):
            return self._was_written[index] or (None if part.slot.size else False)
        part.view.copy_(grad.to_dense() if grad.is_sparse else grad)
        return True

    def _check_parameters(self) -> None:
        now = dict(self._model.named_parameters())
        for part in self._parts:
            name, parameter = part.slot.name, now.pop(part.slot.name, None)
            if parameter is not part.parameter:
                what = "is no longer in the model" if parameter is None else "was replaced"
                raise RuntimeError(f"parameter {name} {what}: {MAKE_ANEW}")
            if _kind(parameter) != part.kind or part.view.data_ptr() != part.address:
                what = "another type, device, shape or memory format"
                raise RuntimeError(f"parameter {name} has {what} now: {MAKE_ANEW}")
        for name, parameter in now.items():
            if parameter.requires_grad:
                raise RuntimeError(f"parameter {name} was added, or was frozen before: {MAKE_ANEW}")


class _Mark:
    """Notes that backward has written a parameter's gradient; keeps no buffer alive."""

    def __init__(self, buffer: GradientBuffer, index: int) -> None:
        self._buffer, self._index = weakref.ref(buffer), index

    def __call__(self, parameter: Tensor) -> None:
        if (buffer := self._buffer()) is not None:
            buffer._was_written[self._index] = True


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is one of torch.distributed's (a DTensor), which this process may hold but a part
    of."""
    return hasattr(tensor, "to_local")


def _common_kind(named: list[tuple[str, nn.Parameter]]) -> tuple[torch.dtype, torch.device]:
    """The type and device of all parameters. Raises ValueError where there are several, or none is
    trained."""
    if not any(parameter.numel() for _, parameter in named):
        raise ValueError("expected parameters to train, got none that has elements and requires a gradient")
    first_name, first = named[0]
    for name, parameter in named:
        if is_sharded(parameter):
            raise ValueError(f"parameter {name}: expected it whole, got a shard: use reducers.hook_fsdp")
        if not parameter.is_floating_point():
            raise ValueError(f"parameter {name}: expected a real floating point type, got {parameter.dtype}")
        if (parameter.dtype, parameter.device) != (first.dtype, first.device):
            raise ValueError(
                f"expected one type and device for all parameters, got {first.dtype} on {first.device} "
                f"({first_name}) and {parameter.dtype} on {parameter.device} ({name})"
            )
    return first.dtype, first.device


def _is_dense(parameter: Tensor) -> bool:
    """Whether its elements fill their memory without gaps, each once, in any order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def layout_of(named: Iterable[tuple[str, Tensor]]) -> list[Slot]:
    """The layout of parameters by name, one after the other in the order of their memory."""
    return lay_out((name, _memory_shape(parameter)) for name, parameter in named)


def _memory_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape with the dimensions in the order of the memory: that of a channels_last weight is (O, H, W,
    I)."""
    if parameter.is_contiguous() or not _is_dense(parameter):
        return tuple(parameter.shape)
    order = sorted(range(parameter.dim()), key=lambda dim: -parameter.stride()[dim])
    return tuple(parameter.shape[dim] for dim in order)


def _view(part: Tensor, parameter: Tensor) -> Tensor:
    """part (size,) in a parameter's shape and strides, as autograd makes gradients; fused optimizers go
    through both in the order of their memory. Row-major where the parameter has gaps."""
    if _is_dense(parameter):
        return part.as_strided(parameter.shape, parameter.stride())
    return part.view(parameter.shape)


def _is_view(grad: Tensor, view: Tensor) -> bool:
    """Whether a gradient is the view, or the same memory in the same order."""
    if view.numel() == 0:
        return True
    return grad is view or (
        not grad.is_sparse and grad.data_ptr() == view.data_ptr() and grad.stride() == view.stride()
    )

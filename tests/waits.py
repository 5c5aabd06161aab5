"""Counts where the host would wait for the device, if the CPU's tensors were a GPU's."""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

OPERATORS = (
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim",
    "aten.unique_consecutive", "aten.equal", "aten.repeat_interleave.Tensor", "aten.bincount",
)  # fmt: skip
"""Those whose result is a number for the host, or has a size that depends on the values."""
METHODS = ("torch.Tensor.tolist", "torch.Tensor.cpu", "torch.Tensor.numpy", "torch.Tensor.__array__")
"""Those that copy to the host."""
MAKERS = ("torch.tensor", "torch.as_tensor", "torch.Tensor.new_tensor")
"""Those that copy from the host, and wait for that where they are given a device."""


class Waits:
    """What a block of code waits for, by name; "read" are the reads through one communicator."""

    _active = threading.local()

    def __init__(self, reader: object = None) -> None:
        """reader: that communicator."""
        self.found: Counter[str] = Counter()
        self._reader = reader
        self._on_host: list[Tensor] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the with-block, in this thread."""
        self._active.waits = self
        with _Operators(self), _Functions(self):
            yield
        self._active.waits = None

    @classmethod
    def read(cls, x: Tensor, reader: object = None) -> Tensor:
        """What a communicator reads: a copy, which is on the host."""
        waits = getattr(cls._active, "waits", None)
        if waits is None:
            return x.clone()
        waits.found["read" if reader is waits._reader else "read by another"] += 1
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            waits._on_host.append(x.clone())
        return waits._on_host[-1]

    def note(self, name: str, x: Any) -> None:
        if not any(x is tensor for tensor in self._on_host):
            self.found[name] += 1


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, size_is_given = str(func), (kwargs or {}).get("output_size") is not None
        if name.startswith(OPERATORS) and not size_is_given:
            self._waits.note(name, args[0])
        elif name.startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            self._waits.note("a mask as an index", args[0])
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = resolve_name(func) or "", kwargs or {}
        if name in METHODS:
            self._waits.note(name, args[0])
        elif name in MAKERS and kwargs.get("device") is not None:
            self._waits.note(f"{name} on a device", args[0])
        return func(*args, **kwargs)

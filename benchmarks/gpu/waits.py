"""Where the host waits for the device: by line of code, or by what it waits for.

On a GPU torch itself reports each wait. On a CPU what would wait, if its tensors were a GPU's, is counted.
"""

import threading
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._python_dispatch import TorchDispatchMode

from sage.runfolder.provenance import ROOT

OPERATORS = (
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim",
    "aten.unique_consecutive", "aten.equal", "aten.repeat_interleave.Tensor", "aten.bincount",
)  # fmt: skip
"""Those whose result is a number for the host, or has a size that depends on the values."""
METHODS = ("torch.Tensor.tolist", "torch.Tensor.cpu", "torch.Tensor.numpy", "torch.Tensor.__array__")
"""Those that copy to the host."""
MAKERS = ("torch.tensor", "torch.as_tensor", "torch.Tensor.new_tensor")
"""Those that copy from the host, and wait for that where they are given a device."""


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count the host's waits in the with-block by "file:line". On a CPU without copies to the host, which its
    own forms of the kernels make."""
    if device.type == "cuda":
        found: Counter[str] = Counter()
        with _reported_waits(found):
            yield found
        return
    waits = Waits(by_line=True)
    with waits.counted():
        yield waits.found


class Waits:
    """What a block of code would wait for, were the CPU's tensors a GPU's: by name, "read" being the reads
    through one communicator; or by line."""

    _active = threading.local()

    def __init__(self, reader: object = None, *, by_line: bool = False) -> None:
        """reader: that communicator."""
        self.found: Counter[str] = Counter()
        self._reader, self._by_line = reader, by_line
        self._on_host: list[Tensor] = []

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the with-block, in this thread."""
        self._active.waits = self
        copies: AbstractContextManager[Any] = nullcontext() if self._by_line else _Functions(self)
        with _Operators(self), copies:
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
            copy = x.clone()
        waits._on_host.append(copy)
        return copy

    def note(self, name: str, x: Any) -> None:
        if not any(x is tensor for tensor in self._on_host):
            self.found[calling_line() if self._by_line else name] += 1


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


@contextmanager
def _reported_waits(found: Counter[str]) -> Iterator[None]:
    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):  # torch's words
            found[calling_line()] += 1

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


def calling_line() -> str:
    """The innermost line of the project's own code that is being run, and what called that from elsewhere."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "outside of the project"

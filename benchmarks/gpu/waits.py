"""Where the host waits for the device, by line of code."""

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sage.runfolder.provenance import ROOT

READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
}
"""Operations that wait on a GPU, since their result, or its size, is needed on the host."""


@contextmanager
def counted_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count the host's waits in the with-block by "file:line".

    On a GPU torch itself reports each of them. On a CPU operations are counted that would wait on a GPU, but
    for copies to the host (tolist, cpu), which are none there.
    """
    found: Counter[str] = Counter()
    with _reported_waits(found) if device.type == "cuda" else _CountReads(found):
        yield found


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


class _CountReads(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and len(args) > 1 and _has_mask(args[1])
        if name in READS or by_mask:
            self._found[calling_line()] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether x[mask] is meant: its size must be known on the host."""
    return isinstance(indices, list | tuple) and any(
        isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in indices
    )


def calling_line() -> str:
    """The innermost line of the project's own code that is being run, and what called that from elsewhere."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "outside of the project"

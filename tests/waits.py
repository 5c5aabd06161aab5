"""Operations that make the host wait for a device, counted where there is no such device."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

KINDS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "is_nonzero", "aten::equal")
"""Of torch's operations those that read a tensor's numbers on the host; so do `.item()` and a bool index."""


class Waits(TorchDispatchMode):
    """Collects the names of such operations while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind in func.name() for kind in KINDS):
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))

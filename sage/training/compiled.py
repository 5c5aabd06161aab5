"""torch.compile as an option: a task's forward pass and loss, and so their backward pass, in compiled
kernels.

The model itself is left as it is: its parameters keep their names, and scores are computed as without it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sage.interfaces import Task


def compiled_loss(task: Task) -> Callable[[Any], Tensor]:
    """task.loss, compiled when it is first called and for each new shape of a batch."""
    compiled: Callable[[Any], Tensor] = torch.compile(task.loss)
    return compiled


def check_compiles(device: torch.device) -> None:
    """Compile something small. Raises ValueError, in one line, where that does not work: on a CPU it needs a
    C++ compiler and Python's headers, on a GPU Triton and a C compiler."""
    try:
        torch.compile(_probe)(torch.ones(2, device=device, requires_grad=True)).backward()
    except Exception as error:  # of many kinds: whatever the compiler's parts raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:2])[:200]
        raise ValueError(f"compile: expected a {device.type} that torch.compile works on: {reason}") from None


def _probe(x: Tensor) -> Tensor:
    return (x * x).sum()

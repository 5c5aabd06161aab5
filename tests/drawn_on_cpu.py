"""Random numbers on any device that are those of the CPU, so that two devices can be compared."""

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

FACTORIES = {torch.rand, torch.randn, torch.randint, torch.randperm}


class DrawnOnCpu(TorchFunctionMode):
    """Lets each generator's draws be made by a twin on the CPU, which has the same seed."""

    def __init__(self) -> None:
        super().__init__()
        self._twins: dict[torch.Generator, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func not in FACTORIES or given.get("generator") is None:
            return func(*args, **given)
        device = given.pop("device", "cpu")
        return func(*args, **{**given, "generator": self._twin(given["generator"])}).to(device)

    def _twin(self, generator: torch.Generator) -> torch.Generator:
        return self._twins.setdefault(generator, torch.Generator().manual_seed(generator.initial_seed()))

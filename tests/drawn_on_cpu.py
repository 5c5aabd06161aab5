"""Random numbers on any device that are those of the CPU, so that two devices can be compared."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sage.interfaces import Stateful

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

    def load(self, owner: Stateful, state: dict[str, Any]) -> None:
        """owner.load_state_dict of a state of the CPU: the twins take the generators' states."""
        owner.load_state_dict(_with_own_generators(owner, state))
        for generator, saved in _generators(owner, state):
            self._twin(generator).set_state(saved)


def _with_own_generators(owner: Stateful, state: dict[str, Any]) -> dict[str, Any]:
    """The state, with those of the owner's generators as they are: another device's cannot take them."""
    own = dict(state)
    for name in owner.state_names:
        value = getattr(owner, name)
        if isinstance(value, Stateful):
            own[name] = _with_own_generators(value, state[name])
        elif isinstance(value, torch.Generator):
            own[name] = value.get_state()
    return own


def _generators(owner: Stateful, state: dict[str, Any]) -> Iterator[tuple[torch.Generator, torch.Tensor]]:
    """The owner's generators, each with its part of a state."""
    for name in owner.state_names:
        value = getattr(owner, name)
        if isinstance(value, Stateful):
            yield from _generators(value, state[name])
        elif isinstance(value, torch.Generator):
            yield value, state[name]

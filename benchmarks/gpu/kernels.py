"""The forms of the kernels on this device: the bits of the plain form, and how long each takes."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.gpu.measure import deterministic, timed
from benchmarks.gpu.selection import Case, case_of
from reducers.kernels import Division

DENSITY, WORLD_SIZE = 0.001, 4
SPARE = 1.5
"""Room for candidates in scan_into, as a multiple of what is expected."""


class Inputs:
    """What the kernels are given: a memory, a gradient, and the k largest of their sum."""

    def __init__(self, case: Case) -> None:
        self.case, n = case, case.n
        case.next_gradient()
        self.memory, self.k = case.fresh.clone(), max(1, int(DENSITY * n))
        case.next_gradient()
        magnitudes = (self.memory + case.fresh).abs()
        self.bound = magnitudes.topk(self.k, sorted=False).values.min().view(1)  # (1,)
        self.indices = (magnitudes >= self.bound).nonzero().view(-1)  # (k,) and more where some are equal
        self.division, self.rooms = Division([0, n]), Division([0, min(n, int(SPARE * self.k))])
        self.send, self.grad = self.memory.clone(), case.fresh.clone()
        self.values, self.mean = self.memory[self.indices], torch.zeros_like(self.memory)

    def renew(self) -> None:
        """Undo what a kernel has changed."""
        self.send.copy_(self.memory)
        self.grad.copy_(self.case.fresh)
        self.mean.zero_()

    def scan(self, form: Any) -> Sequence[Tensor]:
        return (
            *form.scan(self.send, self.grad, self.bound, self.division, False, True),
            self.send,
            self.grad,
        )

    def scan_into(self, form: Any) -> Sequence[Tensor]:
        found = form.scan_into(self.send, self.grad, self.bound, self.division, self.rooms, True)
        return (*found, self.send, self.grad)

    def take(self, form: Any) -> Sequence[Tensor]:
        form.take(self.send, self.indices, self.values)
        return self.values, self.send

    def add_share(self, form: Any) -> Sequence[Tensor]:
        for _ in range(WORLD_SIZE):
            form.add_share(self.mean, self.indices, self.values, WORLD_SIZE)
        return (self.mean,)


KERNELS: dict[str, Callable[[Inputs, Any], Sequence[Tensor]]] = {
    "scan": Inputs.scan,
    "scan_into": Inputs.scan_into,
    "take": Inputs.take,
    "add_share": Inputs.add_share,
}


def measure_kernel(layout: str, name: str, setup: Setup) -> Iterator[Row]:
    case, plain = case_of(layout, setup.device), import_module("reducers.kernels.plain")
    inputs = Inputs(case)
    own = import_module(f"reducers.kernels.{'gpu' if setup.on_gpu else 'cpu'}")
    if not hasattr(own, name):  # the CPU needs no scan_into
        return
    with deterministic(True):
        for label, form in (("plain", plain), ("own", own)):
            timing = timed(partial(KERNELS[name], inputs, form), setup.device, inputs.renew)
            yield {
                "layout": layout,
                "kernel": name,
                "form": label,
                "ms": timing.queued,
                "x floor": timing.queued / case.floor().queued,
                "host, ms": timing.host,
                "the plain form's bits": _same(inputs, KERNELS[name], plain, form),
            }


def _same(inputs: Inputs, kernel: Callable[[Inputs, Any], Sequence[Tensor]], plain: Any, form: Any) -> bool:
    """Whether a form leaves what the plain form does. Raises ValueError where it does not."""
    found = []
    for one in (plain, form):
        inputs.renew()
        found.append([_bits(tensor).clone() for tensor in kernel(inputs, one)])
    if not all(torch.equal(a, b) for a, b in zip(*found, strict=True)):
        raise ValueError("other bits than the plain form's")
    return True


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32) if x.dtype == torch.float32 else x


def checks(setup: Setup) -> list[Check]:
    return [
        Check(f"{layout}: {name}", partial(measure_kernel, layout, name, setup))
        for layout in (["small"] if setup.small else ["lstm", "resnet18"])
        for name in KERNELS
    ]


SECTION = Section(
    "kernels",
    "The forms of reducers/kernels on this device (own: Triton's, or on a CPU the compiled ones) and in "
    "torch's operations (plain), in torch's deterministic mode, at a density of 0.001. scan: adds, lists, "
    "zeroes the gradient; add_share: four workers' messages into a zeroed mean.",
    20,
    checks,
)

"""What a run compiles is compiled before its first step, by one process at a time."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import reducers
from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.exchange.echo import warm_up
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS
from sage.interfaces import Communicator, Progress, Seeds, Slot
from sage.locks import lock
from tests.cases import CASES, CPU, LAYOUT, Case, N, gradient

MODULES = [f"reducers.kernels.{name}" for name in ("block_cpu", "cpu", "distinct_cpu", "signs_cpu")]
WITHOUT_KERNELS = {"exact", "powersgd", "svd", "atomo", "block_int", "qsgd", "natural"}
"""As an accordion of powersgd is."""


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels as in a new process."""
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)


def compiled() -> dict[str, list[Any]]:
    """The types for which each kernel is compiled, of those that are imported."""
    return {
        name: list(function.signatures)
        for module in MODULES
        if module in sys.modules
        for name, function in vars(sys.modules[module]).items()
        if hasattr(function, "signatures")
    }


def rows() -> Iterator[tuple[Case, str, int, torch.dtype]]:
    """Every case with each feedback that hands over the gradient in another way, and for each type."""
    for case in CASES:
        reducer = REDUCERS[case.reducer]
        is_sparse = reducer.is_sparsifier(reducer.Settings.model_validate(case.settings))
        feedback = "residual" if reducer.takes_feedback else "none"
        yield case, feedback, 1, torch.float32
        yield case, feedback, 2, torch.float32
        if is_sparse:
            yield case, "momentum", 2, torch.float64


@pytest.mark.parametrize(("case", "feedback", "world_size", "dtype"), list(rows()), ids=str)
def test_no_step_compiles_a_kernel_after_the_warm_up(
    case: Case, feedback: str, world_size: int, dtype: torch.dtype
) -> None:
    config, kind = REDUCERS[case.reducer].Settings.model_validate(case.settings), FEEDBACKS[feedback]

    def build(layout: list[Slot], like: Tensor, comm: Communicator) -> Exchange:
        reducer = reducers.build(config, layout, seeds=Seeds.derive(1, comm.rank), device=CPU)
        return Exchange(kind(kind.Settings(), like), reducer, comm, layout)

    def two_steps(comm: LocalComm) -> None:
        exchange = build(LAYOUT, torch.zeros(N, dtype=dtype), comm)
        for step in range(2):
            progress = Progress(epoch=step / 2, step=step, lr=0.1, steps_per_epoch=2)
            exchange.average(gradient(comm.rank, step).to(dtype), progress)

    warm_up(build, LAYOUT, torch.zeros(N, dtype=dtype), world_size)
    before = compiled()
    uses_kernels = case.reducer not in WITHOUT_KERNELS and case.settings.get("inner") != "powersgd"
    uses_kernels &= case.settings != {"clip": None}  # then terngrad needs no deviation
    assert any(before.values()) == uses_kernels
    LocalComm.run(world_size, two_steps)
    assert compiled() == before


def test_a_warm_up_changes_no_global_generator() -> None:
    def build(layout: list[Slot], like: Tensor, comm: Communicator) -> Exchange:
        return reducers.build_exchange("random_k", layout, like, comm, density=0.1)

    before = torch.get_rng_state()
    warm_up(build, LAYOUT, torch.zeros(N), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_without_elements_needs_no_warm_up() -> None:
    def build(layout: list[Slot], like: Tensor, comm: Communicator) -> Exchange:
        raise AssertionError

    warm_up(build, [Slot("empty", 0, (0, 3))], torch.zeros(0), 2)


def test_attach_warms_up() -> None:
    model = nn.Linear(3, 2)
    exchange = reducers.attach(model, "topk", comm=LocalComm.alone(), density=0.5)
    before = compiled()
    assert before["_scan"]
    model(torch.ones(1, 3)).sum().backward()
    exchange.step()
    assert compiled() == before


@pytest.mark.usefixtures("group_of_one")
def test_a_hook_warms_up() -> None:
    ddp = DistributedDataParallel(nn.Linear(3, 2))
    hook = reducers.hook(ddp, "topk", density=0.5)
    before = compiled()
    assert before["_scan"]
    ddp(torch.ones(1, 3)).sum().backward()
    assert hook.density == 0.5
    assert compiled() == before


def test_a_function_is_compiled_by_one_process_at_a_time_and_the_next_loads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = import_module("reducers.kernels.compiled")
    monkeypatch.setattr(make.CONFIG, "CACHE_DIR", str(tmp_path))

    def add_one(x: np.ndarray) -> np.ndarray:
        return x + 1

    first, second = make.compiled(add_one), make.compiled(add_one)  # as two processes have them
    held = lock(Path(first.stats.cache_path) / "add_one.lock")  # as a third one does
    assert held is not None
    thread = threading.Thread(target=first, args=(np.ones(3),))
    thread.start()
    time.sleep(0.3)
    assert not first.signatures
    os.close(held)
    thread.join(60)
    assert len(first.signatures) == 1
    assert second(np.ones(3)).tolist() == [2.0] * 3
    assert first.stats.cache_misses
    assert second.stats.cache_hits


def test_a_lock_that_stays_is_waited_for_no_longer_than_a_compilation_may_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = import_module("reducers.kernels.compiled")
    monkeypatch.setattr(make.CONFIG, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(make, "LOCK_SECONDS", 0.1)
    function = make.compiled(lambda x: x + 2)
    held = lock(Path(function.stats.cache_path) / "<lambda>.lock")
    assert held is not None
    assert function(1) == 3
    os.close(held)

"""How often the host waits for the device in a step, counted on the CPU as if its tensors were a GPU's."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu.waits import Waits
from reducers import REDUCERS, kernels, largest
from reducers.kernels import plain
from reducers.kernels.block import BlockDraw, PlainBlockDraw
from reducers.search import FixedSearch
from sage.config import Named
from sage.exchange.comm import LocalComm
from sage.training.agree import Request
from sage.training.optim import SGD, Adam, build_optimizer
from tests.test_late import feedback_of
from tests.toy import settings_of, trainer_of

WORLD_SIZE, EVERY = 2, 3
DEVICE_FREE = ("exact", "powersgd", "random_block", "topk", "global_topk", "clt_k")
"""The methods that wait for no device on a GPU's path, in torch operations; the others have paths of the
CPU's own that are not replaced here."""
SEARCHES_ANEW = ("gaussian_k", "redsync")
"""How often these search for what reaches a threshold depends on the gradient."""


@pytest.fixture(autouse=True)
def noted_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalComm, "read", lambda comm, x: Waits.read(x, comm))


def waits_of(name: str, **changes: Any) -> tuple[list[Counter[str]], list[Counter[str]]]:
    """What worker 0 waits for in each plain step and in each logging step; the first two steps make what is
    kept."""
    sections = {"feedback": feedback_of(name), "log": {"every": EVERY}, **changes}
    settings = settings_of(name, **sections)

    def worker(comm: LocalComm) -> tuple[list[Counter[str]], list[Counter[str]]]:
        plain, logging = list[Counter[str]](), list[Counter[str]]()
        with trainer_of(settings, comm, reads_late=True) as trainer:
            train_step = trainer._train_step

            def counted(batches: Iterator[Any]) -> Request:
                waits, found = Waits(trainer.side), logging if trainer._is_logging_step() else plain
                with waits.counted():
                    request = train_step(batches)
                if trainer.position.step > 1:
                    found.append(waits.found)
                return request

            trainer._train_step = counted  # type: ignore[method-assign]
            trainer.run()
        return plain, logging

    return LocalComm.run(WORLD_SIZE, worker)[0]


@pytest.fixture
def device_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's search and kernels, in torch operations."""
    monkeypatch.setattr(largest, "search_for", lambda _: FixedSearch)
    monkeypatch.setattr(kernels, "form_for", lambda _: plain)
    monkeypatch.setattr(BlockDraw, "draw", lambda self, key, device: PlainBlockDraw(self, device)(key))


@pytest.mark.usefixtures("device_path")
@pytest.mark.parametrize("clip", [{}, {"norm": 0.5}, {"norm": 0.5, "before_reduce": False}])
@pytest.mark.parametrize("name", DEVICE_FREE)
def test_a_plain_step_reads_only_what_the_step_before_has_left(name: str, clip: dict[str, Any]) -> None:
    plain, logging = waits_of(name, clip=clip)
    assert {"read": 1} in plain
    assert all(found in ({}, {"read": 1}) for found in plain)  # nothing is left by a logging step
    # The flags of two steps together; then norms, terms and losses together.
    assert all(found == {"read": 2} for found in logging)


@pytest.mark.parametrize(
    "config",
    [
        SGD(lr=0.1, momentum=0.9, nesterov=True),
        SGD(lr=0.1, momentum=0.9, nesterov=True, nesterov_form="published"),
        Adam(lr=0.1),
    ],
)
def test_an_optimizer_waits_for_nothing_though_the_learning_rate_changes(config: Named) -> None:
    model, waits = torch.nn.Linear(3, 2), Waits()
    optimizer = build_optimizer(config, model)
    for lr in (0.1, 0.2):
        model(torch.ones(4, 3)).sum().backward()
        optimizer.param_groups[0]["lr"] = lr
        with waits.counted():
            optimizer.step()
    assert not waits.found


@pytest.mark.parametrize("name", REDUCERS)
def test_a_logging_step_waits_once_more_than_a_plain_one(name: str) -> None:
    plain, logging = waits_of(name)
    assert max(found["read"] for found in plain) == 1
    for found in logging:
        rest = found - Counter(read=1)
        assert rest in plain or (name in SEARCHES_ANEW and rest["read"] == 1)


def test_every_wait_is_counted() -> None:
    x, waits = torch.arange(5.0), Waits()
    with waits.counted():
        x.sum().item(), bool(x.any()), float(x[0])
        x.tolist(), x.numpy(), x.cpu()
        x[x > 2], x.nonzero(), x.unique()
        torch.tensor([1.0], device=x.device)
        Waits.read(x).tolist(), int(Waits.read(x[0]))
        x[1], x.index_select(0, torch.tensor([1])), x.add_(1), len(x)  # these wait for nothing
    expected = {
        "aten._local_scalar_dense.default": 3, "aten.nonzero.default": 1, "aten._unique2.default": 1,
        "torch.Tensor.tolist": 1, "torch.Tensor.numpy": 1, "torch.Tensor.cpu": 1,
        "a mask as an index": 1, "torch.tensor on a device": 1, "read": 2,
    }  # fmt: skip
    assert waits.found == expected

"""The tests run torch as the program does: threads that wait for one another sleep. Where there is no GPU,
Triton's interpreter runs its kernels, which triton must know when it is imported first, by whomever."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from sage.workers import environment

environment.set_defaults()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="try the tests marked gpu on the CPU")


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A default process group of this process alone, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

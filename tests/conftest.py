"""The tests run torch as the program does: threads that wait for one another sleep. Where there is no GPU,
Triton's interpreter runs its kernels, which triton must know when it is imported first, by whomever."""

import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from sage.workers import environment
from tests.forks import Forks

environment.set_defaults()
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that the tests start; torchrun sets it, too
os.environ.pop("COLUMNS", None)  # pytest-xdist's, of the terminal: what is printed here goes to no terminal
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
COSTLY = (
    *("test_ddp_hook", "test_examples", "test_laws", "test_faults", "test_overlap", "test_language"),
    *("test_kernels", "test_checkpoint", "test_ddp_digits", "test_launch", "test_resume_runs"),
    *("test_simulate", "test_report", "test_benchmarks", "test_fsdp_hook", "test_environment", "test_jobs"),
    "test_sweep",
)
"""Files that begin first where files run side by side: one that began last would run alone."""
FORKS = pytest.StashKey[Forks]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="try the tests marked gpu on the CPU")
    parser.addoption("--cold", action="store_true", help="fork no program: each does its own imports")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Not before: what the tests import sets variables."""
    stash = session.config.stash
    # A process whose parent has used a GPU cannot use it.
    if not session.config.getoption("--cold") and not torch.cuda.is_available():
        stash[FORKS] = Forks(dict(os.environ))
        stash[FORKS].use()


def pytest_unconfigure(config: pytest.Config) -> None:
    if FORKS in config.stash:
        config.stash[FORKS].end()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: COSTLY.index(item.path.stem) if item.path.stem in COSTLY else len(COSTLY))


@pytest.fixture
def forks(request: pytest.FixtureRequest) -> Forks:
    """What starts programs, unless --cold."""
    if FORKS not in request.config.stash:
        pytest.skip("no program is forked here")
    return request.config.stash[FORKS]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The tensors are small, and the tests run side by side: more threads would wait for one another. And the
    processes that are compared with have one: an eigenvector's bits depend on the number."""
    torch.set_num_threads(1)


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A default process group of this process alone, over gloo."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()

"""The table of reducers: what it imports and when, and a reducer that the repository does not know."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reducers import REDUCERS, build_reducer
from sage.config import ConfigError
from sage.exchange.comm import LocalComm
from sage.exchange.echo import EchoComm
from tests.cases import CASES, LAYOUT, Case, N, gradient, run_case

ROOT = Path(__file__).parent.parent
OWN = '''
from typing import Any

import torch
from torch import Tensor

from reducers.common import WrapperSettings
from reducers.sparse import Sparsifier, SparsifierSettings
from sage.interfaces import Communicator, Place, Reducer


class First(Sparsifier):
    """Sends the first elements."""

    class Settings(SparsifierSettings):
        count: int = 2

    def __init__(self, config, layout, *, seeds, device):
        super().__init__(config, layout)

    def select(self, send: Tensor, place: Place) -> Tensor:
        return torch.arange(self.config.count)


class Doubled(Reducer):
    """Twice what another reducer averages."""

    class Settings(WrapperSettings):
        def inner_section(self) -> dict[str, Any]:
            return {"name": "own:First", "count": 3}

    def __init__(self, config, layout, *, seeds, device, inner):
        self.inner = inner

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        self.inner.reduce(send, mean, comm)
        mean.mul_(2)

    def expected_payload_bytes(self, world_size: int) -> int:
        return self.inner.expected_payload_bytes(world_size)
'''


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's module, on the path while a test runs."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own", raising=False)


def modules_after(program: str) -> set[str]:
    """The modules of a fresh interpreter that ran a program."""
    command = [sys.executable, "-c", f"{program}; import sys; print(*sys.modules)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_the_names_cost_no_import_of_torch_or_of_a_reducer() -> None:
    modules = modules_after("import reducers; assert 'sage' in list(reducers.REDUCERS)")
    assert "torch" not in modules
    assert not [name for name in modules if name.startswith("reducers.")]


def test_a_reducer_is_imported_without_the_others() -> None:
    modules = modules_after("import reducers; reducers.REDUCERS['signsgd']")
    ours = {name for name in modules if name.startswith("reducers.")}
    shared = {"reducers.vote", "reducers.kernels", "reducers.kernels.signs"}
    assert ours == {"reducers.signsgd", *shared}


@pytest.mark.parametrize("name", REDUCERS)
def test_a_name_in_the_table_is_the_settings_name(name: str) -> None:
    assert REDUCERS[name].Settings().name == name


def test_a_reducer_of_ones_own_is_built_from_its_place() -> None:
    reducer, send, mean = (
        build_reducer("own:First", LAYOUT, worker=0, count=5),
        gradient(0, 0),
        torch.zeros(N),
    )
    reducer.reduce(send, mean, LocalComm.alone())
    assert torch.equal(mean[:5], gradient(0, 0)[:5])
    assert mean[5:].count_nonzero() == send[:5].count_nonzero() == 0


def test_a_wrapper_of_ones_own_receives_its_inner_reducer_built() -> None:
    reducer = build_reducer("own:Doubled", LAYOUT, worker=0)
    send, mean = gradient(0, 0), torch.zeros(N)
    reducer.reduce(send, mean, LocalComm.alone())
    assert torch.equal(mean[:3], 2 * gradient(0, 0)[:3])
    assert mean[3:].count_nonzero() == 0


def test_a_class_that_is_not_a_reducer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"expected a subclass of sage\.interfaces\.Reducer"):
        build_reducer("own:Place", LAYOUT, worker=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_among_workers_that_are_only_pretended_are_whole(case: Case) -> None:
    """As warm-up and benchmarks make them, whichever of the workers has the word."""
    for step in run_case(case, EchoComm(), 3):
        assert step.mean.isfinite().all()
        assert step.counted["payload_bytes"] > 0

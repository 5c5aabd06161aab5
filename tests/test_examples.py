"""The examples run as their first lines say, from any folder, and learn; build_reducer takes what a
configuration takes."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from torch.distributed.fsdp import FSDPModule

import sage
from reducers import build_reducer
from reducers.sage import Sage
from sage.interfaces import lay_out

ROOT = Path(__file__).parent.parent
LAYOUT = lay_out([("weight", (30, 10)), ("bias", (10,))])
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node"]
TWO_WORKERS, FOUR_WORKERS = [*TORCHRUN, "2"], [*TORCHRUN, "4"]
PACKAGES = {"accelerate_": "accelerate", "lightning_": "lightning"}
"""What an example needs that is not installed with the rest."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `pip install .` installs, built without a network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    shutil.copy(ROOT / "pyproject.toml", source)
    for package in ("sage", "reducers", "tasks", "tests", "benchmarks"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(target), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def run_elsewhere(installed: Path, command: list[str], folder: Path) -> str:
    """What a program says that runs in another folder, with the installed packages only."""
    here = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=here, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_an_installation_has_our_packages_alone_and_one_version(installed: Path, tmp_path: Path) -> None:
    ours = {"sage", "reducers", "tasks", f"sage-{sage.__version__}.dist-info"}
    assert {path.name for path in installed.iterdir()} == ours
    files = {
        path.relative_to(ROOT)
        for part in ("sage", "reducers", "tasks")
        for path in (ROOT / part).rglob("*.py")
    }
    assert files == {path.relative_to(installed) for path in installed.rglob("*.py")}
    metadata = (installed / f"sage-{sage.__version__}.dist-info" / "METADATA").read_text()
    needed = re.findall(r"^Requires-Dist: ([^;\n]+)", metadata, re.MULTILINE)
    assert "torch>=2.6" in needed
    assert not [requirement for requirement in needed if "==" in requirement]
    command = ["-c", "import sage, reducers, tasks; print(sage.__file__, reducers.__file__, tasks.__file__)"]
    told = run_elsewhere(installed, command, tmp_path)
    assert told.split() == [str(installed / name / "__init__.py") for name in ("sage", "reducers", "tasks")]


@pytest.mark.parametrize(
    ("launcher", "example", "told"),
    [
        ([], "own_loop", r"density 0\.0[2-9]"),
        (TWO_WORKERS, "own_loop", r"density 0\.0[2-9]"),
        (TWO_WORKERS, "ddp", r"bytes a step \d+"),
        (TWO_WORKERS, "accelerate_", r"bytes a step \d+"),
        ([], "lightning_", r"bytes a step \d+"),  # starts two workers itself
        (FOUR_WORKERS, "hsdp", r"density 0\.0[2-9]"),
    ],
)
def test_an_example_learns(
    launcher: list[str], example: str, told: str, installed: Path, tmp_path: Path
) -> None:
    package = PACKAGES.get(example)
    if package and find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install -r requirements-examples.txt")
    if example == "hsdp" and not hasattr(FSDPModule, "set_all_reduce_hook"):
        pytest.skip("needs torch 2.7 or newer: FSDPModule.set_all_reduce_hook")
    output = run_elsewhere(installed, [*launcher, str(ROOT / "examples" / f"{example}.py")], tmp_path)
    lines = re.findall(r"step \d+  loss ([\d.]+)  (.*)", output)
    assert len(lines) == 5  # once each, by rank 0
    # Before it learns, the loss of 4 classes is about log 4 = 1.39.
    assert float(lines[-1][0]) < 0.7
    assert all(re.fullmatch(told + r"\d*", rest) for _, rest in lines)


def test_an_example_runs_in_the_repository_without_an_installation() -> None:
    command = [sys.executable, "-m", "examples.own_loop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_a_reducer_is_built_from_keywords() -> None:
    reducer = build_reducer("sage", LAYOUT, worker=1, seed=3, density=0.2, exchange="union")
    assert isinstance(reducer, Sage)
    assert (reducer.n, reducer.target_density, reducer.exchange) == (310, 0.2, "union")
    alike, other = (build_reducer("sage", LAYOUT, worker=rank, seed=3) for rank in (1, 2))
    states = [one.state_dict()["law"]["generator"] for one in (reducer, alike, other)]
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("sge", {}, "reducer.name: expected one of .*; did you mean sage?"),
        ("sage", {"densty": 0.1}, "reducer.densty: unknown key; did you mean density?"),
        ("sage", {"density": 2}, r"reducer.density: expected a number in \(0, 1\], got 2"),
    ],
)
def test_a_bad_keyword_is_named(name: str, settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_reducer(name, LAYOUT, worker=0, **settings)


def test_a_rank_of_factors_is_a_setting_and_no_workers_rank() -> None:
    powersgd = build_reducer("powersgd", LAYOUT, worker=1, rank=2, min_compression_rate=0)
    assert powersgd.expected_payload_bytes(2) == 4 * (2 * (30 + 10) + 10)  # two factors and a vector

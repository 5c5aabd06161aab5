"""What is set before torch is imported, on every way of launching."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sage.workers import environment

ROOT = Path(__file__).parent.parent
OWN = """
import json, os, sys
from pathlib import Path
Path(os.environ["FOUND"] + str(os.getpid())).write_text(json.dumps(dict(os.environ)))
"""
"""As a module torch, which Python finds first: it writes down the environment that torch would be imported
in."""


def environments(tmp_path: Path, command: list[str], **variables: str) -> list[dict[str, str]]:
    """The environment of each process of a command at the moment that it imports torch, which fails there."""
    folder = tmp_path / "first"
    folder.mkdir()
    (folder / "torch.py").write_text(OWN + "sys.exit(3)\n")
    kept = {name: value for name, value in os.environ.items() if name not in environment.INSTEAD}
    given = {**kept, "PYTHONPATH": str(folder), "FOUND": str(tmp_path / "found-"), **variables}
    subprocess.run(command, cwd=ROOT, env=given, capture_output=True, timeout=300)
    return [json.loads(path.read_text()) for path in sorted(tmp_path.glob("found-*"))]


RUN = [sys.executable, "run.py", "configs/digits.yaml", "epochs=1"]
COMMANDS = {
    "one process": RUN,
    "simulated": [*RUN, "--simulate", "2"],
    "the one that starts workers": [*RUN, "--workers", "2"],
    "a sweep": [sys.executable, "run.py", "--sweep", "configs/sweeps/ablation.yaml"],
    "run.sh": ["./run.sh", "configs/digits.yaml"],
    "a benchmark": [sys.executable, "-m", "benchmarks.reduce"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_threads_that_wait_sleep_unless_the_user_has_said_otherwise(name: str, tmp_path: Path) -> None:
    variables = {"SAGE_ENV": sys.prefix}
    (found,) = environments(tmp_path, COMMANDS[name], **variables)
    assert found["OMP_WAIT_POLICY"] == "PASSIVE"


@pytest.mark.parametrize(("variable", "value"), [("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "1000")])
def test_what_the_user_has_set_stands(variable: str, value: str, tmp_path: Path) -> None:
    (found,) = environments(tmp_path, RUN, **{variable: value})
    assert found[variable] == value
    assert found.get("OMP_WAIT_POLICY") == (value if variable == "OMP_WAIT_POLICY" else None)


HOOK = """
import json, os, sys, time
from pathlib import Path

class Finder:
    @staticmethod
    def find_spec(module, path=None, target=None):
        if module == "torch" and Path(sys.argv[0]).name == "run.py":
            found, name = Path(os.environ["FOUND"]), str(os.getpid())
            (found.parent / name).write_text(json.dumps(dict(os.environ)))
            (found.parent / name).rename(found / name)  # whole
            if "RANK" in os.environ:
                until = time.monotonic() + 200
                while len(list(found.iterdir())) < int(os.environ["COUNT"]) and time.monotonic() < until:
                    time.sleep(0.01)
                os._exit(3)

sys.meta_path.insert(0, Finder)
"""
"""As a module sitecustomize, which Python imports at its start: it writes down the environment in which
run.py imports torch. That succeeds in a launcher; a worker ends there, once all have come so far: a launcher
ends the others when one has ended."""
LAUNCHES = {  # command, processes that are run.py, exit code where the workers end with 3
    "--workers": ([*RUN, "--workers", "2"], 3, 3),
    "torchrun": ([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *RUN[1:]], 2, 1),
}


@pytest.mark.parametrize("name", LAUNCHES)
def test_threads_of_launched_workers_sleep_too(name: str, tmp_path: Path) -> None:
    command, count, code = LAUNCHES[name]
    first, found = tmp_path / "first", tmp_path / "found"
    first.mkdir()
    found.mkdir()
    (first / "sitecustomize.py").write_text(HOOK)
    kept = {name: value for name, value in os.environ.items() if name not in environment.INSTEAD}
    given = {**kept, "PYTHONPATH": str(first), "FOUND": str(found), "COUNT": str(count)}
    command = [*command, "--runs", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
    policies = [json.loads(path.read_text())["OMP_WAIT_POLICY"] for path in found.iterdir()]
    assert policies == ["PASSIVE"] * count

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


def test_workers_that_are_started_have_it_too(tmp_path: Path) -> None:
    """They are run.py once more, with the environment of the one that starts them."""
    code = "import os, subprocess, sys\nfrom sage.workers import environment\nenvironment.set_defaults()\n"
    code += "print(subprocess.check_output([sys.executable, '-c', "
    code += "\"import os; print(os.environ['OMP_WAIT_POLICY'])\"], text=True))"
    kept = {name: value for name, value in os.environ.items() if name not in environment.INSTEAD}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=kept, capture_output=True, text=True)
    assert done.stdout.strip() == "PASSIVE", done.stderr

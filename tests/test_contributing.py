"""CONTRIBUTING's examples run as they are written, from a folder of their own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def block(heading: str, language: str) -> str:
    """The first code block of a language under a heading of CONTRIBUTING.md."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index(f"## {heading}") :]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_task_of_the_example_trains_with_two_workers(tmp_path: Path) -> None:
    (tmp_path / "sines.py").write_text(block("Add a task", "python"))
    (tmp_path / "sines.yaml").write_text(block("Add a task", "yaml"))
    command = [sys.executable, str(ROOT / "run.py"), "sines.yaml", "--workers", "2", "log.tensorboard=false"]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/sines/*/summary.json")
    summary = json.loads(path.read_text())
    assert summary["world_size"] == 2
    assert summary["score"]["last"] > 0.6  # guessing gives 1/3

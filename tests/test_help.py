"""--help of every program fits a terminal of 80 columns."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.command import fold

ROOT = Path(__file__).parent.parent
BENCHMARKS = [path for path in (ROOT / "benchmarks").glob("*.py") if "def main" in path.read_text()]
PROGRAMS = [
    *sorted(f"benchmarks.{path.stem}" for path in BENCHMARKS),
    "benchmarks.gpu.__main__",
    "sage.report.__main__",
    "tasks.data.prepare",
    "tests.faults",
]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_help_fits_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main()
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(map(len, lines)) > 200


def test_a_folded_docstring_keeps_its_words_its_items_and_its_options_whole() -> None:
    assert fold("one two\nthree", 9) == "one two\nthree"
    assert fold("- one two\n- three four", 9) == "- one two\n- three\n  four"
    assert fold("    python -m a [--b c]\n      [--d e]", 25) == "    python -m a [--b c]\n        [--d e]"


def test_the_help_of_prepare_dataset_imports_no_data_set() -> None:
    code = "import sys, tasks.data.prepare; print({'torch', 'numpy', 'pandas'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")

"""What a careless user or a hostile file does to a program that did not expect it: nothing is lost, nothing
hangs, and the user reads one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import run
from sage import files
from sage.report.__main__ import main as report
from sage.runfolder import provenance
from sage.runfolder.folder import link

ROOT = Path(__file__).parent.parent
WORDS = ["configs/digits.yaml", "epochs=1", "log.tensorboard=false"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one finished run in it."""
    runs = tmp_path_factory.mktemp("trained")
    assert run.main([*WORDS, "--runs", str(runs)]) == 0
    return runs


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    for path in trained.rglob("*"):
        if path.is_file():
            copy = tmp_path / "runs" / path.relative_to(trained)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path / "runs"


def error_line(capsys: Capture) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


# --- the user's own files -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_in_the_place_of_the_link_to_a_run_is_not_lost(
    kind: str, tmp_path: Path, capsys: Capture
) -> None:
    precious = tmp_path / "precious"
    inner = precious if kind == "file" else precious / "inner"
    inner.parent.mkdir(exist_ok=True)
    inner.write_text("a week's work")
    assert run.main([*WORDS, "--runs", str(tmp_path / "runs"), "--job", str(precious)]) == 2
    problem = f"expected the name of a link, got a {kind}, which would be lost"
    assert error_line(capsys) == f"run.py: --job {precious}: {problem}"
    assert not list((tmp_path / "runs").glob("*/*"))
    with pytest.raises(ValueError, match=problem):  # it came while the workers started
        link(precious, tmp_path)
    assert inner.read_text() == "a week's work"


def test_a_link_of_an_earlier_job_is_replaced(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.symlink_to(tmp_path / "gone")
    link(job, tmp_path)
    assert job.resolve() == tmp_path.resolve()


# --- nobody reads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["head -n 1", "true"])
@pytest.mark.parametrize("workers", [[], ["--workers", "2"]])
def test_a_run_goes_on_when_nobody_reads_what_it_says(
    reader: str, workers: list[str], tmp_path: Path
) -> None:
    words = [sys.executable, "run.py", *WORDS, "epochs=2", *workers, "--runs", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        subprocess.run(reader.split(), stdin=process.stdout, stdout=subprocess.DEVNULL, check=True)
        process.stdout.close()
        complaint = process.stderr.read()
    assert (process.returncode, complaint) == (0, b"")
    (summary,) = tmp_path.rglob("summary.json")
    assert json.loads(summary.read_text())["epochs"] == 2


# --- files that are no files, and files that are no JSON ---------------------------------------------


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("metrics.jsonl", os.mkfifo),
        ("summary.json", os.mkfifo),
        ("config.yaml", os.mkfifo),
        ("summary.json", make_endless),
    ],
)
def test_the_report_refuses_what_never_ends(
    name: str, make: Callable[[Path], None], runs: Path, capsys: Capture
) -> None:
    (path,) = runs.rglob(name)
    path.unlink()
    make(path)
    assert report([str(runs)]) == 2
    assert str(path) in error_line(capsys)


def test_a_configuration_that_is_a_pipe_is_refused(tmp_path: Path, capsys: Capture) -> None:
    """Every worker reads the file, and a pipe is read once."""
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)
    assert run.main([str(path)]) == 2
    assert error_line(capsys) == f"run.py: {path}: cannot be read: it is not a regular file"


def nested(depth: int, left: str, right: str) -> bytes:
    return (left * depth + "1" + right * depth).encode()


@pytest.mark.parametrize(
    "line", [nested(100_000, "[", "]"), nested(100_000, '{"a":', "}"), nested(900, '{"a":', "}")]
)
def test_the_report_refuses_what_is_nested_too_deep(line: bytes, runs: Path, capsys: Capture) -> None:
    (path,) = runs.rglob("metrics.jsonl")
    count = len(path.read_bytes().splitlines())
    path.write_bytes(path.read_bytes() + line + b"\n")
    assert report([str(runs)]) == 2
    assert f"{path}: line {count + 1}: expected a JSON object" in error_line(capsys)


def test_json_that_is_nested_too_deep_is_a_value_error() -> None:
    assert files.parse_json(b'{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="nested too deep"):
        files.parse_json(nested(100_000, "[", "]"))


# --- another repository ---------------------------------------------------------------------------


def test_a_run_never_records_another_repositorys_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "other"], check=True)
    own = provenance.environment()["commit"]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))  # as a git hook sets it
    assert provenance.environment()["commit"] == own
    monkeypatch.delenv("GIT_DIR")
    monkeypatch.setattr(provenance, "ROOT", tmp_path / "site-packages")  # installed inside a repository
    (tmp_path / "site-packages").mkdir()
    assert provenance.environment()["commit"] is None

"""A program that is forked is what a new one would be."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.forks import ROOT, SCRIPT, Forks, parse, rank_of, read_by_imports

PROBE = [sys.executable, "-m", "tests.fork_probe"]
GIVEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "as it is": (["0"], {}),
    "unbuffered": (["0"], {}),
    "arguments and an exit code": (["7", ""], {}),
    "a session of its own": (["0"], {"start_new_session": True}),
    "an environment": (["0"], {"env": os.environ | {"RANK": "3", "odd": "a=b\n\udcff"}}),
    "a child": (["0", "children"], {"env": os.environ | {"odd": "1"}}),
}
"""Arguments of the program, and what subprocess is given. Without an environment it would pass on what C
libraries have put into theirs."""


def outcomes(forks: Forks, monkeypatch: pytest.MonkeyPatch, command: list[str], **given: Any) -> list[Any]:
    """What a program tells and its exit code, started as ever and forked."""
    found = []
    for start in (forks.start_process, forks.fork_or_start):
        monkeypatch.setattr(subprocess, "_fork_exec", start)
        given = {"cwd": ROOT, "env": os.environ, **given}
        done = subprocess.run(command, capture_output=True, text=True, **given)
        assert done.stderr.splitlines() == ["to the other stream", "of a thread", "at the end"]
        found.append((done.returncode, json.loads(done.stdout)))
    return found


@pytest.mark.parametrize("name", GIVEN)
def test_a_program_that_is_forked_is_as_one_that_is_started(
    name: str, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, given = GIVEN[name]
    command = [PROBE[0], "-u", *PROBE[1:]] if name == "unbuffered" else PROBE
    started, forked = outcomes(forks, monkeypatch, [*command, *words], **given)
    assert forked == started
    assert forked[0] == int(words[0])


def test_cores_and_signals_are_those_of_the_process_that_starts_it(
    forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus, held = os.sched_getaffinity(0), {signal.SIGUSR1, signal.SIGHUP}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    os.sched_setaffinity(0, {min(cpus)})
    signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        started, forked = outcomes(forks, monkeypatch, [*PROBE, "0", "children"])
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, held)
        os.sched_setaffinity(0, cpus)
        signal.signal(signal.SIGHUP, before)
    assert forked == started
    assert [told["cpus"] for told in forked[1]] == [[min(cpus)]] * 2


def test_a_forked_program_is_a_child_that_can_be_stopped_and_killed(forks: Forks, tmp_path: Path) -> None:
    words = ["run.py", "configs/digits.yaml", "epochs=100000", "--runs", str(tmp_path), "--threads", "1"]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT) as process:
        process.send_signal(signal.SIGSTOP)
        pid, status = os.waitpid(process.pid, os.WUNTRACED)
        assert (pid, os.WIFSTOPPED(status)) == (process.pid, True)
        assert Path(f"/proc/{process.pid}/stat").read_text().split()[3] == str(os.getpid())
        process.kill()
        assert process.wait(30) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        (["run.py", "a", "--b"], (["run.py", "a", "--b"], False)),
        (["-u", str(SCRIPT)], ([str(SCRIPT)], True)),
        (["-m", "sage.report", "c"], (["-m", "sage.report", "c"], False)),
        (["-m", "pip"], None),
        (["-c", "run.py"], None),
        (["-X", "importtime", "run.py"], None),
        (["tests/run.py"], None),
        ([], None),
    ],
)
def test_only_what_imports_ours_is_forked(words: list[str], parsed: tuple[list[str], bool] | None) -> None:
    assert parse([sys.executable, *words], str(ROOT)) == parsed
    assert parse(["python", *words], str(ROOT)) is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PYTHONPATH", str(ROOT)), ("OMP_WAIT_POLICY", "ACTIVE"), ("ATEN_CPU_CAPABILITY", "default")],
)
def test_a_program_whose_imports_would_read_another_environment_is_started(
    variable: str, value: str, forks: Forks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "_fork", lambda *_: pytest.fail("it was forked"))
    given = os.environ | {variable: value}
    subprocess.run([*PROBE, "0"], cwd=ROOT, env=given, check=True, capture_output=True)


def test_what_scikit_learns_import_sets_keeps_no_program_from_being_forked() -> None:
    set_by_user = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    set_by_import = {"KMP_DUPLICATE_LIB_OK": "True", "KMP_INIT_AT_FORK": "FALSE"}
    assert read_by_imports(set_by_user | set_by_import | {"RANK": "1"}) == set_by_user


def test_a_worker_is_known_by_its_rank() -> None:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "RANK": "12"}) as process:
        assert rank_of(process.pid) == 12
        process.kill()
    assert rank_of(process.pid) is None
    assert rank_of(os.getpid()) is None

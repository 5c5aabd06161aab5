"""Sweeps: a file's points and their order, what is done, what runs, what is refused."""

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

import run
from sage import cli, config, sweep, yamlfile
from sage.config import ConfigError
from sage.sweep import RUN_LOCK, SWEEP_LOCK, holder, lock
from tests.test_cli import exit_code
from tests.test_simulate import restored

__all__ = ["restored"]  # a fixture that every test here gets

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))
BASE = ROOT / "configs" / "digits.yaml"
GRID = {"reducer.name": ["topk", "sage"], "reducer.density": [0.5, 0.25]}
Capture = pytest.CaptureFixture[str]


def write(folder: Path, **content: Any) -> Path:
    """A sweep's file; of digits, where nothing else is said."""
    path = folder / "four.yaml"
    path.write_text(yaml.safe_dump({"base": str(BASE), "seeds": [1]} | content, sort_keys=False))
    return path


def told(folder: Path, **content: Any) -> str:
    """What is said of a sweep that must be refused."""
    path = write(folder, **content)
    with pytest.raises(ConfigError) as caught:
        sweep.resolve(path, sweep.read(path), run.LOAD_SETTINGS)
    (line,) = str(caught.value).splitlines()
    return line


def finish(folder: Path, settings: config.Settings) -> Path:
    """What a finished run leaves, as far as a sweep looks."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(settings))
    (folder / "summary.json").write_text("{}")
    return folder


@contextmanager
def locked(folder: Path, name: str = RUN_LOCK) -> Iterator[None]:
    """A point that is being run: its file is locked, as by another process."""
    opened = lock(folder, name)
    assert opened is not None
    yield
    os.close(opened)


# --- points ---------------------------------------------------------------------------------------


def test_points_are_all_combinations_the_last_key_fastest_and_the_seeds_slowest(tmp_path: Path) -> None:
    points = sweep.read(write(tmp_path, grid=GRID, seeds=[7, 8]))
    names = [("topk", 0.5), ("topk", 0.25), ("sage", 0.5), ("sage", 0.25)]
    assert [point.overrides for point in points] == [
        [f"reducer.name={name}", f"reducer.density={density}", f"seed={seed}"]
        for seed in (7, 8)
        for name, density in names
    ]
    assert [point.index for point in points] == list(range(8))
    assert {point.config for point in points} == {BASE}


def test_a_seed_added_at_the_end_moves_no_index(tmp_path: Path) -> None:
    before = sweep.read(write(tmp_path, grid=GRID, seeds=[1, 2]))
    assert sweep.read(write(tmp_path, grid=GRID, seeds=[1, 2, 3]))[: len(before)] == before


def test_a_list_of_grids_is_their_points_one_after_the_other(tmp_path: Path) -> None:
    points = sweep.read(write(tmp_path, grid=[{"epochs": [1, 2]}, {"reducer.name": ["exact"]}]))
    assert [point.overrides[0] for point in points] == ["epochs=1", "epochs=2", "reducer.name=exact"]


def test_the_axis_base_varies_the_file_which_is_relative_to_the_sweeps(tmp_path: Path) -> None:
    (tmp_path / "sweeps").mkdir()
    path = write(tmp_path / "sweeps", base=None, grid={"base": ["../a.yaml", "../b.yaml"]})
    points = sweep.read(path)
    assert [point.config for point in points] == [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert [point.folder for point in points] == [Path("four/a,seed=1"), Path("four/b,seed=1")]


def test_seeds_alone_are_a_sweep(tmp_path: Path) -> None:
    assert [point.overrides for point in sweep.read(write(tmp_path))] == [["seed=1"]]


VALUES = [0.0001, 1e-12, "auto", None, True, [1.5, 2.0], {"name": "topk"}, "a/b c", "true", "ü"]


def test_an_override_gives_the_value_of_the_file_back(tmp_path: Path) -> None:
    points = sweep.read(write(tmp_path, grid={"x": VALUES}))
    texts = [point.overrides[0].removeprefix("x=") for point in points]
    assert [yamlfile.parse(text, "x") for text in texts] == VALUES


def test_a_points_folder_says_what_it_is_and_is_one_folder(tmp_path: Path) -> None:
    points = sweep.read(write(tmp_path, grid={"x": [*VALUES, "x" * 300, "x" * 301, "a_b_c"]}))
    folders = [point.folder for point in points]
    assert folders[0] == Path("four/digits,x=0.0001,seed=1")
    assert len(set(folders)) == len(folders)
    for folder in folders:
        assert (len(folder.parts), len(folder.name) <= sweep.LONGEST_NAME) == (2, True)
        assert folder.name.isascii()


def test_a_point_is_what_run_takes_on_its_command_line(tmp_path: Path) -> None:
    point = sweep.read(write(tmp_path, grid={"schedule.decay_epochs": [[1, 2]]}))[0]
    path, *overrides = shlex.split(str(point))
    assert (Path(path), overrides) == (point.config, point.overrides)
    assert run.LOAD_SETTINGS(Path(path), overrides).schedule.decay_epochs == (1, 2)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_point_of_every_file_in_configs_is_valid(path: Path) -> None:
    assert len(sweep.resolve(path, sweep.read(path), run.LOAD_SETTINGS)) >= 9


def test_each_table_of_the_paper_and_each_small_configuration_has_a_sweep() -> None:
    small = ["digits", "python_docs", "synthetic_ratings"]
    small += [path.stem for path in (ROOT / "configs").glob("*_small.yaml")]
    tables = {"accuracy", "density", "ablation", "initial_threshold", "powersgd_ranks"}
    budgets = {"budget_embedded", "budget_small"}
    assert {path.stem for path in SWEEPS} == tables | budgets | {f"reducers_{name}" for name in small}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"grid": {"epochs": 3}}, "grid: epochs: expected a list of values, one or more, got 3"),
        ({"grid": {"epochs": []}}, "grid: epochs: expected a list of values, one or more, got []"),
        ({"grid": 3}, "grid: expected a mapping of key.path to values, or a list of such, got 3"),
        ({"grid": {"seed": [1]}}, "grid: seed: expected the seeds under the key seeds, not in the grid"),
        ({"seeds": []}, "seeds: expected a list, each an integer in [0, inf), got []"),
        ({"seeds": [-1]}, "seeds: expected a list, each an integer in [0, inf), got -1"),
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
    ],
)
def test_a_sweep_with_a_bad_value_is_refused(tmp_path: Path, content: dict[str, Any], line: str) -> None:
    assert told(tmp_path, **content) == line


def test_a_sweep_without_a_base_is_refused(tmp_path: Path) -> None:
    assert told(tmp_path, base=None).endswith("base: expected the path of a configuration, got null")
    assert "cannot be read" in told(tmp_path, base="missing.yaml")


def test_a_points_bad_value_is_refused_with_its_index(tmp_path: Path) -> None:
    line = told(tmp_path, grid={"reducer.density": [0.5, 3]})
    assert line == f"{tmp_path}/four.yaml: point 1: reducer.density: expected a number in (0, 1], got 3"


@pytest.mark.parametrize(
    "content",
    [
        {"seeds": [1, 1]},
        {"grid": {"epochs": [15, 15]}},
        {"grid": [{"epochs": [15]}, {"log.every": [1]}]},  # what the base says: other words, the same run
    ],
)
def test_two_points_that_are_one_run_are_refused(tmp_path: Path, content: dict[str, Any]) -> None:
    assert "four.yaml: points 0 and 1 are the same run: " in told(tmp_path, **content)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--index", "0", str(BASE)], "--index: expected together with --sweep FILE"),
        (["--list", str(BASE)], "--list: expected together with --sweep FILE"),
        (["--jobs", "2", str(BASE)], "--jobs: expected together with --sweep FILE"),
        (["--sweep", "FILE", "--jobs", "2", "--index", "0"], "--jobs: with --sweep expected no --index and"),
        (
            ["--sweep", "FILE", "--jobs", "2", "--list"],
            "--jobs: with --sweep expected no --index and no --list",
        ),
        (["--sweep", "FILE", "--jobs", "0"], "argument --jobs: expected an integer in [1, inf), got '0'"),
        (["--sweep", "FILE", "--dry-run"], "--dry-run: with --sweep expected an --index too"),
        (
            ["--sweep", "FILE", "--index", "1.5"],
            "argument --index: expected an integer in [0, inf), got '1.5'",
        ),
        (["--sweep", "FILE", "--index", "1"], "--index: expected an integer in [0, 0], got 1"),
        (["--sweep", "FILE", "x.yaml"], "x.yaml: expected key.path=value; a sweep's file names its own"),
        (["--sweep", "FILE", "epochs=0"], "FILE: point 0: epochs: expected an integer in [1, inf), got 0"),
        (["--sweep", "FILE", "task.batch_per_worker=2000"], "task.batch_per_worker: expected at most "),
        (["--sweep", "missing.yaml"], "missing.yaml: cannot be read"),
    ],
)
def test_bad_arguments_of_a_sweep_are_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("something was started"))
    file = str(write(tmp_path))
    words = [file if word == "FILE" else word for word in arguments]
    assert exit_code(*words, "--runs", str(tmp_path)) == 2
    said = capsys.readouterr()
    assert (said.out, len(said.err.splitlines())) == ("", 1)
    assert said.err.startswith(f"run.py: {line.replace('FILE:', f'{file}:')}")


def test_all_points_in_turn_are_refused_under_a_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert exit_code("--sweep", str(write(tmp_path)), "--runs", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("run.py: --sweep: expected an --index too under a launcher")


# --- what is done ---------------------------------------------------------------------------------


def test_a_run_is_a_finished_point_if_its_settings_are_equal_and_it_has_a_summary(tmp_path: Path) -> None:
    settings = run.LOAD_SETTINGS(BASE, ["epochs=2"])
    assert sweep.finished_run(tmp_path, settings, run.LOAD_SETTINGS) is None
    finish(tmp_path / "other", run.LOAD_SETTINGS(BASE, ["epochs=3"]))
    (finish(tmp_path / "cut", settings) / "summary.json").unlink()
    (finish(tmp_path / "broken", settings) / "config.yaml").write_text("{a: ")
    assert sweep.finished_run(tmp_path, settings, run.LOAD_SETTINGS) is None
    for i, name in enumerate(("old", "new")):
        os.utime(finish(tmp_path / name, settings) / "summary.json", (i, i))
    assert sweep.finished_run(tmp_path, settings, run.LOAD_SETTINGS) == tmp_path / "new"


def test_the_list_tells_index_state_and_what_the_point_is(tmp_path: Path, capsys: Capture) -> None:
    path = write(tmp_path, grid={"epochs": [1, 2, 3]})
    _, done, running = sweep.read(path)
    finish(tmp_path / done.folder / "run", run.LOAD_SETTINGS(done.config, done.overrides))
    with locked(tmp_path / running.folder):
        assert exit_code("--sweep", str(path), "--list", "--runs", str(tmp_path)) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["index", "state", "point"]
    assert [line.split(maxsplit=2) for line in lines] == [
        ["0", "waiting", f"{BASE} epochs=1 seed=1"],
        ["1", "done", f"{BASE} epochs=2 seed=1"],
        ["2", "running", f"{BASE} epochs=3 seed=1"],
    ]


# --- what runs ------------------------------------------------------------------------------------


def test_one_point_is_the_run_of_its_configuration_and_is_skipped_when_done(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"epochs": [1], "reducer.density": [0.5, 0.25]})
    runs = tmp_path / "runs"
    command = [sys.executable, "run.py", "--sweep", str(path), "--index", "1", "--workers", "2"]
    command += ["--runs", str(runs), "log.tensorboard=false"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    (summary,) = runs.glob("four/digits,epochs=1,reducer.density=0.25,seed=1/*/summary.json")
    assert json.loads(summary.read_text())["density"]["target"] == 0.25
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stdout) == (0, f"{summary.parent}: done already\n")
    assert len(list(runs.rglob("config.yaml"))) == 1


def run_points(path: Path, runs: Path, command: list[str], *more: str) -> int:
    """All points, each by `python COMMAND ... --index I` in place of run.py; more: options of the sweep."""
    options = cli.parse(["--sweep", str(path), "--runs", str(runs), *more])
    return cli.run_sweep(options, run.LOAD_SETTINGS, lambda settings: None, command)


NOTE = "import sys; print(*sys.argv[1:], file=open('{log}', 'a')); sys.exit(sys.argv[-1] == '1')"


def test_all_points_run_in_turn_but_the_finished_and_a_failed_one_stops_none(
    tmp_path: Path, capsys: Capture
) -> None:
    path, log = write(tmp_path, grid={"epochs": [1, 2, 3, 4]}), tmp_path / "log"
    done = sweep.read(path)[2]
    finish(tmp_path / done.folder / "run", run.LOAD_SETTINGS(done.config, done.overrides))
    assert run_points(path, tmp_path, ["-c", NOTE.format(log=log), "--sweep"]) == 1
    assert log.read_text().splitlines() == [f"--sweep --index {i}" for i in (0, 1, 3)]
    said = capsys.readouterr()
    assert said.err == "run.py: 1 of 4 points failed: 1\n"
    *lines, last = said.out.splitlines()
    assert [line.endswith("is done") for line in lines] == [False, False, True, False]
    assert last == "2 of 4 points were stopped and are not done: 0, 3"  # they left no summary


def test_a_point_whose_folder_cannot_be_made_fails_and_stops_none(tmp_path: Path, capsys: Capture) -> None:
    path, log = write(tmp_path, grid={"epochs": [1, 2, 3]}), tmp_path / "log"
    folder = tmp_path / sweep.read(path)[0].folder
    folder.parent.mkdir()
    folder.write_text("")
    assert run_points(path, tmp_path, ["-c", NOTE.format(log=log)]) == 1
    assert log.read_text().splitlines() == ["--index 1", "--index 2"]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("run.py: point 0: ")
    assert str(folder) in first
    assert last == "run.py: 2 of 3 points failed: 0, 1"


def test_what_a_point_needs_is_checked_before_the_first_starts_but_not_of_a_finished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_: pytest.fail("something was started"))
    cifar = str(ROOT / "configs" / "cifar10_small.yaml")
    path = write(tmp_path, grid={"base": [str(BASE), cifar]})
    words = ["--sweep", str(path), "--runs", str(tmp_path), "--data", str(tmp_path)]
    assert exit_code(*words) == 2
    assert capsys.readouterr().err.startswith(
        f"run.py: {tmp_path}/cifar10/cifar10.npz: there is no such file"
    )
    for point in sweep.read(path):
        finish(tmp_path / point.folder / "run", run.LOAD_SETTINGS(point.config, point.overrides))
    assert exit_code(*words) == 0
    (tmp_path / "file").write_text("")
    assert exit_code(*words[:2], "--runs", str(tmp_path / "file")) == 2
    assert capsys.readouterr().err.startswith(f"run.py: --runs {tmp_path / 'file'}: expected ")


# --- what is being run ----------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sage.locks.SECONDS", 0.1)


def test_a_point_has_one_holder_who_is_named(tmp_path: Path, impatient: None) -> None:
    folder = tmp_path / "point"
    assert holder(folder) == ""
    assert not folder.exists()
    for name in (RUN_LOCK, SWEEP_LOCK):
        with locked(folder, name):
            assert lock(folder, name) is None
            assert f"process {os.getpid()} on " in holder(folder)
        assert holder(folder) == ""


def test_one_who_asks_for_the_holder_keeps_nobody_from_locking(tmp_path: Path) -> None:
    asking = os.open(tmp_path / RUN_LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(asking, fcntl.LOCK_SH)
    assert holder(tmp_path) == ""
    timer = threading.Timer(0.2, os.close, [asking])
    timer.start()
    with locked(tmp_path):
        timer.join()


def test_a_killed_process_holds_no_point(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from sage.sweep import RUN_LOCK, lock
opened = lock(Path({str(tmp_path)!r}), RUN_LOCK)
print(opened, flush=True)
time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() != b"None\n"
    assert f"process {process.pid} on " in holder(tmp_path)
    process.kill()
    process.communicate()
    assert holder(tmp_path) == ""


def test_where_the_file_system_has_no_locks_nobody_is_kept_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(opened: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path), locked(tmp_path):
        assert holder(tmp_path) == ""


def test_the_index_of_a_point_that_is_being_run_is_refused_but_may_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("something was built"))
    path = write(tmp_path)
    words = ["--sweep", str(path), "--index", "0", "--runs", str(tmp_path)]
    with locked(tmp_path / sweep.read(path)[0].folder):
        for more in ([], ["--workers", "2"]):
            assert exit_code(*words, *more) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"run.py: --index 0: process {os.getpid()} on ")
        assert exit_code(*words, "--print-config") == 0


def test_a_process_that_is_late_by_a_moment_does_not_run_the_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, impatient: None
) -> None:
    """The other one locked it after this one's command line was checked."""
    path = write(tmp_path)
    folder = tmp_path / sweep.read(path)[0].folder
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("something was built"))
    monkeypatch.setattr(cli, "choose_point", lambda options: sweep.read(path)[0])
    with locked(folder):
        assert run.main(["--sweep", str(path), "--index", "0", "--runs", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"run.py: rank 0: another process runs this point: process {os.getpid()} on ")
    assert not list(folder.glob("*/"))


@pytest.mark.parametrize("name", [RUN_LOCK, SWEEP_LOCK])
def test_a_sweep_skips_what_is_being_run_and_says_at_its_end_what_still_is(
    tmp_path: Path, capsys: Capture, impatient: None, name: str
) -> None:
    path, log = write(tmp_path, grid={"epochs": [2, 3, 4]}), tmp_path / "log"
    with locked(tmp_path / sweep.read(path)[0].folder, name):
        assert run_points(path, tmp_path, ["-c", NOTE.format(log=log)]) == 1
    assert log.read_text().splitlines() == ["--index 1", "--index 2"]
    said = capsys.readouterr()
    assert said.err == "run.py: 1 of 3 points failed: 1\n"
    first, *lines = said.out.splitlines()
    assert first.startswith(f"point 0 of 3: {BASE} epochs=2 seed=1 is skipped: process {os.getpid()} on ")
    assert lines == [
        f"point 1 of 3: {BASE} epochs=3 seed=1",
        f"point 2 of 3: {BASE} epochs=4 seed=1",
        "1 of 3 points are being run by other processes: 0",
        "1 of 3 points were stopped and are not done: 2",  # it left no summary
    ]


def test_a_skipped_point_that_nobody_finished_is_run_in_the_end(tmp_path: Path, impatient: None) -> None:
    """As where the process that ran it was killed; one that was finished is not run again."""
    path, log = write(tmp_path, grid={"epochs": [1, 2, 3]}), tmp_path / "log"
    killed, finished, _ = sweep.read(path)
    locks = [lock(tmp_path / point.folder, RUN_LOCK) for point in (killed, finished)]

    def end_the_others() -> None:
        while not log.exists():
            time.sleep(0.01)
        finish(tmp_path / finished.folder / "run", run.LOAD_SETTINGS(finished.config, finished.overrides))
        for opened in locks:
            os.close(opened)

    thread = threading.Thread(target=end_the_others)
    thread.start()
    wait = f"import sys, time; print(sys.argv[2], file=open({str(log)!r}, 'a'), flush=True); time.sleep(1)"
    assert run_points(path, tmp_path, ["-c", wait]) == 0
    thread.join()
    assert log.read_text().split() == ["2", "0"]


def test_a_point_whose_process_lost_the_race_for_it_is_not_a_failure(
    tmp_path: Path, capsys: Capture, impatient: None
) -> None:
    path = write(tmp_path)
    opened: list[int | None] = []
    # The process of the point ends as the late one does; meanwhile the other one has its lock.
    code = f"import sys, time; open({str(tmp_path / 'started')!r}, 'w'); time.sleep(1); sys.exit(1)"

    def take() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        opened.append(lock(tmp_path / sweep.read(path)[0].folder, RUN_LOCK))

    thread = threading.Thread(target=take)
    thread.start()
    assert run_points(path, tmp_path, ["-c", code]) == 0
    thread.join()
    assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 points are being run by other processes: 0"
    assert opened[0] is not None
    os.close(opened[0])


TINY = ["--threads", "1", "log.tensorboard=false", "reducer.name=exact"]
SECONDS = 600
"""The most that a few processes may take on a busy machine, of which each needs seconds to start."""


def words_of(path: Path, runs: Path, *more: str) -> list[str]:
    """A sweep's command line."""
    return ["--sweep", str(path), "--runs", str(runs), *TINY, *more]


@contextmanager
def started(path: Path, runs: Path, *more: str) -> Iterator[subprocess.Popen]:
    """A sweep in a process of its own; what still runs at the end is killed, with its points' processes."""
    words = [sys.executable, "run.py", *words_of(path, runs, *more)]
    process = subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        for point in sweep.read(path):
            kill_holder(runs / point.folder)
        process.communicate()


def kill_holder(folder: Path) -> None:
    """Kill the process that runs a point, if there is one."""
    if who := holder(folder, [RUN_LOCK]):
        os.kill(int(who.split()[1]), signal.SIGKILL)
        wait_until(lambda: holder(folder, [RUN_LOCK]) == "")


def test_two_sweeps_of_one_file_at_once_run_every_point_once(tmp_path: Path) -> None:
    path, runs = write(tmp_path, grid={"epochs": [1]}, seeds=[1, 2, 3]), tmp_path / "runs"
    with started(path, runs) as one, started(path, runs) as other:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in (one, other)]
        assert [process.returncode for process in (one, other)] == [0, 0], outputs
    assert len(list(runs.glob("four/*/*/summary.json"))) == 3
    assert len(list(runs.glob("four/*/*/config.yaml"))) == 3
    assert "is skipped: process " in "".join(outputs)


def test_a_point_of_a_killed_sweep_is_free_when_its_process_is_dead_too(
    tmp_path: Path, capsys: Capture
) -> None:
    path, runs = write(tmp_path), tmp_path / "runs"
    folder = runs / sweep.read(path)[0].folder
    with started(path, runs, "epochs=100000") as first:
        wait_until(lambda: list(folder.glob("*/metrics.jsonl")) != [])
        first.kill()
        first.wait()
        who = holder(folder)  # the point's process lives on, and keeps it
        assert who.startswith("process ")
        assert run.main(words_of(path, runs, "epochs=1")) == 0
        assert f"is skipped: {who} runs it" in capsys.readouterr().out
        kill_holder(folder)
    assert run.main(words_of(path, runs, "epochs=1")) == 0
    assert len(list(folder.glob("*/summary.json"))) == 1


def wait_until(holds: Callable[[], bool], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold in time"
        time.sleep(0.05)


def test_help_comes_before_the_imports_that_take_seconds() -> None:
    code = """
import runpy, sys
sys.argv = ["run.py", "--help"]
try:
    runpy.run_path("run.py", run_name="__main__")
except SystemExit as left:
    sys.exit(left.code or "torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--sweep FILE" in done.stdout

"""A sweep's points side by side: shares of the machine, output, signals, the same bits as in turn."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run
from sage import sweep
from sage.workers import shares
from sage.workers.points import LOG
from tests.test_simulate import assert_same_run, restored
from tests.test_sweep import ROOT, SECONDS, Capture, finish, run_points, started, wait_until, words_of, write

__all__ = ["restored"]  # a fixture that every test here gets


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_jobs", "items", "parts"),
    [
        (1, [0, 1, 2], [[0, 1, 2]]),
        (2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
        (3, [4, 5, 6, 7, 9], [[4], [5, 6], [7, 9]]),
        (4, [2, 3], [[2], [3], [2], [3]]),
        (3, [7], [[7], [7], [7]]),
        (2, [], [[], []]),
    ],
)
def test_each_job_has_a_part_of_its_own_or_one_item_where_there_are_too_few(
    num_jobs: int, items: list[int], parts: list[list[int]]
) -> None:
    gpus = [f"GPU-{item}" for item in items]
    for slot, part in enumerate(parts):
        assert shares.share(slot, num_jobs, items, []) == (part, [])
        assert shares.share(slot, num_jobs, [], gpus) == ([], [f"GPU-{item}" for item in part])


@pytest.mark.parametrize("num_jobs", range(1, 9))
@pytest.mark.parametrize("num_items", range(8, 12))
def test_the_parts_are_the_whole_and_about_equal(num_jobs: int, num_items: int) -> None:
    parts = [shares.share(slot, num_jobs, range(num_items), [])[0] for slot in range(num_jobs)]
    assert [item for part in parts for item in part] == list(range(num_items))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("visible", "count", "names"),
    [
        (None, 3, ["0", "1", "2"]),
        (None, 0, []),
        ("", 0, []),
        ("2,0", 2, ["2", "0"]),
        ("GPU-8a, GPU-9b", 2, ["GPU-8a", "GPU-9b"]),
        ("0,1,99", 2, ["0", "1"]),  # there is no 99
        ("MIG-a,MIG-b", 1, ["MIG-a", "MIG-b"]),
        ("MIG-a,MIG-b", 0, []),
    ],
)
def test_gpus_are_named_as_the_user_names_them(visible: str | None, count: int, names: list[str]) -> None:
    assert shares.name_gpus(visible, count) == names


def test_without_gpus_of_its_own_a_process_has_the_environment_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert shares.environment([]) == dict(os.environ)
    assert shares.environment(["1", "2"]) == dict(os.environ) | {"CUDA_VISIBLE_DEVICES": "1,2"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"


# --- stand-ins for the points' processes ----------------------------------------------------------

TELL = """
import os, sys, time
from pathlib import Path
index = sys.argv[-1]
told = *sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES")
print(*told, file=open("{log}" + index, "w"))
while not Path("{log}" + str(1 - int(index))).exists():  # the other one runs, too
    time.sleep(0.01)
"""


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)


def test_points_run_side_by_side_each_on_its_share(tmp_path: Path, four_gpus: None) -> None:
    path, log = write(tmp_path, grid={"epochs": [1, 2]}), tmp_path / "log"
    assert run_points(path, tmp_path, ["-c", TELL.format(log=log), "--jobs", "2"], "--jobs", "2") == 0
    cpus = shares.own_cpus()
    for slot, gpus in enumerate(["0,1", "2,3"]):
        mine = shares.share(slot, 2, cpus, [])[0]
        assert Path(f"{log}{slot}").read_text().split() == [*map(str, mine), gpus]
    assert shares.own_cpus() == cpus  # this process has them all, as before


def test_with_threads_given_cores_are_not_divided(tmp_path: Path, four_gpus: None) -> None:
    path, log = write(tmp_path, grid={"epochs": [1, 2]}), tmp_path / "log"
    assert run_points(path, tmp_path, ["-c", TELL.format(log=log)], "--jobs", "2", "--threads", "1") == 0
    for slot, gpus in enumerate(["0,1", "2,3"]):
        assert Path(f"{log}{slot}").read_text().split() == [*map(str, shares.own_cpus()), gpus]


def test_what_is_left_divides_the_machine(tmp_path: Path, four_gpus: None) -> None:
    """Two jobs, but one point: it has all cores and GPUs."""
    path, log = write(tmp_path, grid={"epochs": [1, 2]}), tmp_path / "log"
    done = sweep.read(path)[1]
    finish(tmp_path / done.folder / "run", run.LOAD_SETTINGS(done.config, done.overrides))
    Path(f"{log}1").touch()
    assert run_points(path, tmp_path, ["-c", TELL.format(log=log)], "--jobs", "2") == 0
    assert Path(f"{log}0").read_text().split() == [*map(str, shares.own_cpus()), "None"]


FAIL = """
import sys
print("run.py: of an earlier process" if sys.argv[-1] == "0" else "fine")
if sys.argv[-1] == "1":
    print("run.py: the disk is full", file=sys.stderr)
    print("worker 0 was the first to give up")
    sys.exit(3)
"""


def test_the_terminal_has_a_points_start_and_end_and_its_log_the_rest(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write(tmp_path, grid={"epochs": [1, 2]})
    folders = [tmp_path / point.folder for point in sweep.read(path)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / LOG).write_text("run.py: of an earlier process\n")
    assert run_points(path, tmp_path, ["-c", FAIL], "--jobs", "2") == 1
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"run.py: point 1: the disk is full (see {folders[1] / LOG})",
        "run.py: 1 of 2 points failed: 1",
    ]
    lines = said.out.splitlines()
    names = [f"point {index} of 2: {BASE_AND_SEED.format(index + 1)}" for index in range(2)]
    assert lines[:2] == names
    assert lines[4:] == ["1 of 2 points were stopped and are not done: 0"]  # it left no summary
    ends = sorted(lines[2:4])
    for index, code in enumerate((0, 3)):
        assert ends[index].startswith(f"point {index} of 2: ended with exit code {code} after ")
        assert ends[index].endswith(f" s: {folders[index]}")
    assert (folders[1] / LOG).read_text().splitlines() == [
        "run.py: of an earlier process",
        "fine",
        "run.py: the disk is full",
        "worker 0 was the first to give up",
    ]


BASE_AND_SEED = f"{ROOT / 'configs' / 'digits.yaml'} epochs={{}} seed=1"

LISTEN = """
import sys, time
from sage.workers.signals import WATCH
WATCH.listen()
with WATCH.deferred(), open({log!r}, "a", buffering=1) as log:
    log.write("started\\n")
    while WATCH.received is None:
        time.sleep(0.01)
    log.write(f"signal {{int(WATCH.received)}}\\n")
    time.sleep({seconds})
    log.write(f"{{WATCH._num_interrupts}} interrupts\\n")
    sys.exit(5)
"""


def listening(tmp_path: Path, num_jobs: int, seconds: float) -> tuple[subprocess.Popen, Path]:
    """A sweep of three points whose processes, so many at once, wait for a signal and end so much later."""
    path, log = write(tmp_path, grid={"epochs": [1, 2, 3]}), tmp_path / "log"
    child = LISTEN.format(log=str(log), seconds=seconds)
    words = [sys.executable, "-m", "tests.sweep_parent", str(path), str(tmp_path), child, str(num_jobs)]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_until(lambda: log.exists() and log.read_text() == "started\n" * num_jobs)
    return process, log


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_a_signal_reaches_every_point_that_runs_once_and_ends_the_sweep(
    tmp_path: Path, num_jobs: int
) -> None:
    process, log = listening(tmp_path, num_jobs, seconds=1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does on Ctrl-C
    assert process.wait(SECONDS) == 128 + signal.SIGINT
    told = [word for word in ("started", f"signal {signal.SIGINT}", "1 interrupts") for _ in range(num_jobs)]
    assert log.read_text().splitlines() == told


def test_a_second_ctrl_c_ends_all_at_once(tmp_path: Path) -> None:
    process, log = listening(tmp_path, 2, seconds=600)
    os.killpg(process.pid, signal.SIGINT)
    wait_until(lambda: log.read_text().count("signal") == 2)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(SECONDS) == 128 + signal.SIGINT
    assert "interrupts" not in log.read_text()


# --- run.py itself --------------------------------------------------------------------------------


def test_points_side_by_side_have_the_bits_of_points_one_after_the_other(
    tmp_path: Path, capsys: Capture
) -> None:
    path = write(tmp_path, grid={"epochs": [1], "task.batch_per_worker": [64, 128]}, seeds=[1, 2])
    assert run.main(words_of(path, tmp_path / "jobs", "--jobs", "2")) == 0
    assert capsys.readouterr().out.count("ended with exit code 0 after ") == 4
    for point in sweep.read(path):
        assert run.main(words_of(path, tmp_path / "one", "--index", str(point.index))) == 0
        (one,), (other,) = ((tmp_path / name / point.folder).glob("*/") for name in ("one", "jobs"))
        assert (other / "summary.json").exists()
        assert_same_run(one, other)


def test_points_that_a_signal_ended_side_by_side_are_resumed(tmp_path: Path) -> None:
    path, runs = write(tmp_path, grid={"epochs": [100000]}, seeds=[1, 2]), tmp_path / "runs"
    folders = [runs / point.folder for point in sweep.read(path)]
    with started(path, runs, "--jobs", "2") as process:
        wait_until(lambda: all(has_trained(folder) for folder in folders))
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=SECONDS)
        assert process.returncode == 128 + signal.SIGINT, output
    assert not any(sweep.holder(folder) for folder in folders)
    assert not list(runs.rglob("summary.json"))
    # A score that every epoch reaches: the runs end with the one that they were in.
    assert run.main(words_of(path, runs, "stop_at_score=0.01", "--jobs", "2", "--resume")) == 0
    for folder in folders:
        (found,) = folder.glob("*/")
        assert (found / "summary.json").exists()


def has_trained(folder: Path) -> bool:
    """Whether a run there has written a few steps."""
    return any(metrics.stat().st_size > 1000 for metrics in folder.glob("*/metrics.jsonl"))


def test_help_explains_jobs() -> None:
    words = [sys.executable, "run.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert "--jobs N" in done.stdout
    assert LOG in done.stdout

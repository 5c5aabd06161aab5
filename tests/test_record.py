"""What a run writes besides metrics.jsonl: TensorBoard's files, and a fake of Weights & Biases."""

import importlib
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import run
from sage.runfolder import record
from sage.runfolder.record import Log, Recorder
from tests.test_checkpoint import CONFIG, error_line

Capture = pytest.CaptureFixture[str]


def step_line(step: int, loss: float) -> dict[str, Any]:
    return {"kind": "step", "epoch": 0, "step": step, "loss": loss, "seconds": {"data": 0.5}}


def recorded(folder: Path, log: Log, losses: dict[int, float], first_step: int = 0) -> None:
    with Recorder(folder, 10, log, first_step) as recorder:
        for step, loss in losses.items():
            recorder.write(step_line(step, loss))


# --- TensorBoard ----------------------------------------------------------------------------------


def scalars_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_a_line_reaches_tensorboard_whole_and_at_once(tmp_path: Path) -> None:
    with Recorder(tmp_path, 10, Log()) as recorder:
        recorder.write(step_line(3, 0.25))
        events = scalars_of(tmp_path)  # while the run goes on: a process that dies loses nothing
        assert set(events.Tags()["scalars"]) == {"step/epoch", "step/step", "step/loss", "step/seconds/data"}
        assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [(3, 0.25)]


def test_what_a_run_logged_after_its_checkpoint_is_gone_from_tensorboard_when_it_is_resumed(
    tmp_path: Path,
) -> None:
    recorded(tmp_path, Log(), {0: 1.0, 1: 2.0, 2: 3.0, 3: 4.0, 4: 5.0})
    recorded(tmp_path, Log(), {2: 3.0, 3: 14.0}, first_step=2)
    logged = [(event.step, event.value) for event in scalars_of(tmp_path).Scalars("step/loss")]
    assert sorted(set(logged)) == [(0, 1.0), (1, 2.0), (2, 3.0), (3, 14.0)]


def test_without_the_package_a_run_says_so_and_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(record, "find_spec", lambda name: None)
    recorded(tmp_path, Log(), {0: 1.0})
    assert "the package tensorboard is not installed" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_a_place_that_cannot_take_numbers_gets_no_more_and_the_record_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def log(self: Any, values: Any, step: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record._TensorBoard, "log", log)
    recorded(tmp_path, Log(), {0: 1.0, 1: 2.0})
    said = capsys.readouterr().out
    assert said == "TensorBoard: No space left on device; it gets no more numbers\n"
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# --- Weights & Biases -----------------------------------------------------------------------------


class FakeWandb(ModuleType):
    """Remembers what it was asked, and fails where it is told to."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.failures: dict[str, str] = {}

    def login(self) -> bool:
        self._fail("login")
        return True

    def init(self, **given: Any) -> "FakeWandb":
        self._fail("init")
        self.opened.append(given)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self._fail("log")
        self.logged.append((step, values))

    def finish(self) -> None:
        self._fail("finish")

    def _fail(self, name: str) -> None:
        if name in self.failures:
            raise RuntimeError(f"{self.failures[name]}\nand a second line")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    importlib.invalidate_caches()
    return fake


def test_a_resumed_run_goes_on_in_the_same_run_there_whatever_its_folder_is_called(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    log, first = Log(tensorboard=False, wandb="project"), tmp_path / "first"
    first.mkdir()
    recorded(first, log, {0: 1.0, 1: 2.0})
    recorded(first.rename(tmp_path / "second"), log, {2: 3.0}, first_step=2)
    assert [(given["project"], given["id"], given["resume"]) for given in wandb.opened] == [
        ("project", "first", "allow")
    ] * 2
    assert [(step, values["step/loss"]) for step, values in wandb.logged] == [(0, 1.0), (1, 2.0), (2, 3.0)]


def test_its_errors_end_no_run(tmp_path: Path, wandb: FakeWandb, capsys: Capture) -> None:
    wandb.failures = {"log": "the network is down", "finish": "the network is down"}
    recorded(tmp_path, Log(tensorboard=False, wandb="project"), {0: 1.0, 1: 2.0})
    assert capsys.readouterr().out == "Weights & Biases: the network is down; it gets no more numbers\n"


def test_without_a_login_no_worker_starts(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    wandb.failures = {"login": "api_key not configured"}
    monkeypatch.setattr("sage.workers.launch.spawn", lambda *_: pytest.fail("workers were started"))
    words = ["log.wandb=project", "--runs", str(tmp_path)]
    for workers in ([], ["--workers", "2"]):
        assert run.main([*CONFIG, *words, *workers]) == 2
        assert error_line(capsys) == "run.py: log.wandb: api_key not configured"
    assert not list(tmp_path.rglob("*"))


def test_a_run_that_cannot_be_opened_there_ends_on_all_workers_in_one_line(
    tmp_path: Path, wandb: FakeWandb, capsys: Capture
) -> None:
    wandb.failures = {"init": "no such project"}
    words = ["log.wandb=project", "--runs", str(tmp_path), "--simulate", "2"]
    assert run.main([*CONFIG, *words]) == 1
    assert error_line(capsys) == "run.py: rank 0: log.wandb: project: no such project"
    (folder,) = tmp_path.glob("digits/*/")
    assert not (folder / "summary.json").exists()
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 2

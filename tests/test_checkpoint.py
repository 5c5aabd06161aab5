"""Checkpoints as files: written whole or not at all, refused where they are damaged, never run as code."""

import hashlib
import json
import os
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from sage.files import LineFile
from sage.interfaces import CommunicationError, Place, Stopped, TrainingError
from sage.runfolder import checkpoint, manifest
from sage.runfolder.checkpoint import Checkpoints, CheckpointWriter, check_readable, read_state, write_state
from sage.runfolder.folder import lock
from sage.runfolder.record import Log, Recorder, cut_back
from sage.runfolder.resume import NEWEST
from sage.training import agree
from sage.training.agree import Request
from sage.workers.store import RendezvousStore
from tests.test_launch import PATIENCE_SECONDS, free_port, start

CONFIG = ["configs/digits.yaml", "epochs=2", "task.batch_per_worker=128", "log.tensorboard=false"]
Capture = pytest.CaptureFixture[str]
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: one run of digits, stopped in its second epoch, with two checkpoints."""
    runs, calls = tmp_path_factory.mktemp("stopped"), []

    def ask() -> Request:
        calls.append(None)
        return Request.STOP if len(calls) >= 15 else Request.NOTHING  # 11 steps an epoch, and its end

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agree, "requested_by_signal", ask)
        assert run.main([*CONFIG, "--runs", str(runs)]) == 0
    steps = [path.parent.name for path in manifest.manifests(only_run(runs))]
    assert steps == ["step-00000014", "step-00000011"]
    return runs


@pytest.fixture
def runs(stopped: Path, tmp_path: Path) -> Path:
    """A copy of that folder, which a test may damage."""
    shutil.copytree(stopped, tmp_path / "runs")
    return tmp_path / "runs"


def only_run(runs: Path) -> Path:
    (folder,) = runs.glob("digits/*/")
    return folder


def resume(runs: Path, *words: str, path: str | Path = NEWEST) -> int:
    return run.main([*CONFIG, *words, "--runs", str(runs), "--resume", *([str(path)] if path else [])])


def error_line(capsys: Capture) -> str:
    """The one line on stderr."""
    (line,) = capsys.readouterr().err.splitlines()
    return line


def steps_of(folder: Path) -> list[int]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if line["kind"] == "step"]


# --- resumed --------------------------------------------------------------------------------------


def test_a_stopped_run_is_marked_and_resumes_in_its_folder_until_it_is_done(
    runs: Path, capsys: Capture
) -> None:
    folder = only_run(runs)
    assert (folder / "requeue").exists()
    assert not (folder / "summary.json").exists()
    assert resume(runs) == 0
    assert "resumed after epoch 1, step 14" in capsys.readouterr().out
    summary = json.loads((only_run(runs) / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (22, 2)
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"final.pt"}
    assert not (folder / "requeue").exists()
    (entry,) = json.loads((folder / "environment.json").read_text())["resumed"]
    assert entry["step"] == 14
    assert resume(runs) == 0
    assert capsys.readouterr().out.endswith("done already\n")


def test_a_runs_folder_is_enough_to_resume_it(runs: Path) -> None:
    folder = only_run(runs)
    assert run.main(["--resume", str(folder), "epochs=1", "--runs", str(runs)]) == 0
    assert (
        json.loads((folder / "summary.json").read_text())["steps"] == 14
    )  # stopped in epoch 2, it trains no more


def test_from_an_older_checkpoint_later_lines_are_removed_and_written_again(runs: Path) -> None:
    folder = only_run(runs)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ep')  # an incomplete last line
    before = steps_of_whole(folder)
    assert max(before) > 11
    assert resume(runs, path=folder / "checkpoints" / "step-00000011") == 0
    assert steps_of(folder) == sorted(set(steps_of(folder)))
    assert steps_of(folder)[: len(before)] == before


def steps_of_whole(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    return [json.loads(line)["step"] for line in lines if '"kind": "step"' in line]


def test_settings_that_change_no_step_may_differ_when_a_run_is_resumed(runs: Path) -> None:
    words = ["epochs=3", "timeout_seconds=7", "log.every=4", "checkpoint.keep=1", "on_nonfinite=skip"]
    assert resume(runs, *words) == 0
    assert json.loads((only_run(runs) / "summary.json").read_text())["epochs"] == 3


def test_a_run_that_a_process_trains_cannot_be_resumed_by_another(runs: Path, capsys: Capture) -> None:
    folder = only_run(runs)
    with lock(folder):
        before = contents(runs)
        assert resume(runs) == 2
        assert contents(runs) == before
    who = f"process {os.getpid()} on {socket.gethostname()}"
    assert error_line(capsys) == f"run.py: {folder}: {who} is training this run"
    assert resume(runs) == 0


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["epochs=3", "reducer.density=0.5", "stop_at_score=0.99"])
def test_a_run_that_is_done_cannot_be_resumed_with_other_settings(
    change: str, runs: Path, capsys: Capture
) -> None:
    assert resume(runs) == 0
    assert resume(runs, "timeout_seconds=9", path=only_run(runs)) == 0  # changes no step
    assert resume(runs, change, path=only_run(runs)) == 2
    line = error_line(capsys)
    assert f"--resume: {only_run(runs)} is done, and cannot be resumed with other settings: " in line
    assert f"{change.split('=')[0]} is " in line
    assert resume(runs, change) == 2


def test_a_state_that_does_not_fit_is_refused_before_anything_is_changed(runs: Path, capsys: Capture) -> None:
    """The state of another version of a reducer, say: it is found only when the parts are built."""
    folder = only_run(runs) / "checkpoints" / "step-00000011"
    state = read_state(manifest.read(folder), manifest.worker_file(0))
    del state["parts"]["exchange"]["buckets"][0]["reducer"]["law"]
    facts = write_state(folder / "rank0.pt", state)
    change(folder, lambda content: {**content, "files": content["files"] | {"rank0.pt": facts.model_dump()}})
    before = contents(runs)
    assert resume(runs, path=folder) == 1
    assert re.search(
        r"expected the state of this program's parts, got another \('law'\)$", error_line(capsys)
    )
    assert contents(runs) == before


def test_another_configurations_checkpoint_is_refused_with_all_that_differs(
    runs: Path, capsys: Capture
) -> None:
    words = ["reducer.density=0.02", "optimizer.lr=0.5"]
    assert resume(runs, *words, path=only_run(runs)) == 2
    line, *differences = capsys.readouterr().err.splitlines()
    assert line.endswith("expected this configuration's run, got another:")
    assert differences[0] == "run.py:   reducer.density is 0.01 there and 0.02 here"
    assert re.fullmatch(r"run\.py:   optimizer\.lr is .* there and 0\.5 here", differences[1])
    assert resume(runs, words[0]) == 2
    assert f"{only_run(runs)} is another configuration's: reducer.density is 0.01 there" in error_line(capsys)


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path: Path, capsys: Capture) -> None:
    assert resume(tmp_path) == 2
    place = tmp_path / "digits"
    assert (
        error_line(capsys)
        == f"run.py: --resume: expected a run with a whole checkpoint in {place}, found none"
    )
    (tmp_path / "empty").mkdir()
    assert resume(tmp_path, path=tmp_path / "empty") == 2
    assert "expected a run's folder with a whole checkpoint, found none in " in error_line(capsys)


def test_a_path_that_is_not_a_folder_is_refused(tmp_path: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        run.main(["--resume", "configs/digits.yaml", "--runs", str(tmp_path)])
    assert left.value.code == 2
    line = error_line(capsys)
    assert "--resume configs/digits.yaml: expected a run's folder, or one of its checkpoints" in line
    assert "CONFIG and key.path=value go before it" in line


def test_another_number_of_workers_is_refused_with_the_reason(runs: Path, capsys: Capture) -> None:
    assert resume(runs, "--workers", "2") == 2
    line = error_line(capsys)
    assert "expected as many workers as made it, 1, got 2: " in line
    assert "resume.world_size=reshard" in line


def other_format(folder: Path) -> None:
    change(folder, lambda content: {**content, "format": 7})


def change(folder: Path, of: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a manifest, as somebody does who also mends its checksum."""
    path = folder / manifest.NAME
    content = of(json.loads(path.read_text()))
    path.write_text(json.dumps(content | {"checksum": manifest.checksum_of(content)}))


def flip(folder: Path, old: bytes, new: bytes) -> None:
    """Replaces a part of a manifest, as a damaged disk does."""
    path = folder / manifest.NAME
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def with_file(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Adds a file to a manifest's list."""
    facts = {"bytes": 1, "sha256": "0" * 64}
    return lambda content: {**content, "files": content["files"] | {name: facts}}


def alter(folder: Path) -> None:
    """Flips one bit in the middle of a file."""
    content = bytearray((folder / "shared.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "shared.pt").write_bytes(content)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "another version": (other_format, r"manifest\.json: format: expected 3, got 7; another version"),
    "cut off": (
        lambda folder: os.truncate(folder / "rank0.pt", 1000),
        r"rank0\.pt: expected \d+ bytes, as manifest\.json says, got 1000",
    ),
    "a file missing": (
        lambda folder: (folder / "shared.pt").unlink(),
        r"shared\.pt: expected \d+ bytes, as manifest\.json says, it is missing",
    ),
    "altered": (
        alter,
        r"shared\.pt: expected the checksum in its manifest, got another: the file was altered",
    ),
    "not JSON": (
        lambda folder: (folder / manifest.NAME).write_text("{"),
        r"manifest\.json: expected a checkpoint's manifest, but it is not JSON",
    ),
    "a file not in its list": (
        lambda folder: change(folder, lambda content: {**content, "world_size": 2}),
        r"manifest\.json: files: expected rank1\.pt among them",
    ),
    "a file too many in its list": (
        lambda folder: change(folder, with_file("../../../elsewhere.pt")),
        r"manifest\.json: files: expected no \.\./\.\./\.\./elsewhere\.pt among them",
    ),
    "a negative step": (
        lambda folder: change(folder, lambda content: {**content, "step": -1}),
        r"manifest\.json: step: Input should be greater than or equal to 0",
    ),
    "another step": (
        lambda folder: change(folder, lambda content: {**content, "step": 12}),
        r"manifest\.json: step: expected a folder step-00000012 for step 12, got step-00000014",
    ),
    "step 0": (
        lambda folder: change(folder, lambda content: {**content, "step": 0}),
        r"manifest\.json: step: expected a folder step-00000000 for step 0, got step-00000014",
    ),
    "a flipped bit in its step": (
        lambda folder: flip(folder, b'"step": 14', b'"step": 10'),
        r"manifest\.json: expected its own checksum, got another: the manifest was altered",
    ),
    "a flipped bit in its epoch": (
        lambda folder: flip(folder, b'"epoch": 1', b'"epoch": 0'),
        r"manifest\.json: expected its own checksum, got another: the manifest was altered",
    ),
    "a flipped bit in its configuration": (
        lambda folder: flip(folder, b'"seed": 1', b'"seed": 3'),
        r"manifest\.json: expected its own checksum, got another: the manifest was altered",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_nothing_is_changed(
    name: str, runs: Path, capsys: Capture
) -> None:
    damage, expected = DAMAGES[name]
    folder = only_run(runs) / "checkpoints" / "step-00000014"
    damage(folder)
    before = contents(runs)
    assert resume(runs, path=folder) == 2
    assert re.search(expected, error_line(capsys))
    assert contents(runs) == before


def refusal(runs: Path, capsys: Capture) -> tuple[str, str]:
    """What is said of a run whose newest checkpoint is damaged, and the older checkpoint that it names."""
    assert resume(runs) == 2
    line = error_line(capsys)
    older = re.search(r"; an older one is whole: --resume (\S+)$", line)
    assert older is not None
    assert older[1].endswith("/checkpoints/step-00000011")
    return line, older[1]


@pytest.mark.parametrize("name", DAMAGES)
def test_where_the_newest_is_damaged_the_message_names_an_older_one(
    name: str, runs: Path, capsys: Capture
) -> None:
    damage, expected = DAMAGES[name]
    damage(only_run(runs) / "checkpoints" / "step-00000014")
    before = contents(runs)
    message, _ = refusal(runs, capsys)
    assert re.search(f"checkpoint is damaged: .*{expected}", message)
    assert contents(runs) == before


@pytest.mark.parametrize("name", ["altered", "a file missing", "not JSON", "another step"])
def test_the_older_one_that_the_message_names_is_resumed_past_the_damaged_one(
    name: str, runs: Path, capsys: Capture
) -> None:
    damage, _ = DAMAGES[name]
    damage(only_run(runs) / "checkpoints" / "step-00000014")
    _, older = refusal(runs, capsys)
    assert resume(runs, path=older) == 0
    assert "resumed after epoch 1, step 11" in capsys.readouterr().out
    assert steps_of(only_run(runs)) == sorted(set(steps_of(only_run(runs))))


def test_where_all_are_damaged_the_message_says_so(runs: Path, capsys: Capture) -> None:
    for path in manifest.manifests(only_run(runs)):
        os.truncate(path.parent / "rank0.pt", 1000)
    assert resume(runs) == 2
    line = error_line(capsys)
    assert re.search(
        r"step-00000014/rank0\.pt: expected \d+ bytes, .*, got 1000; there is no older one", line
    )


def test_a_folder_without_a_manifest_is_not_a_checkpoint(runs: Path, capsys: Capture) -> None:
    (only_run(runs) / "checkpoints" / "step-00000014" / manifest.NAME).unlink()
    assert resume(runs) == 0
    assert "resumed after epoch 1, step 11" in capsys.readouterr().out


def rewrite(folder: Path, name: str, change_state: Callable[[dict[str, Any]], object]) -> None:
    """Changes a state and makes all checksums right again: what somebody makes by hand."""
    state = torch.load(folder / name, weights_only=True)
    change_state(state)
    torch.save(state, folder / name)
    content = (folder / name).read_bytes()
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(folder, lambda whole: {**whole, "files": whole["files"] | {name: facts}})


HAND_MADE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a text for a step": ("shared.pt", lambda state: state["position"].update(step="abc")),
    "another step": ("shared.pt", lambda state: state["position"].update(step=13)),
    "another epoch": ("shared.pt", lambda state: state["position"].update(epoch=0)),
    "texts for scores": ("shared.pt", lambda state: state["position"].update(scores=["x"])),
    "a list for a tensor": (
        "shared.pt",
        lambda state: state["model"].update({next(iter(state["model"])): [1.0]}),
    ),
    "a number for a mapping": ("shared.pt", lambda state: state.update(optimizer=3)),
    "no position": ("shared.pt", lambda state: state.pop("position")),
    "a list for memory": (
        "rank0.pt",
        lambda state: next(iter(state["parts"]["exchange"]["parameters"].values())).update(
            {"feedback.memory": [0.0]}
        ),
    ),
    "a text for a generator": ("rank0.pt", lambda state: state["random"].update(cpu="abc")),
    "no parts": ("rank0.pt", lambda state: state.update(parts=None)),
    "no buckets": ("rank0.pt", lambda state: state["parts"]["exchange"].update(buckets=[])),
    "texts for losses": ("rank0.pt", lambda state: state["parts"]["meter"].update(losses=["x"])),
}


@pytest.mark.parametrize("name", HAND_MADE)
def test_a_state_made_by_hand_is_refused_in_one_line_and_nothing_is_changed(
    name: str, runs: Path, capsys: Capture
) -> None:
    file, change_state = HAND_MADE[name]
    folder = only_run(runs) / "checkpoints" / "step-00000014"
    rewrite(folder, file, change_state)
    before = contents(runs)
    assert resume(runs, path=folder) == 1
    line = error_line(capsys)
    assert str(folder) in line
    assert "weights_only" not in line
    assert contents(runs) == before


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every file that is hashed, each time that it is."""
    names: list[str] = []
    file_digest = hashlib.file_digest

    def digest(file: Any, kind: str) -> Any:
        names.append(Path(file.name).name)
        return file_digest(file, kind)

    monkeypatch.setattr(hashlib, "file_digest", digest)
    return names


def test_a_resumed_run_hashes_each_file_once(runs: Path, hashed: list[str]) -> None:
    assert resume(runs, "epochs=1") == 0
    assert sorted(hashed) == ["rank0.pt", "shared.pt"]


def test_two_workers_hash_each_file_that_they_need_once_and_rank_0_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[str]
) -> None:
    """First of two simulated workers, which need each file once together, then as two processes."""
    words = [*CONFIG, "--runs", str(tmp_path), "--threads", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(agree, "requested_by_signal", lambda: Request.STOP)
        assert run.main([*words, "--simulate", "2"]) == 0
        assert hashed == []
        assert run.main([*words, "--simulate", "2", "--resume"]) == 0
    assert sorted(hashed) == ["rank0.pt", "rank1.pt", "shared.pt"]

    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.hashing_worker", *words, "epochs=1", "--resume"]
    workers = [start(command, {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=PATIENCE_SECONDS)
        assert worker.returncode == 0, output
        names = {0: ["rank0.pt", "rank1.pt", "shared.pt"], 1: ["rank1.pt", "shared.pt"]}[rank]
        assert sorted(re.findall(f"rank {rank} hashes (.*)", output)) == names


def test_a_verified_file_that_is_altered_is_hashed_again_and_refused(runs: Path, hashed: list[str]) -> None:
    folder = only_run(runs) / "checkpoints" / "step-00000014"
    found = manifest.read(folder)
    check_readable(found)
    read_state(found, manifest.SHARED)
    assert sorted(hashed) == ["rank0.pt", "shared.pt"]
    time.sleep(0.05)  # a file system's clock may stand still for some milliseconds
    alter(folder)
    with pytest.raises(ValueError, match=r"shared\.pt: expected the checksum in its manifest, got another"):
        read_state(found, manifest.SHARED)
    assert hashed.count("shared.pt") == 2


def test_a_file_that_is_altered_while_it_is_read_is_refused(runs: Path) -> None:
    folder = only_run(runs) / "checkpoints" / "step-00000014"
    message = r"shared\.pt: the file was altered while it was read"
    with pytest.raises(ValueError, match=message), manifest.read(folder).open(manifest.SHARED):
        alter(folder)


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_with_code_is_refused_and_its_code_does_not_run(
    runs: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder, mark = only_run(runs) / "checkpoints" / "step-00000014", tmp_path / "it ran"
    facts = write_state(folder / "shared.pt", {"model": Malicious(mark)})
    change(folder, lambda content: {**content, "files": content["files"] | {"shared.pt": facts.model_dump()}})
    with pytest.raises(ValueError, match=r"shared\.pt: expected only tensors and numbers"):
        read_state(manifest.read(folder), manifest.SHARED)
    assert resume(runs) == 2  # although the checksum is right
    assert re.search(
        r"shared\.pt: expected only tensors and numbers \(Unsupported global: GLOBAL \S+ was not an allowed "
        r"global by default\); an older one is ",
        error_line(capsys),
    )
    assert not mark.exists()
    torch.load(folder / "shared.pt", weights_only=False)
    assert mark.exists()  # it would have run


def test_a_line_that_this_program_did_not_write_is_named_and_nothing_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "step", "epoch": 0, "step": 0}\nloss 3\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2: expected a JSON object with kind"):
        cut_back(path, epochs=1, steps=1)
    assert path.read_text().endswith("loss 3\n")


# --- writing --------------------------------------------------------------------------------------


def nothing() -> None:
    """There is nothing to sync."""


def keep(run: Path, **settings: Any) -> CheckpointWriter:
    run.mkdir(exist_ok=True)
    return CheckpointWriter(run, {}, Checkpoints(**settings), RendezvousStore(Place(0, 1), None))


def save(writer: CheckpointWriter, step: int) -> None:
    state = {"weights": torch.arange(100) + step}
    writer.save(step, 0, state, state, nothing)


def full_disk(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """From now on no file of this name can be written."""
    write_whole = checkpoint.files.write_whole

    def write(path: Path, content: Any) -> None:
        if path.name == name:
            raise OSError(28, "No space left on device")
        write_whole(path, content)

    monkeypatch.setattr(checkpoint.files, "write_whole", write)


@pytest.mark.parametrize("name", ["shared.pt", "rank0.pt", "manifest.json"])
def test_on_a_full_disk_the_last_whole_checkpoint_stays_and_the_run_ends_or_trains_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    writer, patient = keep(tmp_path / "a"), keep(tmp_path / "b", required=False)
    save(writer, 3)
    save(patient, 3)
    with monkeypatch.context() as patch:
        full_disk(patch, name)
        with pytest.raises(
            TrainingError, match=r"no checkpoint after step 5: rank 0: No space left on device; "
        ):
            save(writer, 5)
        save(patient, 5)
    line = capsys.readouterr().out
    assert line.startswith("no checkpoint after step 5: rank 0: No space left on device; the last one is ")
    for run_folder in (tmp_path / "a", tmp_path / "b"):
        assert [path.name for path in (run_folder / "checkpoints").iterdir()] == ["step-00000003"]
        check_readable(manifest.newest(run_folder))
    save(patient, 6)  # there is room again
    assert manifest.newest(tmp_path / "b").manifest.step == 6


def collect_with(text: str) -> Callable[[RendezvousStore, str, str], list[str]]:
    """A collection from two workers, of which the second sends the text."""

    def collect(store: RendezvousStore, name: str, value: str) -> list[str]:
        return [value, text]

    return collect


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"error": "No space left on device"}',
            "no checkpoint after step 5: rank 1: No space left on device; ",
        ),
        ("!No space left on device", "checkpoint/1: expected a WriteReport of rank 1, got '!No space"),
        ('{"files": {"rank1.pt": {"bytes": -1, "sha256": ""}}}', "expected a WriteReport of rank 1, got "),
        (
            '{"files": {"../rank1.pt": {"bytes": 1, "sha256": ""}}}',
            "files: expected no ../rank1.pt among them",
        ),
    ],
)
def test_what_another_worker_reports_of_its_files_is_checked_and_its_error_ends_the_run(
    text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = keep(tmp_path / "run")
    monkeypatch.setattr(RendezvousStore, "collect", collect_with(text))
    with pytest.raises((TrainingError, CommunicationError), match=re.escape(expected)):
        save(writer, 5)
    assert not manifest.manifests(tmp_path / "run")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file can be longer than so many bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_does_not_fit_on_the_disk_leaves_nothing(tmp_path: Path) -> None:
    """The error is the system's: torch would hide it behind one of its own."""
    with files_of_at_most(10_000), pytest.raises(OSError, match="File too large"):
        write_state(tmp_path / "state.pt", {"weights": torch.zeros(10**6)})
    assert list(tmp_path.iterdir()) == []


def test_lines_that_do_not_fit_on_the_disk_wait_for_room(tmp_path: Path) -> None:
    patient = LineFile(tmp_path / "lines", keep_waiting=True)
    with files_of_at_most(9):
        patient.write("first")
        patient.write("second")  # of which 3 bytes are taken
        assert (tmp_path / "lines").read_text() == "first\nsec"
        assert patient.error == "File too large"
        with pytest.raises(OSError, match="File too large"):
            patient.sync()
    patient.write("third")
    assert patient.error is None
    patient.close()
    assert (tmp_path / "lines").read_text() == "first\nsecond\nthird\n"


def test_lines_that_are_lost_do_not_hide_how_a_run_ended(tmp_path: Path, capsys: Capture) -> None:
    recorder = Recorder(tmp_path, 1, Log(tensorboard=False), keep_waiting=True)
    with files_of_at_most(0), pytest.raises(Stopped), recorder:  # noqa: PT012  the line waits, then it ends
        recorder.write({"kind": "step", "step": 0})
        raise Stopped(by_hand=False)
    assert "metrics.jsonl: File too large; its last lines are lost" in capsys.readouterr().out
    with files_of_at_most(0), pytest.raises(OSError, match="File too large"), recorder:
        recorder.write({"kind": "step", "step": 0})
    required = Recorder(tmp_path, 1, Log(tensorboard=False))
    with files_of_at_most(0), pytest.raises(OSError, match=r"File too large: .*metrics\.jsonl"), required:
        required.write({"kind": "step", "step": 0})
    assert "its last lines are lost" not in capsys.readouterr().out  # the error says as much


def test_lines_that_do_not_fit_are_an_error_unless_they_may_wait(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "lines")
    with files_of_at_most(9):
        with pytest.raises(OSError, match="File too large"):
            file.write("a longer line")
        with pytest.raises(OSError, match="File too large"):
            file.close()

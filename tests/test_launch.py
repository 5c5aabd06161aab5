"""Worker processes: two ways to start them, what survivors print, how they end."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sage.interfaces import TrainingError
from sage.workers.worker import WorkerIdentity, check_identities
from tests.forks import workers_of

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 240.0
"""Imports alone take a minute on a busy machine."""
ENDLESS = ["configs/digits.yaml", "epochs=100000"]


def command(*arguments: str, runs: Path) -> list[str]:
    return [sys.executable, "run.py", *arguments, "--runs", str(runs)]


def start(words: list[str], env: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    """The workers' process ids by rank."""
    return [worker for _, worker in sorted(workers_of(pid).items())]


def wait_for_steps(runs: Path, count: int = 5) -> Path:
    """Wait until a run has written so many lines; returns its folder."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        for metrics in runs.glob("*/*/metrics.jsonl"):
            if len(metrics.read_text().splitlines()) >= count:
                return metrics.parent
        time.sleep(0.1)
    raise AssertionError(f"the run wrote fewer than {count} lines within {PATIENCE_SECONDS:g} s")


@pytest.fixture
def endless_run(tmp_path: Path) -> Iterator[tuple[subprocess.Popen, list[int]]]:
    """A run of two workers that is training: the launcher, and the workers' process ids by rank."""
    launcher = start(command(*ENDLESS, "timeout_seconds=4", "--workers", "2", runs=tmp_path))
    try:
        wait_for_steps(tmp_path)
        yield launcher, children_of(launcher.pid)
    finally:
        for pid in [*children_of(launcher.pid), launcher.pid]:
            subprocess.run(["kill", "-KILL", str(pid)], stderr=subprocess.DEVNULL)
        launcher.communicate()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_two_processes_train_and_agree_with_torchrun(tmp_path: Path) -> None:
    short = ["configs/digits.yaml", "epochs=1"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ours = start(command(*short, "--workers", "2", runs=tmp_path / "ours"))
    output, _ = ours.communicate(timeout=PATIENCE_SECONDS)
    assert ours.returncode == 0, output
    theirs = start([*torchrun, *command(*short, runs=tmp_path / "theirs")[1:]])
    output, _ = theirs.communicate(timeout=PATIENCE_SECONDS)
    assert theirs.returncode == 0, output
    folders = [next((tmp_path / name / "digits").iterdir()) for name in ("ours", "theirs")]
    names = {"config.yaml", "environment.json", "metrics.jsonl", "summary.json", "checkpoints", "tensorboard"}
    names.add(".lock")
    assert [{entry.name for entry in folder.iterdir()} for folder in folders] == [names, names]
    weights = [(folder / "checkpoints" / "final.pt").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    losses = [re.findall(r'"loss": [^,}]+', (folder / "metrics.jsonl").read_text()) for folder in folders]
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 22  # a step line each


def test_a_killed_worker_ends_the_run_and_is_named(endless_run: tuple[subprocess.Popen, list[int]]) -> None:
    launcher, workers = endless_run
    os.kill(workers[1], signal.SIGKILL)
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert "worker 1 was the first to fail (signal 9)" in output
    assert not any(map(is_alive, workers))


def test_a_hung_worker_ends_the_run_within_the_timeout_and_is_named(
    endless_run: tuple[subprocess.Popen, list[int]],
) -> None:
    launcher, workers = endless_run
    os.kill(workers[1], signal.SIGSTOP)
    # 4 s until the collective times out; then the launcher waits 30 s for the stopped worker, and kills it.
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1
    assert re.search(r"rank 0: all_\w+ failed: .*; rank 1 fell behind: it no longer answers", output), output
    assert re.search(r"\(rank 0 at step \d+, rank 1 at step \d+\)", output), output
    assert not any(map(is_alive, workers))


def test_an_interrupt_of_the_launcher_reaches_each_worker_once(
    endless_run: tuple[subprocess.Popen, list[int]],
) -> None:
    launcher, workers = endless_run
    os.kill(launcher.pid, signal.SIGINT)
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 128 + signal.SIGINT
    assert len(re.findall("stopped by a signal after step", output)) == 1
    assert "Traceback" not in output
    assert not any(map(is_alive, workers))


def test_an_interrupt_ends_a_simulation(tmp_path: Path) -> None:
    simulation = start(command(*ENDLESS, "--simulate", "4", runs=tmp_path))
    try:
        wait_for_steps(tmp_path)
        os.kill(simulation.pid, signal.SIGINT)
        output, _ = simulation.communicate(timeout=PATIENCE_SECONDS)
    finally:
        simulation.kill()
    assert simulation.returncode == 128 + signal.SIGINT
    assert "Traceback" not in output


def test_when_the_store_is_gone_the_survivor_says_so(tmp_path: Path) -> None:
    """Without a launcher rank 0's process holds the store; it is killed."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    words = command(*ENDLESS, "timeout_seconds=4", runs=tmp_path)
    workers = [start(words, {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    try:
        wait_for_steps(tmp_path)
        workers[0].kill()
        output, _ = workers[1].communicate(timeout=PATIENCE_SECONDS)
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
    assert workers[1].returncode == 1
    assert "rank 1: " in output
    assert "the rendezvous store" in output  # is gone, or failed: whichever is noticed first
    assert "Traceback" not in output


def test_a_port_where_something_else_is_silent_ends_the_run_within_the_timeout(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        words = command("configs/digits.yaml", "timeout_seconds=1", "world_size=2", runs=tmp_path)
        worker = start(words, {"hostip": "127.0.0.1", "port": str(port), "rank": "1"})
        output, _ = worker.communicate(timeout=PATIENCE_SECONDS)
    assert worker.returncode == 1
    assert f"rank 1: could not meet the other workers at 127.0.0.1:{port}: " in output
    assert "Traceback" not in output


def test_a_worker_that_waits_in_vain_says_where_it_waited_and_shows_no_stack(tmp_path: Path) -> None:
    words = ["configs/digits.yaml", "timeout_seconds=2", "world_size=2", "--runs", str(tmp_path)]
    port = free_port()
    for rank in range(2):
        environ = {"hostip": "127.0.0.1", "port": str(port), "rank": str(rank)}
        environ["SAGE_ENV"] = str(Path(sys.executable).parent.parent)
        worker = start(["./run.sh", *words], environ)
        output, _ = worker.communicate(timeout=PATIENCE_SECONDS)
        assert worker.returncode == 1
        (line,) = output.splitlines()
        assert line.startswith(f"run.py: rank {rank}: could not meet the other workers at 127.0.0.1:{port}: ")


def identities(*workers: str) -> list[WorkerIdentity]:
    """The identities of workers that are given as "backend host [GPU]"."""
    names = ("backend", "host", "gpu")
    return [WorkerIdentity.model_validate(dict(zip(names, text.split(), strict=False))) for text in workers]


def test_nccl_with_two_ranks_on_one_gpu_is_refused_with_what_to_do() -> None:
    message = (
        r"NCCL: expected a GPU for each worker, got one GPU of host n1 for ranks 0, 2; .*--ntasks-per-node"
    )
    with pytest.raises(TrainingError, match=message):
        check_identities(identities("nccl n1 GPU-a", "nccl n2 GPU-b", "nccl n1 GPU-a"))
    check_identities(identities("nccl n1 GPU-a", "nccl n1 GPU-b", "nccl n2 GPU-c"))
    check_identities(identities("gloo n1 GPU-a", "gloo n1 GPU-a"))
    check_identities(identities("gloo n1", "gloo n1"))


def test_workers_that_would_choose_different_backends_are_refused_with_what_to_do() -> None:
    with pytest.raises(
        TrainingError, match="expected one backend, got rank 0: nccl, rank 1: gloo; give every"
    ):
        check_identities(identities("nccl n1 GPU-a", "gloo n2"))

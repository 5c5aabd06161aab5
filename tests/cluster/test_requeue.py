"""A SLURM job that does not end at once: requeued, warned of its time limit, its host lost, cancelled.

python -m pytest -m cluster
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cluster.conftest import HOSTS, ROOT, Cluster, wait_for_checkpoint, wait_until

pytestmark = pytest.mark.cluster
CHANGES = ["task.batch_per_worker=4", "epochs=6", "log.tensorboard=false", "checkpoint.every_minutes=0.02"]
WORDS = ["configs/digits.yaml", *CHANGES, "--threads", "1"]
SECONDS = 300
Ended = tuple[dict[str, bytes], list[dict[str, Any]]]


def submit(cluster: Cluster, folder: Path, *options: str, words: list[str] = WORDS) -> str:
    """Submit a job on two hosts whose runs and log are in a folder; returns its id."""
    folder.mkdir(exist_ok=True)
    sbatch = ["sbatch", "--parsable", f"--output={folder}/log", "--nodes=2", *options, "pararun"]
    code, job = cluster.call(*sbatch, *words, "--runs", str(folder))
    assert code == 0, job
    return job.strip()


def log_of(folder: Path) -> str:
    log = folder / "log"
    return log.read_text() if log.exists() else ""


def wait_for_state(cluster: Cluster, job: str, state: str, folder: Path) -> None:
    wait_until(lambda: cluster.state(job) == state, SECONDS, lambda: cluster.state(job) + log_of(folder))


def wait_for_words(folder: Path, words: str) -> None:
    wait_until(lambda: words in log_of(folder), SECONDS, lambda: log_of(folder))


def ended(folder: Path, place: str = "digits") -> Ended:
    """The result of the only run in a folder: its weights' bytes by name, and its lines without seconds."""
    (run,) = folder.glob(f"{place}/*/")
    assert (run / "summary.json").exists()
    weights = torch.load(run / "checkpoints" / "final.pt", weights_only=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}, lines


def worker_of(cluster: Cluster, host: str) -> int:
    (worker,) = cluster.workers(host)
    return worker


@pytest.fixture(scope="module")
def undisturbed_job(running: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job on two hosts that is done: its id and folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    job = submit(running, folder)
    wait_for_state(running, job, "COMPLETED", folder)
    return job, folder


@pytest.fixture(scope="module")
def undisturbed(undisturbed_job: tuple[str, Path]) -> Ended:
    return ended(undisturbed_job[1])


# --- requeued -------------------------------------------------------------------------------------


def test_requeued_jobs_of_one_configuration_each_resume_their_own_run_to_the_same_bits(
    undisturbed: Ended, cluster: Cluster, tmp_path: Path
) -> None:
    """One of them is a point of a sweep in a job array."""
    sweep = tmp_path / "two points.yaml"
    sweep.write_text(
        f"base: {ROOT}/configs/digits.yaml\ngrid: {{reducer.density: [0.02, 0.01]}}\nseeds: [1]\n"
    )
    alone, point = tmp_path / "alone", tmp_path / "point"
    jobs = {alone: submit(cluster, alone)}
    words = ["--sweep", str(sweep), *CHANGES, "--threads", "1"]
    jobs[point] = f"{submit(cluster, point, '--array=1', words=words)}_1"
    places = {alone: "digits", point: "two points/*"}
    for folder, job in jobs.items():
        found = f"{places[folder]}/*/checkpoints/step-*/manifest.json"
        wait_until(lambda folder=folder, found=found: any(folder.glob(found)), 120, lambda: log_of(alone))
        assert cluster.call("scontrol", "requeue", job)[0] == 0
    for folder, job in jobs.items():
        wait_until(lambda job=job: cluster.fact(job, "Restarts") == "1", 30)
        wait_for_state(cluster, job, "COMPLETED", folder)
        log = log_of(folder)
        assert len(re.findall(r"^resumed after epoch \d+, step [1-9]\d*$", log, re.M)) == 1, log
        assert log.count("pararun: job") == 2  # appended
        assert "back into the queue" not in log
        assert ended(folder, places[folder]) == undisturbed


def test_a_requeued_job_that_is_done_says_so_and_changes_nothing(
    undisturbed_job: tuple[str, Path], undisturbed: Ended, cluster: Cluster
) -> None:
    job, folder = undisturbed_job
    assert cluster.call("scontrol", "requeue", job)[0] == 0
    wait_for_words(folder, "done already")
    wait_for_state(cluster, job, "COMPLETED", folder)
    assert cluster.fact(job, "Restarts") == "1"
    assert ended(folder) == undisturbed


# --- warned ---------------------------------------------------------------------------------------


def test_a_job_that_comes_near_its_time_limit_goes_back_into_the_queue_and_ends_with_the_same_bits(
    undisturbed: Ended, cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, "--time=10")
    wait_for_checkpoint(tmp_path)
    # SLURM checks the limits now and then; until it does, the run waits. Its warning wakes the run (SIGCONT).
    os.kill(worker_of(cluster, "n2"), signal.SIGSTOP)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=2")  # pararun asks for a warning at 120 s
    wait_for_words(tmp_path, "pararun: back into the queue")
    wait_for_state(cluster, job, "PENDING", tmp_path)
    cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    wait_for_state(cluster, job, "COMPLETED", tmp_path)
    assert cluster.fact(job, "Restarts") == "1"
    log = log_of(tmp_path)
    (stopped,) = re.findall(r"^stopped by a signal after step (\d+); to resume", log, re.M)
    # The checkpoint is of all ranks after the same step; no rank failed or was killed.
    assert re.findall(r"^resumed after epoch \d+, step (\d+)$", log, re.M) == [stopped]
    assert "run.py:" not in log
    assert "srun: error" not in log
    assert ended(tmp_path) == undisturbed


def test_a_job_that_may_not_be_requeued_fails_and_says_how_to_resume(
    undisturbed: Ended, cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, "--no-requeue")
    wait_for_checkpoint(tmp_path)
    cluster.call("scancel", "--signal=USR1", job)
    wait_for_state(cluster, job, "FAILED", tmp_path)
    assert cluster.fact(job, "ExitCode") == "1:0"
    log = log_of(tmp_path)
    assert "pararun: SLURM does not take the job back (--no-requeue?); to resume:\n  sbatch pararun " in log
    words = log.rpartition("  sbatch pararun ")[2].splitlines()[0].split(" ")
    code, output = cluster.call(
        "sbatch", "--wait", f"--output={tmp_path}/log", "--nodes=2", "pararun", *words
    )
    assert code == 0, output + log_of(tmp_path)
    assert "resumed after" in log_of(tmp_path)
    assert ended(tmp_path) == undisturbed


# --- lost -----------------------------------------------------------------------------------------


def test_a_job_whose_first_host_is_lost_resumes_on_others_to_the_same_bits(
    undisturbed: Ended, cluster: Cluster, tmp_path: Path
) -> None:
    """The first host has rank 0 and the job's shell."""
    job = submit(cluster, tmp_path)
    wait_for_checkpoint(tmp_path)
    assert worker_of(cluster, "n1")
    cluster.tool("lose", "n1")
    wait_for_state(cluster, job, "COMPLETED", tmp_path)
    assert cluster.fact(job, "Restarts") == "1"
    assert log_of(tmp_path).count("resumed after") == 1
    assert ended(tmp_path) == undisturbed


def test_a_job_whose_host_loses_its_link_waits_for_it_and_resumes(
    cluster: Cluster, endless_job: str, tmp_path: Path
) -> None:
    cluster.tool("cut", "n3")
    # 10 s until the collective times out, and 20 s until SLURM gives up the host.
    wait_for_state(cluster, endless_job, "PENDING", tmp_path)
    assert "rank 2 fell behind: it no longer answers" in log_of(tmp_path)
    wait_until(lambda: not any(cluster.workers(host) for host in HOSTS), 60, cluster.processes)
    cluster.tool("heal", "n3")
    # Back in service at once, while SLURM still ends what the job left there (REQUEST_ABORT_JOB), and a
    # minute before it repeats that the old step is to end (REQUEST_SIGNAL_TASKS).
    cluster.call("scontrol", "update", "NodeName=n3", "State=RESUME")
    wait_for_words(tmp_path, "pararun: restarted by SLURM")
    wait_for_words(tmp_path, "resumed after")
    assert cluster.fact(endless_job, "Restarts") == "1"
    time.sleep(10)
    assert cluster.state(endless_job) == "RUNNING", log_of(tmp_path)
    assert len([pid for host in HOSTS for pid in cluster.workers(host)]) >= len(HOSTS)


# --- cancelled ------------------------------------------------------------------------------------


def test_scancel_leaves_no_process_and_does_not_requeue(
    cluster: Cluster, endless_job: str, tmp_path: Path
) -> None:
    assert len(cluster.processes()) >= 4
    cluster.call("scancel", endless_job)
    wait_until(lambda: not cluster.processes(), 30, cluster.processes)
    wait_for_state(cluster, endless_job, "CANCELLED", tmp_path)
    assert cluster.fact(endless_job, "Restarts") == "0"
    assert "back into the queue" not in log_of(tmp_path)


def test_scancel_of_a_job_that_waits_to_resume_ends_it(
    cluster: Cluster, endless_job: str, tmp_path: Path
) -> None:
    cluster.call("scancel", "--signal=USR1", endless_job)
    wait_for_words(tmp_path, "pararun: back into the queue")
    wait_for_state(cluster, endless_job, "PENDING", tmp_path)
    cluster.call("scancel", endless_job)
    assert cluster.state(endless_job) == "CANCELLED"
    wait_until(lambda: not cluster.processes(), 30, cluster.processes)
    assert cluster.fact(endless_job, "Restarts") == "1"
    assert log_of(tmp_path).count("pararun: job") == 1

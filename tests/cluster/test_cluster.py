"""Runs on a SLURM cluster: every way to start workers on several hosts, and how such runs end.

python -m pytest -m cluster
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import HOSTS, ROOT, TOOL, Cluster, wait_until

pytestmark = pytest.mark.cluster
TASK = ["configs/digits.yaml", "epochs=1", "--threads", "1"]


def only_run(runs: Path) -> tuple[int, list[str]]:
    """The world size and the hosts, by rank, of the only run that is done."""
    (summary,) = runs.glob("digits/*/summary.json")
    environment = json.loads((summary.parent / "environment.json").read_text())
    assert json.loads(summary.read_text())["world_size"] == environment["world_size"]
    return environment["world_size"], [worker.partition("/")[0] for worker in environment["workers"]]


@pytest.mark.parametrize(
    ("shape", "hosts"),
    [
        (["--nodes=4"], ["n1", "n2", "n3", "n4"]),
        (["--nodes=2", "--ntasks-per-node=2"], ["n1", "n1", "n2", "n2"]),
    ],
    ids=["4 hosts x 1 task", "2 hosts x 2 tasks"],
)
def test_sbatch_pararun_trains_one_worker_a_task(
    cluster: Cluster, tmp_path: Path, shape: list[str], hosts: list[str]
) -> None:
    log = tmp_path / "log"
    sbatch = ["sbatch", "--wait", f"--output={log}", *shape, "pararun", *TASK, "--runs", str(tmp_path)]
    code, output = cluster.call(*sbatch)
    printed = log.read_text()
    assert code == 0, output + printed
    assert only_run(tmp_path) == (4, hosts)
    for rank, host in enumerate(hosts):
        assert printed.count(f"rank {rank}    {host}  cpu") == 1


def test_pararun_needs_no_gpu_and_passes_the_exit_code_on(cluster: Cluster, tmp_path: Path) -> None:
    log = tmp_path / "log"
    sbatch = ["sbatch", "--wait", f"--output={log}", "--nodes=1", "--gpus-per-task=0", "pararun"]
    code, _ = cluster.call(*sbatch, *TASK, "reducer.density=2", "--runs", str(tmp_path))
    assert code == 2, log.read_text()
    assert "run.py: reducer.density: expected a number in (0, 1], got 2" in log.read_text()


def test_srun_needs_neither_pararun_nor_an_address(cluster: Cluster, tmp_path: Path) -> None:
    code, output = cluster.call("srun", "--nodes=2", "./run.sh", *TASK, "--runs", str(tmp_path))
    assert code == 0, output
    assert only_run(tmp_path) == (2, ["n1", "n2"])


def test_run_sh_by_hand_on_every_host_is_one_run(cluster: Cluster, tmp_path: Path) -> None:
    words = " ".join([*TASK, "world_size=4", "--runs", str(tmp_path)])
    workers = [
        cluster.start_on(host, f"hostip=10.77.0.1 port=23456 rank={rank} ./run.sh {words}")
        for rank, host in enumerate(HOSTS)
    ]
    ended = [cluster.end(worker) for worker in workers]
    assert [code for code, _ in ended] == [0] * 4, ended
    assert only_run(tmp_path) == (4, HOSTS)


def test_mpirun_over_hosts_is_one_run(cluster: Cluster, tmp_path: Path) -> None:
    mpirun = (
        f"mpirun --allow-run-as-root --mca plm_rsh_agent '{TOOL} ssh' --mca btl_tcp_if_include eth0 "
        f"--host n1:2,n2:2 -x hostip=n1 ./run.sh {' '.join(TASK)} --runs {tmp_path}"
    )
    code, output = cluster.end(cluster.start_on("n1", mpirun))
    assert code == 0, output
    assert only_run(tmp_path) == (4, ["n1", "n1", "n2", "n2"])


def test_torchrun_across_hosts_is_one_run(cluster: Cluster, tmp_path: Path) -> None:
    words = " ".join(["run.py", *TASK, "--runs", str(tmp_path)])
    agents = [
        cluster.start_on(
            host,
            f"{sys.executable} -m torch.distributed.run --nnodes 2 --node-rank {rank} --nproc-per-node 2 "
            f"--master-addr n3 --master-port 23457 {words}",
        )
        for rank, host in enumerate(["n3", "n4"])
    ]
    ended = [cluster.end(agent) for agent in agents]
    assert [code for code, _ in ended] == [0, 0], ended
    assert only_run(tmp_path) == (4, ["n3", "n3", "n4", "n4"])


def test_a_job_array_of_a_sweep_runs_a_point_a_task_and_skips_what_is_done(
    cluster: Cluster, tmp_path: Path
) -> None:
    sweep = tmp_path / "two.yaml"
    sweep.write_text(f"base: {ROOT}/configs/digits.yaml\ngrid: {{epochs: [1]}}\nseeds: [3, 4]\n")
    shape = ["--array=0-1", "--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/%a.log"]
    words = ["--sweep", str(sweep), "--threads", "1", "--runs", str(tmp_path)]
    for text in ("2 workers over gloo", "done already"):
        code, output = cluster.call("sbatch", "--wait", *shape, "pararun", *words)
        logs = [(tmp_path / f"{index}.log").read_text() for index in range(2)]
        assert code == 0, [output, *logs]
        assert all(text in log for log in logs), logs
        done = sorted(tmp_path.glob("two/*/*/summary.json"))
        assert [summary.parent.name.split("-")[1] for summary in done] == ["s3", "s4"]


def test_a_killed_worker_ends_the_job_as_failed_and_is_named(
    cluster: Cluster, endless_job: str, tmp_path: Path
) -> None:
    (worker,) = cluster.workers("n3")
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: cluster.state(endless_job) == "FAILED", 60, lambda: cluster.state(endless_job))
    printed = (tmp_path / "log").read_text()
    assert "n3: task 2: Killed" in printed
    assert "Traceback" not in printed
    wait_until(lambda: not cluster.processes(), 30, cluster.processes)
    assert not list(tmp_path.glob("digits/*/summary.json"))


def test_the_repository_holds_the_folder_that_slurm_writes_to() -> None:
    assert "#SBATCH --output=runs/slurm/" in (ROOT / "pararun").read_text()
    assert (ROOT / "runs" / "slurm").is_dir()

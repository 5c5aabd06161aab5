"""A virtual SLURM cluster of four hosts for the tests here; a skipped test says why there cannot be one."""

import fcntl
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = str(Path(__file__).parent / "virtual-cluster")
SLURM_CONF = "/tmp/sage-virtual-cluster/slurm.conf"
HOSTS = ["n1", "n2", "n3", "n4"]


class Cluster:
    """Runs commands from the repository's root: on the hosts, and SLURM's."""

    def tool(self, *words: str) -> str:
        return subprocess.run([TOOL, *words], check=True, capture_output=True, text=True).stdout

    def start(self, words: list[str]) -> subprocess.Popen:
        """Start a command outside of the hosts; SLURM's commands find this cluster."""
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env={name: text for name, text in os.environ.items() if not name.startswith("SLURM_")}
            | {"SLURM_CONF": SLURM_CONF},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def start_on(self, host: str, command: str) -> subprocess.Popen:
        """Start a shell command on a host, as ssh would."""
        return self.start([TOOL, "ssh", host, f"cd {ROOT} && {command}"])

    def call(self, *words: str, seconds: float = 300) -> tuple[int, str]:
        """Run a command, for so many seconds at most; returns the exit code and the output."""
        return self.end(self.start(list(words)), seconds)

    def end(self, process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
        """Wait for a process, for so many seconds at most; returns the exit code and the output."""
        try:
            output, _ = process.communicate(timeout=seconds)
        finally:
            process.kill()
        return process.returncode, output

    def state(self, job: str) -> str:
        """A job's state: COMPLETED, FAILED, ..."""
        return self.fact(job, "JobState")

    def fact(self, job: str, name: str) -> str:
        """One of the values that SLURM shows of a job."""
        _, shown = self.call("scontrol", "show", "job", "-o", job)
        return shown.partition(f" {name}=")[2].split()[0]

    def pids(self, host: str) -> list[int]:
        """The processes on a host, without its slurmd."""
        return [int(word) for word in self.tool("pids", host).split()]

    def workers(self, host: str) -> list[int]:
        """The processes on a host that are workers."""
        return [pid for pid in self.pids(host) if "run.py" in command_line(pid)]

    def processes(self) -> list[str]:
        """The command lines of all processes on the hosts."""
        lines = [command_line(pid) for host in HOSTS for pid in self.pids(host)]
        return [line for line in lines if line]


def command_line(pid: int) -> str:
    """A process's command line; empty where it has ended."""
    done = subprocess.run(["ps", "-o", "args=", "-p", str(pid)], capture_output=True, text=True)
    return done.stdout.strip()


def wait_until(holds: Callable[[], object], seconds: float, explain: Callable[[], object] = str) -> None:
    """Wait until a condition holds; fails with what explain() returns where it takes longer."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


def obstacle() -> str | None:
    """Why there can be no virtual cluster on this machine; None where there can."""
    if os.geteuid() != 0:
        return "the virtual cluster needs root"
    for tool in ("slurmctld", "slurmd", "munged", "ip", "tc", "mpirun"):
        if shutil.which(tool) is None:
            return f"{tool} is missing: apt-get install slurm-wlm munge iproute2 openmpi-bin"
    links = "ip link add name veth1 type veth peer name veth2 && ip link add name bridge1 type bridge"
    limit = "tc qdisc add dev veth1 root tbf rate 1gbit burst 256kb latency 50ms"
    tried = ["unshare", "--net", "--uts", "sh", "-c", f"{links} && {limit}"]
    if subprocess.run(tried, capture_output=True).returncode:
        return "this machine allows no network namespaces, or no limited links in them"
    return None


@pytest.fixture(scope="session")
def running() -> Iterator[Cluster]:
    if reason := obstacle():
        pytest.skip(reason)
    with Path("/tmp/sage-virtual-cluster.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one such cluster per machine
        cluster = Cluster()
        cluster.tool("up", "4", "1gbit")
        yield cluster
        cluster.tool("down")


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The cluster, idle; what a test leaves running is ended."""

    def is_idle() -> bool:
        return running.call("sinfo", "-h", "-t", "idle", "-o", "%D")[1].strip() == str(len(HOSTS))

    wait_until(is_idle, 90, lambda: running.call("sinfo", "-N", "-l")[1])
    yield running
    for host in HOSTS:
        running.tool("heal", host)
    running.call("scancel", "--user", "root")
    wait_until(lambda: not running.processes(), 60, running.processes)


@pytest.fixture
def endless_job(cluster: Cluster, tmp_path: Path) -> Iterator[str]:
    """The id of a job on four hosts that is training and has a checkpoint. Its output is in the file log."""
    words = ["configs/digits.yaml", "epochs=100000", "timeout_seconds=10", "--threads", "1"]
    sbatch = ["sbatch", "--parsable", f"--output={tmp_path}/log", "--nodes=4", "pararun"]
    code, job = cluster.call(*sbatch, *words, "--runs", str(tmp_path))
    assert code == 0, job
    wait_for_checkpoint(tmp_path)
    yield job.strip()
    cluster.call("scancel", job.strip())


def wait_for_checkpoint(runs: Path) -> None:
    """Wait until the only run in a folder has its first checkpoint."""
    found = "digits/*/checkpoints/step-*/manifest.json"
    wait_until(lambda: any(runs.glob(found)), 120, lambda: (runs / "log").read_text())

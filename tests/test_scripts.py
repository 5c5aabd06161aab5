"""run.sh and pararun by themselves: srun, scontrol and Python are stood in for by scripts that tell."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with the scripts and an environment whose python tells its arguments."""
    for name in ("run.sh", "pararun"):
        shutil.copy(ROOT / name, tmp_path)
    write_script(tmp_path / ".venv/bin/python", 'printf "%s\\n" "$@"')
    write_script(tmp_path / "bin/srun", 'echo "srun $hostip:$port"; printf "%s\\n" "$@"')
    write_script(tmp_path / "bin/scontrol", 'echo localhost; echo "$@" >&2')
    return tmp_path


def call(repository: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environ = {"PATH": f"{repository}/bin:{os.environ['PATH']}"} | variables
    command = [str(repository / script), *arguments]
    return subprocess.run(command, cwd="/", env=environ, capture_output=True, text=True, timeout=60)


def job(repository: Path, **variables: str) -> dict[str, str]:
    given = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "localhost,n2", "SLURM_NTASKS": "2"}
    return given | {"SLURM_SUBMIT_DIR": str(repository)} | variables


def test_run_sh_passes_arguments_on_as_they_are(repository: Path) -> None:
    done = call(repository, "run.sh", "a.yaml", "key=a b", "--runs", "x*")
    assert done.stdout.splitlines() == ["-u", f"{repository}/run.py", "a.yaml", "key=a b", "--runs", "x*"]


def test_sage_env_names_the_environment(repository: Path, tmp_path: Path) -> None:
    write_script(tmp_path / "conda/bin/python", "echo conda; exit 7")
    done = call(repository, "run.sh", SAGE_ENV=str(tmp_path / "conda"))
    assert (done.returncode, done.stdout) == (7, "conda\n")


def test_a_missing_environment_is_refused_in_one_line(repository: Path) -> None:
    done = call(repository, "run.sh", "a.yaml", SAGE_ENV="/none")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(
        "run.sh: SAGE_ENV: expected the path of a venv or conda environment, got /none"
    )


def test_a_signal_to_run_sh_reaches_python(repository: Path) -> None:
    write_script(repository / ".venv/bin/python", "echo started; exec sleep 60")
    process = subprocess.Popen([str(repository / "run.sh")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_pararun_starts_run_sh_on_every_task_with_the_head_nodes_address(repository: Path) -> None:
    done = call(repository, "pararun", "a.yaml", "key=a b", **job(repository))
    assert done.returncode == 0, done.stderr
    assert done.stderr == "show hostnames localhost,n2\n"
    told, address, *words = done.stdout.splitlines()
    assert told == "pararun: job 12345, 2 tasks on localhost,n2, rank 0 at localhost:22345"
    assert address == "srun localhost:22345"
    assert words == ["--kill-on-bad-exit=1", "--gpu-bind=none", "./run.sh", "a.yaml", "key=a b"]


def binds(listener: socket.socket, port: int) -> bool:
    try:
        listener.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


def test_pararun_takes_a_port_that_is_free(repository: Path) -> None:
    write_script(repository / "bin/scontrol", "echo 127.0.0.1")
    with socket.socket() as listener:
        taken = next(port for port in range(24321, 25321) if binds(listener, port))
        listener.listen()
        done = call(repository, "pararun", "a.yaml", **job(repository, SLURM_JOB_ID=str(taken)))
    address, port = done.stdout.splitlines()[1].split()[1].split(":")
    assert address == "127.0.0.1"
    assert taken < int(port) < taken + 1000  # the next one, or further where that is taken too


def test_pararun_gives_an_array_tasks_number_to_a_sweep_only(repository: Path) -> None:
    array = job(repository, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="8")
    done = call(repository, "pararun", "--sweep", "s.yaml", **array)
    words = done.stdout.splitlines()[2:]
    assert words[-5:] == ["./run.sh", "--sweep", "s.yaml", "--index", "3"]
    assert "--cpus-per-task=8" in words
    done = call(repository, "pararun", "a.yaml", **array)
    assert done.stdout.splitlines()[-2:] == ["./run.sh", "a.yaml"]


def test_pararun_outside_of_the_repository_or_of_sbatch_is_refused_in_one_line(
    repository: Path, tmp_path: Path
) -> None:
    done = call(repository, "pararun", "a.yaml", **job(repository, SLURM_SUBMIT_DIR="/usr"))
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == "pararun: expected to be submitted from the repository, got /usr (it has no run.sh)\n"
    )
    done = call(repository, "pararun", "a.yaml")
    assert done.returncode != 0
    assert "expected to be started by sbatch" in done.stderr


def test_pararun_names_no_site() -> None:
    lines = [line for line in (ROOT / "pararun").read_text().splitlines() if line.startswith("#SBATCH")]
    assert lines
    assert not [line for line in lines if "partition" in line or "account" in line or "qos" in line]

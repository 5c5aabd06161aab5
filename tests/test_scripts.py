"""run.sh and pararun by themselves: srun, scontrol and Python are stood in for by scripts that tell."""

import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = "runs/slurm/sage-12345"


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
    write_script(tmp_path / "bin/squeue", "echo RUNNING")
    write_script(tmp_path / "bin/sleep", 'echo "sleep $*"')
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
    environ = {"PATH": os.environ["PATH"]}
    process = subprocess.Popen([str(repository / "run.sh")], env=environ, stdout=subprocess.PIPE, text=True)
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
    options = ["--kill-on-bad-exit=1", "--gpu-bind=none"]
    assert words == [*options, "./run.sh", "a.yaml", "key=a b", "--job", LINK]


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


def words_of(done: subprocess.CompletedProcess) -> list[str]:
    """What run.sh was given, without the link."""
    words = done.stdout.splitlines()
    words = words[words.index("./run.sh") + 1 :]
    end = words.index("--job")
    assert words[end + 1] == LINK
    return words[:end]


def test_pararun_gives_an_array_tasks_number_to_a_sweep_only(repository: Path) -> None:
    array = job(repository, SLURM_ARRAY_TASK_ID="3", SLURM_CPUS_PER_TASK="8")
    done = call(repository, "pararun", "--sweep", "s.yaml", **array)
    assert words_of(done) == ["--sweep", "s.yaml", "--index", "3"]
    assert "--cpus-per-task=8" in done.stdout.splitlines()
    done = call(repository, "pararun", "--sweep=s.yaml", **array)
    assert words_of(done) == ["--sweep=s.yaml", "--index", "3"]
    done = call(repository, "pararun", "a.yaml", **array)
    assert words_of(done) == ["a.yaml"]


def test_pararun_finds_the_first_of_many_hosts(repository: Path) -> None:
    write_script(repository / "bin/scontrol", "seq -f 127.0.0.%.0f 100000")  # more than a pipe holds
    done = call(repository, "pararun", "a.yaml", **job(repository))
    assert (done.returncode, done.stderr) == (0, "")
    assert "srun 127.0.0.1:22345" in done.stdout


# --- a job that comes back ------------------------------------------------------------------------


def leave_run(repository: Path, *files: str) -> Path:
    """A run's folder with empty files, and the job's link to it."""
    run = repository / "a run"
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (repository / LINK).parent.mkdir(parents=True, exist_ok=True)
    (repository / LINK).symlink_to(run)
    return run


MANIFEST = "checkpoints/step-00000007/manifest.json"


@pytest.mark.parametrize(
    ("restarts", "files", "more"),
    [
        ("1", [MANIFEST], ["--resume", LINK]),
        ("2", ["summary.json"], ["--resume", LINK]),
        ("1", ["checkpoints/step-00000007/shared.pt"], []),
        ("0", [MANIFEST], []),
    ],
    ids=["a checkpoint", "done", "none whole", "of another cluster's job"],
)
def test_a_requeued_job_goes_on_with_its_own_run_where_that_has_a_checkpoint(
    repository: Path, restarts: str, files: list[str], more: list[str]
) -> None:
    leave_run(repository, *files)
    done = call(repository, "pararun", "a.yaml", "k=a b", **job(repository, SLURM_RESTART_COUNT=restarts))
    assert done.returncode == 0, done.stderr
    assert words_of(done) == ["a.yaml", "k=a b", *more]
    assert (repository / LINK).exists() == (restarts != "0")


def test_a_requeued_job_without_a_run_begins(repository: Path) -> None:
    done = call(repository, "pararun", "a.yaml", **job(repository, SLURM_RESTART_COUNT="1"))
    assert (done.returncode, words_of(done)) == (0, ["a.yaml"])


@pytest.mark.parametrize(("restarts", "files", "waits"), [("0", [], 0), ("1", [], 1), ("1", ["requeue"], 0)])
def test_a_job_that_slurm_restarted_waits_until_its_lost_host_is_cleaned_up(
    repository: Path, restarts: str, files: list[str], waits: int
) -> None:
    """SLURM repeats within a minute what it could not tell a lost host; one that asked for it lost none."""
    leave_run(repository, MANIFEST, *files)
    done = call(repository, "pararun", "a.yaml", **job(repository, SLURM_RESTART_COUNT=restarts))
    lines = done.stdout.splitlines()
    before = lines[: next(place for place, line in enumerate(lines) if line.startswith("srun "))]
    assert before.count("sleep 75") == waits
    assert lines.count("sleep 75") == waits


def call_with_a_run_that_is_ended(
    repository: Path, code: int = 0, files: tuple[str, ...] = ("requeue",), requeues: bool = True
) -> subprocess.CompletedProcess:
    """pararun, with an srun that leaves a run behind and ends with a code."""
    run = repository / "runs/found"
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    (repository / LINK).parent.mkdir(parents=True, exist_ok=True)
    write_script(repository / "bin/srun", f"ln -s '{run}' '{repository}/{LINK}'; exit {code}")
    told = 'echo localhost; if [ "$1" = requeue ]; then echo "$@" >&2; '
    write_script(repository / "bin/scontrol", f"{told} exit {0 if requeues else 1}; fi")
    return call(repository, "pararun", "a.yaml", "key=a b", **job(repository))


def test_a_run_that_is_marked_puts_its_job_back_into_the_queue(repository: Path) -> None:
    done = call_with_a_run_that_is_ended(repository)
    assert (done.returncode, done.stderr) == (0, "requeue 12345\n")
    assert "pararun: back into the queue" in done.stdout


@pytest.mark.parametrize(
    ("code", "files"),
    [(0, ("summary.json",)), (1, ("requeue",)), (130, ())],
    ids=["done", "failed", "Ctrl-C"],
)
def test_another_end_does_not_and_its_exit_code_is_the_jobs(
    repository: Path, code: int, files: tuple[str, ...]
) -> None:
    done = call_with_a_run_that_is_ended(repository, code, files)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_job_that_slurm_is_ending_does_not_put_itself_back(repository: Path) -> None:
    """scancel's SIGTERM may reach other hosts before this one's shell."""
    write_script(
        repository / "bin/squeue", '[ "$*" = "--noheader --jobs=12345 --format=%T" ] && echo COMPLETING'
    )
    done = call_with_a_run_that_is_ended(repository)
    assert (done.returncode, done.stderr) == (0, "")
    assert "queue" not in done.stdout


def test_a_job_that_slurm_does_not_take_back_fails_and_says_how_to_go_on(repository: Path) -> None:
    done = call_with_a_run_that_is_ended(repository, requeues=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "requeue 12345",
        "pararun: SLURM does not take the job back (--no-requeue?); to resume:",
        f"  sbatch pararun a.yaml key=a\\ b --resume {LINK}",
    ]


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

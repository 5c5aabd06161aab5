"""The command line: what run.py answers before anything trains; bad input is one line and exit code 2."""

import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import run
from sage import config
from sage.exchange.comm import LocalComm
from sage.training.dry_run import break_even_density
from sage.training.settings import RunSettings
from sage.workers import group, launch

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
CIFAR10 = str(ROOT / "configs" / "cifar10_resnet18.yaml")
Arrays = dict[str, np.ndarray]
Refuse = Callable[..., str]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand = ("rank", "world_size", "local_rank", "local_world_size", "hostip", "port")
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name in (*by_hand, *torchrun, "SLURM_STEP_NUM_TASKS", "SAGE_DATA"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process, no process group."""

    def start(*_: object, **__: object) -> None:
        pytest.fail("something was started")

    for owner, name in ((launch, "spawn"), (group, "connect"), (subprocess, "Popen"), (os, "fork")):
        monkeypatch.setattr(owner, name, start)


@pytest.fixture
def refuse(
    nothing_starts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Calls main with arguments that it must refuse, and returns the line it says."""
    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("something was built"))

    def refuse(*arguments: str) -> str:
        assert exit_code(*arguments) == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        assert line.startswith("run.py: ")
        return line.removeprefix("run.py: ")

    return refuse


def exit_code(*arguments: str) -> int:
    """Of main, which returns it, or leaves by way of argparse."""
    try:
        return run.main(list(arguments))
    except SystemExit as left:
        code = left.code
    assert isinstance(code, int)
    return code


def made_arrays(num_train: int = 8, num_test: int = 4) -> Arrays:
    return {
        "train_x": np.zeros((num_train, 32, 32, 3), np.uint8),
        "train_y": np.zeros(num_train, np.uint8),
        "test_x": np.zeros((num_test, 32, 32, 3), np.uint8),
        "test_y": np.zeros(num_test, np.uint8),
        "classes": np.array(["airplane", "automobile"]),
    }


def prepare(data: Path, arrays: Arrays) -> Path:
    """Write a prepared CIFAR-10 file."""
    file = data / "cifar10" / "cifar10.npz"
    file.parent.mkdir(parents=True)
    np.savez_compressed(file, **arrays)
    return file


# --- bad input ------------------------------------------------------------------------------------


def test_a_missing_config_is_refused(refuse: Refuse) -> None:
    assert refuse() == "CONFIG is missing: expected a YAML file (--help explains)"
    assert refuse("--workers", "2").startswith("CONFIG is missing")


def test_a_missing_file_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "missing.yaml"
    assert refuse(str(path)) == f"{path}: cannot be read: No such file or directory"


def test_a_file_that_is_no_mapping_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("[1, 2]")
    assert refuse(str(path)) == f"{path}: expected a mapping of keys to values, got [1, 2]"


@pytest.mark.parametrize(
    "workers",
    [[], ["--workers", "2"], ["--simulate", "2"]],
    ids=["one worker", "two workers", "two simulated"],
)
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("task.name=digit", "did you mean digits?"),
        ("task.model=small_cn", "expected small_cnn, got 'small_cn'; did you mean small_cnn?"),
        ("reducer.name=sagee", "did you mean sage?"),
        ("reducer.densty=0.1", "did you mean density?"),
        ("reducer.density=0", "expected a number in (0, 1], got 0"),
        ("reducer.density=2", "expected a number in (0, 1], got 2"),
        ("reducer.density=lots", "expected a number in (0, 1], got 'lots'"),
        ("reducer.threshold=-1", "expected a number in [1.2e-38, 3.4e+38] or auto, got -1"),
        ("optimizer.lr=nan", "expected a number in (0, inf), got 'nan'"),
        ("optimizer.lr=.nan", "expected a number in (0, inf), got .nan"),
    ],
)
def test_a_bad_value_is_refused(refuse: Refuse, workers: list[str], override: str, told: str) -> None:
    line = refuse(DIGITS, override, *workers)
    assert line.startswith(override.partition("=")[0] + ": ")
    assert line.endswith(told)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["reducer.name=exact"], "feedback.name: momentum: expected a reducer that sends selected elements"),
        (["optimizer.name=adam"], "optimizer.name: expected sgd with feedback momentum, got adam"),
        ([], "optimizer.momentum: expected 0 (and nesterov: false) with feedback momentum"),
    ],
)
def test_momentum_that_cannot_work_with_the_other_parts_is_refused(
    refuse: Refuse, overrides: list[str], told: str
) -> None:
    assert refuse(DIGITS, "feedback.name=momentum", *overrides, "--workers", "2").startswith(told)


@pytest.mark.parametrize("name", ["signsgd", "signum"])
@pytest.mark.parametrize("feedback", ["residual", "momentum"])
def test_a_vote_takes_no_error_feedback(refuse: Refuse, name: str, feedback: str) -> None:
    told = f"feedback.name: expected none, since {name} leaves no error to feed back, got {feedback}"
    assert refuse(DIGITS, f"reducer.name={name}", f"feedback.name={feedback}") == told


@pytest.mark.parametrize("option", ["--workers", "--simulate", "--threads"])
@pytest.mark.parametrize("count", ["0", "x", "-1", "1.5", "", "1000000000"])
def test_a_count_below_one_or_beyond_reason_is_refused(refuse: Refuse, option: str, count: str) -> None:
    most = 1024 if option == "--threads" else 4096
    told = f"argument {option}: expected an integer in [1, {most}], got {count!r} (--help explains)"
    assert refuse(DIGITS, f"{option}={count}") == told


def test_more_workers_than_the_memory_holds_are_refused(refuse: Refuse) -> None:
    line = refuse(DIGITS, "--workers=4096")
    assert re.fullmatch(
        r"--workers: expected at most \d+, since a process takes about 400 MB before its model and "
        r"[\d.]+ [GT]B are free, got 4096",
        line,
    )


def test_a_sweeps_file_and_a_configuration_are_told_apart(refuse: Refuse) -> None:
    sweep = "configs/sweeps/ablation.yaml"
    assert (
        refuse(sweep)
        == f"{sweep}: this is a sweep's file, not a configuration: python run.py --sweep {sweep}"
    )
    expected = f"{DIGITS}: this is a configuration, not a sweep's file: python run.py {DIGITS}"
    assert refuse("--sweep", DIGITS) == expected


def test_an_unknown_option_is_refused(refuse: Refuse) -> None:
    assert refuse(DIGITS, "--wrokers=2") == "unrecognized arguments: --wrokers=2 (--help explains)"


@pytest.mark.parametrize(
    ("batch", "workers", "most"), [(1438, 1, 1437), (719, 2, 718), (480, 3, 479), (1, 1438, 0)]
)
def test_a_batch_larger_than_the_workers_data_is_refused(
    refuse: Refuse, batch: int, workers: int, most: int
) -> None:
    line = refuse(DIGITS, f"task.batch_per_worker={batch}", "--simulate", str(workers))
    assert line.startswith(f"task.batch_per_worker: expected at most {most} ")
    assert line.endswith(f"got {batch}")


def test_a_data_folder_without_the_file_is_refused_with_the_command_that_makes_it(
    refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (
        f"{tmp_path}/cifar10/cifar10.npz: there is no such file; "
        f"make it with: ./prepare_dataset.sh cifar10 --data {tmp_path}"
    )
    assert refuse(CIFAR10, "--data", str(tmp_path)) == line
    assert refuse(CIFAR10, "--data", str(tmp_path), "--dry-run", "--workers", "2") == line
    monkeypatch.setenv("SAGE_DATA", str(tmp_path))
    assert refuse(CIFAR10) == line


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"train_x": None}, "expected the arrays train_x, train_y, test_x, test_y, got train_y, test_x,"),
        ({"test_y": None}, "expected the arrays train_x, train_y, test_x, test_y, got train_x, train_y,"),
        (
            {"train_x": np.zeros((8, 3, 32, 32), np.uint8)},
            "expected train_x as uint8 (N, 32, 32, 3), got uint8",
        ),
        (
            {"test_x": np.zeros((4, 32, 32), np.uint8)},
            "expected test_x as uint8 (N, 32, 32, 3), got uint8 (4, 32,",
        ),
        (
            {"test_x": np.zeros((0, 32, 32, 3), np.uint8)},
            "expected test_x as uint8 (N, 32, 32, 3), got uint8 (0,",
        ),
        ({"train_x": np.uint8(3)}, "expected train_x as uint8 (N, 32, 32, 3), got uint8 ()"),
        ({"train_y": np.zeros(7, np.uint8)}, "expected train_y as uint8 (8,), got uint8 (7,)"),
        ({"test_y": np.zeros((4, 1), np.uint8)}, "expected test_y as uint8 (4,), got uint8 (4, 1)"),
        ({"train_x": np.zeros((8, 32, 32, 3), np.float32)}, "got float32 (8, 32, 32, 3)"),
        ({"test_y": np.zeros(4, np.int64)}, "expected test_y as uint8 (4,), got int64 (4,)"),
    ],
)
def test_a_prepared_file_with_wrong_keys_shape_or_type_is_refused(
    refuse: Refuse, tmp_path: Path, change: dict[str, np.ndarray | None], told: str
) -> None:
    arrays = {key: value for key, value in (made_arrays() | change).items() if value is not None}
    file = prepare(tmp_path, arrays)
    line = refuse(CIFAR10, "--data", str(tmp_path), "task.batch_per_worker=2", "--workers", "2")
    assert line.startswith(f"{file}: expected ")
    assert told in line


def zip_of_texts(_: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("train_x.npy", "no array")
    return buffer.getvalue()


def damaged_in_the_first_array(whole: bytes) -> bytes:
    """The bytes of the first compressed array, after its name, are 0xff."""
    start = whole.index(b"train_x.npy") + len("train_x.npy") + 20  # 20: the zip64 field that numpy writes
    return whole[:start] + b"\xff" * 20 + whole[start + 20 :]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda whole: b"", id="empty"),
        pytest.param(lambda whole: b"these are words, not a zip file", id="not a zip"),
        pytest.param(lambda whole: whole[: len(whole) // 2], id="half of it"),
        pytest.param(lambda whole: whole[:-1], id="without its last byte"),
        pytest.param(zip_of_texts, id="a zip of texts"),
        pytest.param(damaged_in_the_first_array, id="damaged"),
    ],
)
def test_a_prepared_file_that_cannot_be_read_is_refused(
    refuse: Refuse, tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    file = prepare(tmp_path, made_arrays())
    file.write_bytes(spoil(file.read_bytes()))
    line = refuse(CIFAR10, "--data", str(tmp_path), "task.batch_per_worker=2", "--workers", "2")
    assert line.startswith(f"{file}: expected a prepared npz file; it cannot be read: ")


def test_workers_other_than_the_launchers_are_refused(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    line = refuse(DIGITS, "--workers", "3")
    assert line.startswith("--workers: expected 2, ")
    assert line.endswith(", got 3")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert refuse(DIGITS) == "WORLD_SIZE: expected a number in [1, 2147483648] from the launcher, got 'two'"


def test_a_simulation_is_one_process_without_a_launcher(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = "argument --workers: not allowed with argument --simulate (--help explains)"
    assert refuse(DIGITS, "--simulate", "2", "--workers", "2") == told
    line = refuse(DIGITS, "--simulate", "45")  # times 32 images
    assert line.startswith("task.batch_per_worker: expected at most 31 ")
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "--simulate: expected one process without a launcher, got one with WORLD_SIZE in its environment"
    assert refuse(DIGITS, "--simulate", "2") == told
    assert refuse(DIGITS, "--simulate", "2", "--dry-run") == told


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "5", "WORLD_SIZE": "1"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "99999"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1234"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK"),
    ],
)
def test_a_launchers_bad_variable_is_named(
    refuse: Refuse, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], named: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refuse(DIGITS).startswith(f"{named}: expected ")


def test_a_world_size_without_anything_that_starts_workers_is_refused(refuse: Refuse) -> None:
    assert refuse(DIGITS, "world_size=2").startswith("rank: expected a number in [0, 1], got nothing; start ")
    assert refuse(DIGITS, "world_size=2", "--workers", "3").startswith("--workers: expected 2, ")
    assert refuse(DIGITS, "world_size=0") == "world_size: expected an integer in [1, inf) or null, got 0"


def test_a_place_where_no_run_can_be_kept_is_refused(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refuse(DIGITS, "--runs", str(tmp_path / "file")).startswith(
        f"--runs {tmp_path / 'file'}: expected "
    )


def test_of_a_launchers_workers_one_a_host_says_what_is_wrong(
    nothing_starts: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    slept: list[float] = []
    monkeypatch.setattr(launch.time, "sleep", slept.append)
    assert exit_code(DIGITS, "reducer.density=2") == 2
    assert capsys.readouterr() == ("", "")
    assert slept == [launch.PATIENCE_SECONDS]  # the launcher ends all when one ends, and rank 0 may be late
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert exit_code(DIGITS, "reducer.density=2") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_refusal_ends_the_process_with_code_2_one_line_and_no_traceback() -> None:
    command = [sys.executable, "run.py", "missing.yaml", "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    told = "run.py: missing.yaml: cannot be read: No such file or directory\n"
    assert done.stderr == told


# --- what is only told ----------------------------------------------------------------------------


def test_help_explains_overrides_within_80_columns(
    nothing_starts: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert exit_code("--help") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert max(map(len, said.out.splitlines())) <= 80
    for words in (
        "key.path=value",
        "reducer.name=exact",
        "--workers",
        "--simulate",
        "--data",
        "--print-config",
        "--dry-run",
        "--evaluate",
    ):
        assert words in said.out


@pytest.mark.parametrize("path", [DIGITS, CIFAR10])
def test_print_config_prints_yaml_that_loads_to_the_same_settings(
    nothing_starts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    overrides = ["reducer.density=1e-2", "reducer.exchange=union", "optimizer.name=adam"]
    assert exit_code(path, *overrides, "--print-config", "--workers", "2") == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert yaml.safe_load(said.out)["reducer"]["density"] == 0.01
    printed = tmp_path / "printed.yaml"
    printed.write_text(said.out)
    settings = config.load(printed, [], RunSettings, run.TABLES)
    assert settings == config.load(Path(path), overrides, RunSettings, run.TABLES)


def test_a_configuration_is_printed_without_what_only_training_or_a_report_needs() -> None:
    """Each of these takes longer than all that --print-config has to do."""
    slow = {"torchvision", "torchtext", "spacy", "sklearn", "scipy", "pandas", "tensorboard"}
    slow |= {"matplotlib", "torch.distributed.elastic", "torch._dynamo", "torch.utils.tensorboard"}
    program = f"""
import sys
import run
for path in {[str(path) for path in sorted((ROOT / "configs").glob("*.yaml"))]}:
    assert run.main([path, "--print-config"]) == 0
print(sorted({slow} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_options_and_overrides_may_stand_in_any_order(
    nothing_starts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("--workers", "2", DIGITS, "epochs=3", "--print-config", "seed=4") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["epochs"], printed["seed"]) == (3, 4)


def test_a_reader_who_leaves_early_is_no_error() -> None:
    command = f"set -o pipefail; {sys.executable} run.py {DIGITS} --print-config | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_dry_run_tells_what_a_run_would_be_and_leaves_no_file(
    nothing_starts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prepare(tmp_path, made_arrays(num_train=21))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = [
        "--data",
        str(tmp_path),
        "--dry-run",
        "--workers",
        "2",
        "task.batch_per_worker=3",
        "epochs=5",
    ]
    assert exit_code(CIFAR10, *arguments) == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr()
    assert said.err == ""
    told = dict(line.split(maxsplit=1) for line in said.out.splitlines())
    assert told["parameters"] == "11,173,962 in 62 tensors"
    assert told["workers"] == "2"
    assert told["batch"] == "3 a worker, 6 in all"
    assert told["steps"] == "3 an epoch, 15 in 5 epochs"  # 21 // 6
    # At density 0.001 a worker sends 11,173 values and indices of 4 bytes each, and one size of 4 bytes:
    # 89,388 bytes; the dense gradient has 4 * 11,173,962 = 44,695,848.
    assert told["payload"].startswith("89.4 kB ")
    assert "0.200%" in told["payload"]
    assert "44.7 MB" in told["payload"]
    assert told["break-even"] == "below density 0.5 a gather sends less than exact does; 16-bit: 0.25"
    # Two workers: an all-reduce is two messages of half the bytes, a gather one of them all; 8 ns a byte at
    # 1 Gbit/s, 1538 / 1448 for frames.
    exact, half = 4 * 11_173_962, 2 * 11_173_962
    dense, dense_half, sent = (size * 8e-6 * 1538 / 1448 for size in (exact, half, 89_388))
    assert told["1gbit"].startswith(f"exact {dense + 0.1:.3g}, bfloat16 {dense_half + 0.1:.3g}, this ")
    saved = float(told["1gbit"].split("saves ")[1].split()[0])
    # one or two messages of 50 microseconds: with or without the lengths
    assert 0 <= dense_half + 0.1 - sent - saved <= 0.105 + 0.005 * saved


@pytest.mark.parametrize(("world_size", "full", "half"), [(4, 0.25, 0.125), (16, 0.0625, 0.03125)])
def test_at_the_break_even_density_a_gather_sends_what_a_dense_all_reduce_does(
    world_size: int, full: float, half: float
) -> None:
    for size, dtype, density in ((4, torch.float32, full), (2, torch.bfloat16, half)):
        assert break_even_density(world_size, size) == density
        dense = LocalComm.run(world_size, lambda comm, dtype=dtype: sent_in_all_reduce(comm, dtype))
        # 1024 elements; a selected one is an int32 index and a value of 4 bytes.
        gathered = LocalComm.run(world_size, lambda comm, density=density: sent_in_gather(comm, 2 * density))
        assert dense == gathered


def sent_in_all_reduce(comm: LocalComm, dtype: torch.dtype) -> float:
    comm.all_reduce(torch.zeros(1024, dtype=dtype))
    return comm.ledger.take()["wire_bytes"]


def sent_in_gather(comm: LocalComm, messages: float) -> float:
    """messages: of 4 bytes an element, as a fraction of 1024."""
    comm.all_gather(torch.zeros(int(1024 * messages), dtype=torch.int32))
    return comm.ledger.take()["wire_bytes"]


def test_one_worker_has_no_break_even_and_is_told_of_sixteen(
    nothing_starts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(DIGITS, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "break-even" not in shown
    assert "50 µs a message, 16 workers (--workers gives another number)" in shown


def test_a_dry_run_of_the_largest_batch_that_fits_is_not_refused(
    nothing_starts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(DIGITS, "task.batch_per_worker=718", "--workers", "2", "--dry-run") == 0
    assert "718 a worker, 1436 in all" in capsys.readouterr().out

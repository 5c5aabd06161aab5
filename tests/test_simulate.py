"""A simulation is the run of as many processes: the same bits, in one process, on one model."""

import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import run
from reducers.exact import Exact
from sage import cli, config
from sage.exchange.comm import LocalComm
from sage.exchange.threads import ThreadRoom
from sage.interfaces import Communicator
from sage.report import __main__ as report
from sage.training.dry_run import bytes_of
from sage.training.simulate import SimulatedContext, TurnLock, _same_bits
from sage.workers import launch
from tasks.models.small_cnn import small_cnn

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
DOCS = str(ROOT / "configs" / "python_docs.yaml")
SHORT = ["epochs=2", "task.batch_per_worker=64", "log.tensorboard=false"]
# Dropout draws from torch's global generator, which the simulated workers share.
SHORT_TEXT = [
    "epochs=1", "task.units=8", "task.layers=2", "task.dropout=0.5", "task.train_tokens=2000",
    "task.batch_per_worker=8", "task.bptt=10", "log.tensorboard=false", "log.every=1",
]  # fmt: skip


@pytest.fixture(autouse=True)
def restored() -> Any:
    """run.main sets threads, determinism and the global generator; here it runs within the tests' process."""
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)


def simulate(runs: Path, world_size: int, *arguments: str) -> Path:
    """Simulate a run in this process; its folder."""
    words = [*arguments, "--simulate", str(world_size), "--threads", "1", "--runs", str(runs)]
    assert run.main(words) == 0
    return next(runs.glob("*/*"))


def start(runs: Path, *arguments: str) -> Path:
    """Run in a process of its own; its folder."""
    command = [sys.executable, "run.py", *arguments, "--threads", "1", "--runs", str(runs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(runs.glob("*/*"))


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoints" / "final.pt", weights_only=True)


def numbers(folder: Path) -> list[Any]:
    """The lines of metrics.jsonl, without the seconds."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses, densities, thresholds, bytes and scores in every line, and the final weights: bit for bit."""
    assert numbers(one) == numbers(other)
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("reducer", ["sage", "topk"])
def test_with_a_reducer_that_gathers_and_batch_normalisation_it_is_two_processes(
    reducer: str, tmp_path: Path
) -> None:
    words = [DIGITS, *SHORT, f"reducer.name={reducer}"]
    assert_same_run(simulate(tmp_path / "s", 2, *words), start(tmp_path / "w", *words, "--workers", "2"))


def test_with_dropout_and_a_hidden_state_it_is_two_processes(tmp_path: Path) -> None:
    words = [DOCS, *SHORT_TEXT, "reducer.name=sage", "reducer.density=0.05"]
    simulated = simulate(tmp_path / "s", 2, *words)
    assert_same_run(simulated, start(tmp_path / "w", *words, "--workers", "2"))
    # Dropout was in play: without it the losses are others.
    without = simulate(tmp_path / "n", 2, *words, "task.dropout=0")
    assert numbers(simulated)[0]["loss"] != numbers(without)[0]["loss"]


def test_one_simulated_worker_is_the_ordinary_one(tmp_path: Path) -> None:
    assert_same_run(simulate(tmp_path / "s", 1, DIGITS, *SHORT), start(tmp_path / "o", DIGITS, *SHORT))


def test_two_workers_repeat_bit_for_bit_and_with_exact_are_two_processes(tmp_path: Path) -> None:
    """x + y is y + x: the law's bound for other orders of a sum is 0 for two workers."""
    words = [DIGITS, *SHORT, "reducer.name=exact", "feedback.name=none", "clip.norm=0.5"]
    first = simulate(tmp_path / "first", 2, *words)
    assert_same_run(first, simulate(tmp_path / "again", 2, *words))
    assert_same_run(first, start(tmp_path / "w", *words, "--workers", "2"))


def test_with_exact_and_three_workers_a_step_differs_by_the_order_of_the_sum_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lr, sent = 0.05, []
    reduce = Exact.reduce

    def keep(self: Exact, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        sent.append(send.clone())
        reduce(self, send, mean, comm)

    monkeypatch.setattr(Exact, "reduce", keep)
    words = [DIGITS, "reducer.name=exact", "epochs=1", "task.batch_per_worker=479", "log.tensorboard=false"]
    words += [f"optimizer={{name: sgd, lr: {lr}}}", "schedule={}"]  # one step, w <- w - lr g
    simulated = weights(simulate(tmp_path / "s", 3, *words))
    processes = weights(start(tmp_path / "w", *words, "--workers", "3"))
    # Before its only step each worker has made one on the smallest parameter (warm_up).
    magnitudes, begin = torch.stack(sent[-3:]).abs().sum(0), 0  # (n,), sum |x_i|
    assert len(sent) == 6
    for name, parameter in small_cnn(10).named_parameters():
        sums = magnitudes[begin : (begin := begin + parameter.numel())].view(parameter.shape)
        # The sums differ by at most 2 (W-1) 2^-24 sum|x_i|; the division by W, the product with lr and the
        # subtraction round once on each side, by 2^-24 of a number of at most lr sum|x_i| / W, and of |w|.
        bound = 2.0**-24 * (lr / 3 * sums * (4 + 2 * 2) + 2 * simulated[name].abs())
        assert ((simulated[name] - processes[name]).abs() <= bound).all(), name


def test_sixteen_workers_train_and_leave_what_a_run_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = simulate(tmp_path, 16, DIGITS, "epochs=2", "log.tensorboard=false")
    assert "16 simulated workers in turn on cpu" in capsys.readouterr().out
    for name in ("summary.json", "environment.json"):
        told = json.loads((folder / name).read_text())
        assert (told["world_size"], told["simulated"]) == (16, True)
    assert (told["backend"], len(told["workers"])) == ("threads", 16)
    steps = [line for line in numbers(folder) if line["kind"] == "step"]
    assert len(steps) == 4  # 1437 // (16 * 32) = 2 an epoch
    assert all(line["density"] < line["union_density"] < 16 * line["density"] for line in steps)
    assert report.read_run(folder).workload == "digits, world size 16, simulated"


def test_what_workers_hold_alike_is_found_by_its_bits_whatever_its_layout() -> None:
    pairs = torch.tensor([[1, 7], [2, 8], [3, 9]], dtype=torch.int32)
    column = pairs[:, 0]  # as the ratings' users are
    assert column.stride() == (2,)
    assert _same_bits(column, torch.tensor([1, 2, 3], dtype=torch.int32))
    assert not _same_bits(column, pairs[:, 1])
    assert _same_bits(torch.tensor(2.5), torch.tensor(2.5))
    nan = torch.tensor([float("nan"), 0.0])
    assert _same_bits(nan, nan.clone())
    assert not _same_bits(nan, torch.tensor([float("nan"), -0.0]))
    assert not _same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.int32))


# --- what ends one ----------------------------------------------------------------------------------


def fail_with(error: Exception, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's third exchange raises."""
    reduce, calls = Exact.reduce, []

    def broken(self: Exact, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        calls.append(comm.rank)
        if comm.rank == rank and calls.count(rank) == 3:
            raise error
        reduce(self, send, mean, comm)

    monkeypatch.setattr(Exact, "reduce", broken)


@pytest.mark.parametrize(
    ("error", "line", "traces"),
    [
        (OSError(28, "No space left on device"), "rank 2: [Errno 28] No space left on device", False),
        (
            ZeroDivisionError("by zero"),
            "worker 2 was the first to fail (ZeroDivisionError: by zero); the run has ended",
            True,
        ),
    ],
)
def test_a_failing_worker_ends_the_run_and_is_named(
    error: Exception,
    line: str,
    traces: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail_with(error, 2, monkeypatch)
    words = [DIGITS, *SHORT, "reducer.name=exact", "--simulate", "4", "--runs", str(tmp_path)]
    assert run.main(words) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"run.py: {line}"
    assert ("Traceback (most recent call last):" in said) == traces
    assert traces or len(said) == 1
    (folder,) = tmp_path.glob("*/*")
    assert (folder / "metrics.jsonl").exists()
    assert not (folder / "summary.json").exists()


def test_a_diverging_run_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [DIGITS, *SHORT, "optimizer.lr=1e30", "--simulate", "2", "--runs", str(tmp_path)]
    assert run.main(words) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("run.py: the loss became ")


def test_workers_with_different_means_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rank 0 alone applies its mean, so the weights cannot differ; the means can."""

    def own(self: Exact, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        mean.copy_(send)
        send.zero_()

    monkeypatch.setattr(Exact, "reduce", own)
    words = [DIGITS, *SHORT, "reducer.name=exact", "--simulate", "2", "--runs", str(tmp_path)]
    assert run.main(words) == 1
    told = "run.py: the replicas differ after epoch 0: the mean gradient of 0.weight of ranks 0 and 1"
    assert capsys.readouterr().err.splitlines() == [told]


# --- what is shared, and what is not ----------------------------------------------------------------


def built(words: list[str], world_size: int, tmp_path: Path) -> list[Any]:
    """The tasks of a simulation's workers, from rank 1 on, then rank 0."""
    options = cli.parse([*words, "--simulate", str(world_size)])
    settings = config.load(options.config, options.overrides, run.RunSettings, run.TABLES)
    worker, shared, tasks = launch.find_worker(1, tmp_path, None, None, world_size), [], []
    for rank in (*range(1, world_size), 0):
        comm = LocalComm(rank, ThreadRoom(world_size, 1))
        parts = run.build(settings, worker.with_rank(rank))
        SimulatedContext(comm, TurnLock(threading.Lock(), worker.device), shared).share(parts.task)
        assert parts.gradient.flat.numel()  # the parameters have gradients now
        tasks.append(parts.task)
    return tasks


def place_of(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_weights_and_training_data_are_held_once_and_the_rest_is_each_workers_own(tmp_path: Path) -> None:
    tasks = built([DIGITS, *SHORT], 3, tmp_path)
    for parameters in zip(*(task.model.parameters() for task in tasks), strict=True):
        assert len({place_of(parameter.data) for parameter in parameters}) == 1
        assert len({parameter.grad.data_ptr() for parameter in parameters}) == 3
    for buffers in zip(*(task.model.buffers() for task in tasks), strict=True):
        assert len({place_of(buffer) for buffer in buffers}) == 3
    assert len({place_of(task._train_x) for task in tasks}) == 1
    assert len({place_of(task._test_x) for task in tasks}) == 3
    assert sum(len(task._test_x) for task in tasks) == 360


def test_a_tasks_state_is_never_shared(tmp_path: Path) -> None:
    one, other = built([DOCS, *SHORT_TEXT], 2, tmp_path)
    assert torch.equal(one.hidden, other.hidden)  # zeros
    assert place_of(one.hidden) != place_of(other.hidden)
    assert one.model.decoder.weight is one.model.embedding.weight
    assert place_of(one.model.decoder.weight) == place_of(other.model.embedding.weight)


def test_each_turn_finds_the_global_generator_as_its_worker_left_it() -> None:
    lock = threading.Lock()
    turns = [TurnLock(lock, torch.device("cpu")) for _ in range(2)]
    for seed, turn in enumerate(turns):
        with turn:
            torch.manual_seed(seed)
    drawn: list[list[float]] = [[], []]
    for index in (0, 1, 1, 0):
        with turns[index]:
            drawn[index] += [torch.rand(()).item()]
            with turns[index].released():  # another worker draws meanwhile
                torch.rand(7)
            drawn[index] += [torch.rand(()).item()]
    for seed in range(2):
        torch.manual_seed(seed)
        assert drawn[seed] == [torch.rand(()).item() for _ in range(4)]


# --- what a dry run tells ---------------------------------------------------------------------------


def dry_run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    assert run.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    return dict(line.split(maxsplit=1) for line in said.out.splitlines())


# digits' CNN: 151,402 parameters of 4 bytes; BatchNorm of 32 and 64 channels: means, variances, a count.
PARAMETERS, BUFFERS = 4 * 151_402, 4 * 2 * (32 + 64) + 8 * 2


@pytest.mark.parametrize(
    ("optimizer", "state"),
    [
        ("{name: sgd, lr: 0.1}", 0),
        ("{name: sgd, lr: 0.1, momentum: 0.9}", PARAMETERS),
        ("{name: sgd, lr: 0.1, momentum: 0.9, nesterov: true, nesterov_form: published}", PARAMETERS),
        ("{name: adam, lr: 0.1}", 2 * PARAMETERS + 4 * 10),  # two moments, and a count for each of 10 tensors
    ],
)
def test_a_dry_run_tells_what_a_worker_holds(
    optimizer: str, state: int, capsys: pytest.CaptureFixture[str]
) -> None:
    told = dry_run(capsys, DIGITS, "reducer.name=exact", f"optimizer={optimizer}")
    assert told["memory"] == (
        f"{3 * PARAMETERS + BUFFERS + state:,} B a worker: parameters {PARAMETERS:,}, buffers {BUFFERS:,}, "
        f"gradient {PARAMETERS:,}, residual {PARAMETERS:,}, optimizer {state:,}, reducer 0; "
        "data and activations not counted"
    )
    assert "simulated" not in told


def test_a_reducers_own_tensors_are_counted_once_each() -> None:
    shared = torch.zeros(10)
    holder = SimpleNamespace(
        a=shared, b=[shared[2:4], {"c": np.zeros(3)}], rng=torch.Generator(), kind=SimpleNamespace
    )
    holder.itself = holder
    assert bytes_of(holder) == 10 * 4 + 3 * 8


def test_a_simulations_dry_run_tells_memory_of_all_and_the_time_of_a_step(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = dry_run(capsys, DIGITS, "reducer.name=exact", "--simulate", "16")
    once, each = 2 * PARAMETERS, 2 * PARAMETERS + BUFFERS  # with momentum; gradient, residual, buffers
    in_all = f"{once + 16 * each:,} B for 16: parameters and optimizer are held once"
    assert told["simulated"] == in_all
    number = r"[\d.e+]+"
    one, every, epoch = (rf"{number} {unit}" for unit in ("ms", "ms", "s"))
    pattern = f"{one} a worker's gradient step, measured; so about {every} a step of all 16, {epoch} an epoch"
    assert re.fullmatch(pattern, told["time"])
    assert not list(tmp_path.iterdir())

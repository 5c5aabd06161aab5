"""What needs a GPU: the CPU's results on it, the same bits again, and a host that does not wait.

    python -m pytest -m gpu tests/test_gpu.py

With --rehearse the tests run on the CPU, to try the tests themselves: what they say of a GPU is not shown.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn

from benchmarks.gpu.checks import Setup
from benchmarks.gpu.training import count_waits
from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.exchange.deadline import Deadline
from sage.exchange.echo import EchoComm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import FEEDBACKS
from sage.interfaces import CommunicationError, Place, Progress
from sage.training.settings import RunSettings
from tests.cases import CASES, LAYOUT, Case, N, Step, gradient, run_case, run_steps
from tests.toy import ToyTask, settings_of, trainer_of

pytestmark = [
    pytest.mark.gpu,
    # A warning of a driver or of another version of torch is no failure of ours.
    pytest.mark.filterwarnings("default"),
]
CPU = torch.device("cpu")
WITHOUT_WAITS = (
    "exact",
    "topk",
    "global_topk",
    "clt_k",
    "powersgd",
    "random_k",
    "random_block",
    "sign_norm",
    "signsgd",
    "signum",
    "onebit",
    "qsgd",
    "terngrad",
    "natural",
    "block_int",
)
"""Reducers whose plain step never lets the host wait for the device."""
NUM_LOGGING_WAITS = 3
"""How often a logging step may wait, at most."""
SPECTRAL = ("svd", "atomo")
every_case = pytest.mark.parametrize("case", CASES, ids=str)
in_both_modes = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "as it comes"])


@pytest.fixture(scope="module")
def device(request: pytest.FixtureRequest) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if not request.config.getoption("--rehearse"):
        pytest.skip("needs a GPU: torch.cuda.is_available() is false")
    return CPU


@pytest.fixture(autouse=True)
def _torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs set up their process; the next test finds it as it was."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to be deterministic
    was, num_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(was)
    torch.set_num_threads(num_threads)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return torch.equal(a.cpu().view(torch.int32), b.cpu().view(torch.int32))


# --- the CPU's results ----------------------------------------------------------------------------


Recorded = tuple[dict[str, Any], Tensor, Step]
"""A reducer's state and a memory (n,) before a step on the CPU, and the step."""


def record(case: Case, comm: LocalComm) -> list[Recorded]:
    """Six steps of a worker on the CPU."""
    reducer, memory, recorded = case.build(rank=comm.rank), torch.zeros(N), []
    for number in range(6):
        state, before = reducer.state_dict(), memory.clone()
        (step,) = run_steps(reducer, comm, range(number, number + 1), memory)
        recorded.append((state, before, step))
    return recorded


def replay(case: Case, comm: LocalComm, recorded: list[Recorded], device: torch.device) -> list[Step]:
    """The same steps on a device, each from the recorded state, so that rounding is not fed back."""
    reducer, steps = case.build(rank=comm.rank, device=device), []
    for number, (state, memory, _) in enumerate(recorded):
        reducer.load_state_dict(state)
        steps += run_steps(reducer, comm, range(number, number + 1), memory.to(device, copy=True))
    return steps


def tolerance(case: Case, steps: list[Step]) -> float:
    """How far two devices may be apart in a step (one of each worker's), absolutely; 0: equal bits.

    Each is at most the row's rounding away from the exact result; singular vectors also turn.
    """
    found = 2 * case.rounding * max(step.before.abs().max().item() for step in steps)
    if case.reducer in SPECTRAL:
        found += 2 * max(_turning(step.before) for step in steps)
    return found


def _turning(send: Tensor) -> float:
    """How far the atoms of a matrix move as its singular vectors turn, in the worst matrix.

    A decomposition is that of a matrix 27 2^-24 sigma_1 away, 27 its longer side. Over the least gap between
    two singular values that is the angle; an atom weighs at most the sum of the singular values.
    """
    found = []
    for slot in LAYOUT:
        if len(slot.shape) > 1:
            matrix = send[slot.start : slot.stop].view(slot.shape[0], -1).double()
            values = torch.linalg.svdvals(matrix)
            angle = 27 * 2**-24 * values[0] / -values.diff().max()
            found.append((angle * values.sum()).item())
    return max(found)


@every_case
@in_both_modes
def test_a_step_gives_what_it_gives_on_the_cpu(case: Case, deterministic: bool, device: torch.device) -> None:
    torch.use_deterministic_algorithms(deterministic)
    recorded = LocalComm.run(2, lambda comm: record(case, comm))
    replayed = LocalComm.run(2, lambda comm: replay(case, comm, recorded[comm.rank], device))
    for number in range(6):
        ours = [worker[number] for worker in replayed]
        theirs = [worker[number][2] for worker in recorded]
        assert same_bits(ours[0].mean, ours[1].mean)
        allowed = tolerance(case, theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.counted == b.counted
            if case.fixed_count or case.count is None:  # else a GPU's may be known a step later
                assert a.density == b.density
            for on_device, on_cpu in ((a.mean, b.mean), (a.after, b.after)):
                if allowed == 0:
                    assert same_bits(on_device, on_cpu)
                else:
                    assert (on_device.cpu() - on_cpu).abs().max().item() <= allowed


@every_case
def test_two_runs_on_the_device_give_the_same_bits(case: Case, device: torch.device) -> None:
    torch.use_deterministic_algorithms(True)
    first, second = (LocalComm.run(2, lambda comm: run_case(case, comm, device=device)) for _ in range(2))
    for a, b in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert a.mean.device == device
        assert same_bits(a.mean, b.mean)
        assert same_bits(a.after, b.after)
        assert a.metrics == b.metrics


@every_case
def test_six_steps_on_the_device_are_three_and_a_reload_and_three(
    case: Case, device: torch.device, tmp_path: Path
) -> None:
    torch.use_deterministic_algorithms(True)

    def resumed(comm: LocalComm) -> list[Step]:
        reducer, memory = case.build(rank=comm.rank, device=device), torch.zeros(N, device=device)
        first, file = run_steps(reducer, comm, range(3), memory), tmp_path / f"{comm.rank}.pt"
        torch.save({"reducer": reducer.state_dict(), "memory": memory}, file)
        state = torch.load(file, weights_only=True, map_location="cpu")
        reloaded = case.build(rank=comm.rank + 10, device=device)  # what repeats must come from the state
        reloaded.load_state_dict(state["reducer"])
        return first + run_steps(reloaded, comm, range(3, 6), state["memory"].to(device))

    straight = LocalComm.run(2, lambda comm: run_case(case, comm, device=device))
    broken = LocalComm.run(2, resumed)
    for a, b in zip(straight[0] + straight[1], broken[0] + broken[1], strict=True):
        assert same_bits(a.mean, b.mean)
        assert same_bits(a.after, b.after)


# --- precision ------------------------------------------------------------------------------------


class ConvolutionTask(ToyTask):
    """A convolution and a matrix product, wide enough for a GPU's units for TF32."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(8, Place(0, 1))
        rng = torch.Generator().manual_seed(0)
        layers = nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(), nn.Linear(64 * 64, 64)
        self.model = nn.Sequential(*layers)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) / parameter.shape[-1] ** 0.5)
        self.model.to(device, dtype)
        self.images = torch.randn(8, 64, 8, 8, generator=rng).to(device, dtype)

    def loss(self, batch: slice) -> Tensor:
        return F.mse_loss(self.model(self.images), torch.zeros(8, 64).to(self.images))


def gradient_with(precision: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """(n,) float64: the gradient that a trainer computes with these settings, on the CPU."""
    task = ConvolutionTask(device, dtype)
    with trainer_of(settings_of(precision=precision), LocalComm.alone(), task=task, dtype=dtype) as trainer:
        trainer.compute_gradient(iter([slice(0)]))
        return trainer.gradient.flat.double().cpu()


def test_float32_is_float32_and_tf32_is_a_choice(device: torch.device) -> None:
    exact = gradient_with("float32", CPU, torch.float64)

    def error(precision: str) -> float:
        return ((gradient_with(precision, device) - exact).norm() / exact.norm()).item()

    # Sums of at most 4096 products, whose rounding errors of 2^-24 each mostly cancel; TF32 rounds every
    # factor by up to 2^-11.
    assert error("float32") < 64 * 2**-24
    if device.type == "cuda" and "tf32" in get_args(RunSettings.model_fields["precision"].annotation):
        assert 2**-16 < error("tf32") < 2**-8


# --- waits ----------------------------------------------------------------------------------------


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Every wait of the host for a GPU in the with-block raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def fixed_size_cases() -> list[tuple[Case, str]]:
    """The rows whose plain step has no size to read, with each feedback that they can have."""
    found = []
    for case in CASES:
        if case.reducer in WITHOUT_WAITS and case.settings.get("exchange", "gather") == "gather":
            reducer = REDUCERS[case.reducer]
            found.append((case, "residual" if reducer.takes_feedback else "none"))
            if reducer.is_sparsifier(reducer.Settings.model_validate(case.settings)):
                found.append((case, "momentum"))
    return found


@pytest.mark.parametrize(("case", "feedback"), fixed_size_cases(), ids=str)
def test_an_exchange_of_a_fixed_size_never_waits_for_the_device(
    case: Case, feedback: str, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(True)
    reducer = case.build(device=device)
    memory = FEEDBACKS[feedback](FEEDBACKS[feedback].Settings(), torch.zeros(N, device=device))
    exchange = Exchange(memory, reducer, EchoComm(), LAYOUT)
    grads = [gradient(0, step).to(device) for step in range(8)]
    for step, grad in enumerate(grads):
        progress = Progress(epoch=0.0, step=step, lr=0.1, steps_per_epoch=1)
        if step < 3:  # what is allocated, compiled or made once
            exchange.average(grad, progress)
            continue
        with no_waits(device):
            exchange.average(grad, progress)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["resnet18", "lstm"])
@pytest.mark.parametrize("reducer", WITHOUT_WAITS)
def test_a_plain_step_of_training_never_waits_and_a_logging_step_seldom(
    reducer: str, name: str, device: torch.device, tmp_path: Path
) -> None:
    changes = ["feedback.name=none"] if reducer in ("signsgd", "signum") else []
    rows = list(count_waits(name, reducer, changes, Setup(device, tmp_path, small=True)))
    waits = {row["step"]: row["waits"] for row in rows}
    assert waits.keys() == {"plain", "logging"}
    if device.type == "cuda":
        assert waits["plain"] == 0, rows[0]["where"]
        assert waits["logging"] <= NUM_LOGGING_WAITS, rows[1]["where"]


# --- a device that is not done in time ------------------------------------------------------------


def test_a_read_that_the_device_does_not_answer_in_time_is_an_error(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a CPU's numbers are there at once")
    deadline = Deadline(0.3)
    x = torch.ones(4, device=device)
    assert deadline.read(x).tolist() == [1.0] * 4
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    started = time.monotonic()
    with pytest.raises(CommunicationError, match="did not end within"):
        deadline.read(x)
    assert time.monotonic() - started < 1.5
    torch.cuda.synchronize()

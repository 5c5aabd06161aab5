"""In which arithmetic a run computes: read off torch's switches while it computes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run
from reducers.exact import Exact
from sage.exchange.comm import LocalComm
from sage.interfaces import Communicator, Place
from sage.training.precision import allow_tf32, allows_tf32, precision_notes, set_up_arithmetic
from tasks.digits import Digits
from tests.toy import ToyTask, settings_of, train

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
SHORT = ["epochs=1", "task.batch_per_worker=256", "log.tensorboard=false"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, state, before = torch.get_num_threads(), torch.get_rng_state(), allows_tf32()
    yield
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
    torch.backends.cudnn.benchmark = False


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[Any]]:
    """Phase -> the switches in it, of runs of Digits with the reducer exact: TF32 of matrix products and of
    convolutions, cuDNN's trials, the type of the model's output."""
    seen: dict[str, set[Any]] = {}

    def note(phase: str, dtype: torch.dtype | None = None) -> None:
        seen.setdefault(phase, set()).add((*allows_tf32(), torch.backends.cudnn.benchmark, dtype))

    loss, reduce, evaluate = Digits.loss, Exact.reduce, Digits.evaluate

    def noted_loss(self: Digits, batch: tuple[Tensor, Tensor]) -> Tensor:
        note("forward", self.model(batch[0]).dtype)
        value = loss(self, batch)
        value.register_hook(lambda grad: note("backward"))
        return value

    def noted_reduce(self: Exact, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        note("exchange")
        reduce(self, send, mean, comm)

    def noted_evaluate(self: Digits) -> dict[str, tuple[float, float]]:
        note("evaluate", self.model(self._normalised(self._test_x[:2])).dtype)
        return evaluate(self)

    monkeypatch.setattr(Digits, "loss", noted_loss)
    monkeypatch.setattr(Exact, "reduce", noted_reduce)
    monkeypatch.setattr(Digits, "evaluate", noted_evaluate)
    return seen


FULL, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("simulated", [1, 2])
@pytest.mark.parametrize(
    ("precision", "tf32", "dtype"),
    [("float32", False, FULL), ("tf32", True, FULL), ("bfloat16", False, HALF)],
)
def test_forward_and_backward_have_the_precision_and_all_else_has_float32(
    precision: str, tf32: bool, dtype: torch.dtype, simulated: int, seen: dict[str, set[Any]], tmp_path: Path
) -> None:
    allow_tf32(True)  # torch's own default for convolutions
    words = [DIGITS, *SHORT, "reducer.name=exact", f"precision={precision}", "--threads", "1"]
    assert run.main([*words, "--simulate", str(simulated), "--runs", str(tmp_path)]) == 0
    assert seen == {
        "forward": {(tf32, tf32, False, dtype)},
        "backward": {(tf32, tf32, False, None)},
        "exchange": {(False, False, False, None)},
        "evaluate": {(False, False, False, FULL)},
    }
    assert allows_tf32() == (False, False)


def test_a_failed_forward_pass_leaves_no_tf32_behind() -> None:
    class Failing(ToyTask):
        def loss(self, batch: slice) -> Tensor:
            raise KeyError("forward")

    set_up_arithmetic(deterministic=True)
    comm = LocalComm.alone()
    with pytest.raises(KeyError):
        train(settings_of("exact", precision="tf32"), comm, task=Failing(4, Place(0, 1)))
    assert allows_tf32() == (False, False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_tries_its_algorithms_where_a_run_need_not_repeat(deterministic: bool) -> None:
    torch.backends.cudnn.benchmark = deterministic
    set_up_arithmetic(deterministic)
    assert torch.backends.cudnn.benchmark is not deterministic


def test_tf32_on_a_device_without_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    for capability, is_said in (((7, 0), True), ((8, 0), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        said = ["precision: tf32 has no effect on Tesla V100: it has float32 only"] if is_said else []
        assert precision_notes("tf32", gpu) == said
    assert precision_notes("float32", gpu) == precision_notes("bfloat16", CPU) == []
    said = ["precision: tf32 has no effect on a CPU, which computes in float32"]
    assert precision_notes("tf32", CPU) == said

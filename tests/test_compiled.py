"""A compiled forward pass and loss: the same training up to rounding, the same names, the same bits again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from sage.exchange.comm import LocalComm
from sage.runfolder import manifest
from sage.training.compiled import check_compiles
from tests.toy import bits_of, lines_of, settings_of, state_of, train, train_until

DIGITS = str(Path(__file__).parent.parent / "configs" / "digits.yaml")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def compiler() -> None:
    try:
        check_compiles(CPU)
    except ValueError as error:
        pytest.skip(str(error))


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in lines_of(folder) if line["kind"] == "step"]


@pytest.mark.usefixtures("compiler")
def test_a_compiled_run_is_the_plain_one_up_to_rounding_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    whole: dict[bool, Any] = {}
    for compiled in (False, True):
        (tmp_path / str(compiled)).mkdir()
        settings = settings_of("topk", compile=compiled)
        whole[compiled] = train(settings, LocalComm.alone(), 8, tmp_path / str(compiled))[0]
    assert list(dict(whole[True].task.model.named_parameters())) == [
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
    ]
    # 16 steps of a learning rate of 0.1 on sums of at most 16 float32 products: far below 1e-3 of a loss.
    assert losses_of(tmp_path / "True") == pytest.approx(losses_of(tmp_path / "False"), rel=1e-3)

    # The step is compiled, not the plain one: a graph of it exists.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0

    folder = tmp_path / "stopped"
    train_until(5, settings, LocalComm.alone(), folder, batch_per_worker=8)
    found = manifest.newest(folder)
    torch._dynamo.reset()  # as another process
    resumed = train(settings, LocalComm.alone(), 8, folder, keeps=True, resumed=found)[0]
    assert state_of(resumed) == state_of(whole[True])
    assert bits_of(losses_of(folder)) == bits_of(losses_of(tmp_path / "True"))


def test_without_a_compiler_a_run_ends_before_training_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("/nowhere/g++",))
    words = [DIGITS, "epochs=1", "compile=true", "log.tensorboard=false", "--threads", "1"]
    assert run.main([*words, "--runs", str(tmp_path)]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("run.py")]
    assert len(said) == 1
    assert said[0].startswith("run.py: rank 0: compile: expected a cpu that torch.compile works on: ")
    assert "g++" in said[0]
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_simulation_is_not_compiled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run.main([DIGITS, "compile=true", "--simulate", "2", "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "run.py: compile: expected false with --simulate, whose workers would each compile their own"
    ]

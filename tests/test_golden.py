"""The published reducers' recorded outputs, bit for bit (golden/README.md says how they were made)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers import REDUCERS
from reducers.sage import Sage, SageLaw
from sage.comm import LocalComm
from sage.interfaces import Seeds
from tests.cases import layout_of

GOLDEN = Path(__file__).parent / "golden"
LAYOUT = layout_of(((64, 3, 3, 3), (64,), (128, 64), (128,), (10, 128), (10,)))
N = LAYOUT[-1].stop
NUM_STEPS = 30

SETTINGS = {
    "exact": ("exact", {}),
    "topk": ("topk", {"density": 0.01}),
    "globaltopk": ("global_topk", {"density": 0.01}),
    "thresh": ("threshold", {"threshold": 0.02}),
    "sage": ("sage", {"threshold": 0.02, "density": 0.01}),
}


def gradient(rank: int, step: int) -> Tensor:
    values = np.random.RandomState(1000 * rank + step).standard_t(df=3, size=N)
    return torch.from_numpy((values * 0.01 * 0.98**step).astype(np.float32))


class InjectedLaw(SageLaw):
    """The controller with recorded sampled means in place of its own draws."""

    sampled_means: list[float]

    def lower_bound(self, send: Tensor, grad: Tensor | None) -> Tensor:
        return self.begin(torch.tensor(self.sampled_means.pop(0)))


def run(name: str, comm: LocalComm, golden: dict) -> dict[str, np.ndarray | list]:
    """One worker's 30 steps, as train.py of the published code did them."""
    reducer_name, settings = SETTINGS[name]
    reducer_class = REDUCERS[reducer_name]
    config = reducer_class.Settings.model_validate(settings)
    reducer = reducer_class(config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))
    if isinstance(reducer, Sage):
        reducer.law = InjectedLaw(config, LAYOUT, 0, torch.device("cpu"))
        reducer.law.sampled_means = golden["savg"][:, comm.rank].tolist()
    memory = torch.zeros(N)
    means, selected, metrics, densities = [], [], [], []
    for step in range(NUM_STEPS):
        mean = gradient(comm.rank, step)
        reducer.accumulate(memory, mean)
        before = memory.clone()
        reducer.reduce(memory, mean, comm)
        means.append(mean.numpy())
        selected.append((before != memory).numpy())
        metrics.append(reducer.metrics())
        densities.append(int(selected[-1].sum()) / N)
    return {
        "out": np.stack(means),
        "selected": np.stack(selected),
        "memory_last": memory.numpy(),
        "metrics": metrics,
        "densities": np.array(densities),
    }


@pytest.fixture(scope="module", params=[f"{name}_w{world}" for name in SETTINGS for world in (1, 2)])
def compared(request: pytest.FixtureRequest) -> tuple[str, dict, list[dict]]:
    name, world_size = request.param.rsplit("_w", 1)
    golden = dict(np.load(GOLDEN / f"{request.param}.npz"))
    return name, golden, LocalComm.run(int(world_size), lambda comm: run(name, comm, golden))


def test_the_mean_is_the_published_one_bit_for_bit(compared: tuple[str, dict, list[dict]]) -> None:
    _, golden, workers = compared
    steps = golden.get("out_steps", np.arange(NUM_STEPS))
    for worker in workers:
        assert np.array_equal(worker["out"][steps], golden["out"])


def test_the_memory_is_the_published_one_bit_for_bit(compared: tuple[str, dict, list[dict]]) -> None:
    name, golden, workers = compared
    for rank, worker in enumerate(workers):
        if name == "exact":
            assert not worker["memory_last"].any()
            continue
        masks = np.unpackbits(golden["selected_bits"], axis=-1)[:, rank, :N].astype(bool)
        assert np.array_equal(worker["selected"], masks)
        assert np.array_equal(worker["memory_last"], golden["memory_last"][rank])


@pytest.mark.parametrize("world_size", [1, 2])
def test_sages_controller_terms_are_the_published_ones(world_size: int) -> None:
    golden = dict(np.load(GOLDEN / f"sage_w{world_size}.npz"))
    for rank, worker in enumerate(LocalComm.run(world_size, lambda comm: run("sage", comm, golden))):
        assert np.array_equal(worker["densities"], golden["density_actual"][:, rank])
        for step in range(1, NUM_STEPS):
            terms = worker["metrics"][step]
            # Recorded as Python floats of float32 values; density_exam and beta were double there.
            for ours, theirs in (("threshold", "threshold"), ("alpha", "alpha")):
                assert terms[ours] == golden[theirs][step, rank]
            assert terms["density_exam"] == golden["density_exam"][step, rank]
            assert np.float32(terms["beta"]) == np.float32(golden["beta"][step, rank])
            assert np.float32(terms["gamma"]) == np.float32(golden["gamma"][step, rank])

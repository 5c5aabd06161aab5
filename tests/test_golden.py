"""The published reducers' recorded outputs, bit for bit (golden/README.md says how they were made)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reducers
from reducers import REDUCERS
from reducers.powersgd import PowerSGD
from reducers.sage import Sage, SageLaw
from sage.exchange.comm import LocalComm
from sage.interfaces import Progress, Seeds
from tests.cases import layout_of, numbers

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
    "accordion": ("accordion", {"densities": (0.1, 0.01), "detector": "batch", "vectors": "compressed"}),
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
    config = REDUCERS[reducer_name].Settings.model_validate(settings)
    reducer = reducers.build(config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))
    if isinstance(reducer, Sage):
        reducer.law = InjectedLaw(config, LAYOUT, 0, torch.device("cpu"))
        reducer.law.sampled_means = golden["savg"][:, comm.rank].tolist()
    memory = torch.zeros(N)
    means, selected, metrics, densities = [], [], [], []
    for step in range(NUM_STEPS):
        mean = gradient(comm.rank, step)
        reducer.begin_step(Progress(epoch=step, step=step, lr=0.1, steps_per_epoch=1))
        reducer.accumulate(memory, mean)
        before = memory.clone()
        reducer.reduce(memory, mean, comm)
        means.append(mean.numpy())
        selected.append((before != memory).numpy())
        metrics.append(numbers(reducer.metrics()))
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


@pytest.mark.parametrize("world_size", [1, 2])
def test_accordions_levels_are_the_published_ones(world_size: int) -> None:
    golden = dict(np.load(GOLDEN / f"accordion_w{world_size}.npz"))
    for worker in LocalComm.run(world_size, lambda comm: run("accordion", comm, golden)):
        shares = [metrics["low_compression"] for metrics in worker["metrics"]]
        assert np.allclose(shares, (golden["auto_scale"] == np.float32(0.1)).mean(1), rtol=1e-6)


# --- PowerSGD: every step starts from the published state, so that no rounding is older than the step ---

LOWRANK = {
    "powersgd_paper_w1": {"residual": "mean", "min_compression_rate": 0},
    "powersgd_paper_w2": {"residual": "mean", "min_compression_rate": 0},
    "powersgd_paper_cold_w2": {"residual": "mean", "min_compression_rate": 0, "warm_start": False},
    "powersgd_lib_w1": {"form": "alternating"},
    "powersgd_lib_w2": {"form": "alternating"},
    "powersgd_lib_start10_w2": {"form": "alternating", "start_step": 10},
}
MATRICES = [slot for slot in LAYOUT if len(slot.shape) > 1]
ROWS = [slot.shape[0] for slot in MATRICES]
COLUMNS = [slot.size // slot.shape[0] for slot in MATRICES]
IS_VECTOR = np.concatenate([np.full(slot.size, len(slot.shape) == 1) for slot in LAYOUT])  # (N,)

TOLERANCE = 1e-4
"""Of the step's largest |mean|, for its mean, its memory and its factors.

A run on its own feeds rounding back: two builds of the same code part by a factor of 1.3 to 1.5 a step. Here
each step starts from the published state, so only its own rounding counts, and step 29 is as exact as step 0.
P is a basis of the columns of M Q, and the mean is P P^T M. M Q is off by about 2^-24 |M|_F |Q|_F; that tilts
P by as much over the smallest singular value of M Q, and moves P P^T M by at most twice the tilt times |M|_2.
In these files that is at most 350 * 2^-24 = 2.1e-5 of the largest |mean|. 1e-4 allows for the second product
and for sums that are rounded a few times. The alternating form divides by nothing as small: P or Q is given.
"""


def blocks(factor: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Views (size, 2) of the matrices' factors, which lie one after the other."""
    return [part.reshape(-1, 2) for part in np.split(factor, 2 * np.cumsum(sizes)[:-1])]


def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(N,) float64: P Q^T of each matrix, zeros for the vectors. left (404,), right (438,)."""
    flat = np.zeros(N)
    pairs = zip(blocks(left, ROWS), blocks(right, COLUMNS), strict=True)
    for slot, (p, q) in zip(MATRICES, pairs, strict=True):
        flat[slot.start : slot.stop] = (p.astype(np.float64) @ q.T).ravel()
    return flat


def basis(factor: np.ndarray) -> np.ndarray:
    return np.linalg.qr(factor.astype(np.float64))[0]


class PublishedRun:
    """The state before and after each step of a published run, rebuilt in float64 from its means alone."""

    def __init__(self, name: str) -> None:
        self.settings, self.world_size = LOWRANK[name], int(name[-1])
        self.start_step: int = self.settings.get("start_step", 0)
        self.golden = dict(np.load(GOLDEN / f"{name}.npz"))
        self.means = np.stack([product(*self.factors(step)) for step in range(NUM_STEPS)])  # (T, N)
        self.means[:, IS_VECTOR] = self.golden["vectors"]
        self.means[: self.start_step] = np.load(GOLDEN / "exact_w2.npz")["out"][: self.start_step]
        self.memories = np.zeros((NUM_STEPS + 1, self.world_size, N))  # before each step, and after the last
        for step in range(self.start_step, NUM_STEPS):
            for rank in range(self.world_size):
                send = self.memories[step, rank] + gradient(rank, step).numpy()
                self.memories[step + 1, rank] = self.left_over(send, step)

    def factors(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(404,), (438,): the mean after a step is left right^T."""
        return self.golden["left"][step], self.golden["right"][step]

    def factors_before(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What a step starts from: the recorded first factors, or those of the mean before.

        A step depends on the factor that it starts from by the span of its columns alone, and this is the
        column or row space of the last mean.
        """
        if step > self.start_step:
            return self.factors(step - 1)
        if "init_ps" in self.golden:
            return self.golden["init_ps"], self.golden["init_qs"]
        return self.golden["left"][0], self.golden["q_start"][0]  # the paper's form takes no left one

    def left_over(self, send: np.ndarray, step: int) -> np.ndarray:
        """(N,): what stays of a worker's send (N,)."""
        if self.settings.get("form") != "alternating":
            return np.where(IS_VECTOR, 0, send - self.means[step])
        memory, (left, right) = np.zeros(N), self.factors(step)
        pairs = zip(blocks(left, ROWS), blocks(right, COLUMNS), strict=True)
        for slot, (p, q) in zip(MATRICES, pairs, strict=True):
            m = send[slot.start : slot.stop].reshape(slot.shape[0], -1)
            if (step - self.start_step) % 2 == 0:  # P was given: M - P P^T M
                rest = m - basis(p) @ (basis(p).T @ m)
            else:  # Q was given: M - M Q Q^T
                rest = m - (m @ basis(q)) @ basis(q).T
            memory[slot.start : slot.stop] = rest.ravel()
        return memory

    def distance(self, step: int, ours: np.ndarray, theirs: np.ndarray) -> float:
        """The largest difference, relative to the step's largest |mean|."""
        return float(np.abs(ours - theirs).max() / np.abs(self.means[step]).max())


@pytest.fixture(scope="module", params=LOWRANK)
def published(request: pytest.FixtureRequest) -> PublishedRun:
    return PublishedRun(request.param)


def steps_from(published: PublishedRun, comm: LocalComm) -> list[dict[str, np.ndarray]]:
    """What each step of a worker leaves, from the published state before it."""
    config = REDUCERS["powersgd"].Settings.model_validate({"rank": 2, **published.settings})
    reducer = REDUCERS["powersgd"](config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))
    assert isinstance(reducer, PowerSGD)
    steps = []
    for step in range(NUM_STEPS):
        reducer.p, reducer.q = (torch.from_numpy(part.copy()) for part in published.factors_before(step))
        if not config.warm_start:  # it draws for itself: give it the recorded numbers
            drawn = torch.from_numpy(published.golden["q_start"][step].copy())
            reducer._draw = lambda size, drawn=drawn: drawn.clone()[:size]  # type: ignore[method-assign]
        memory = torch.from_numpy(published.memories[step, comm.rank].astype(np.float32))
        mean = gradient(comm.rank, step)
        reducer.accumulate(memory, mean)
        reducer.reduce(memory, mean, comm)
        left_by_it = {"mean": mean, "memory": memory, "left": reducer.p, "right": reducer.q}
        steps.append({name: tensor.numpy().copy() for name, tensor in left_by_it.items()})
    return steps


def test_powersgds_rebuilt_memories_are_the_recorded_ones(published: PublishedRun) -> None:
    # A tenth of what the reducer may be off. The means are stored to 2^-23 and projections enlarge nothing:
    # errors only add up over 30 steps. Of most memories the norm alone is recorded.
    last = NUM_STEPS - 1
    assert published.distance(last, published.memories[-1], published.golden["memory_last"]) <= TOLERANCE / 10
    norms = np.linalg.norm(published.memories[1:], axis=-1)  # (T, W)
    assert np.allclose(norms, published.golden["memory_l2"], rtol=TOLERANCE / 10, atol=0)


def test_powersgd_makes_each_published_step(published: PublishedRun) -> None:
    workers = LocalComm.run(published.world_size, lambda comm: steps_from(published, comm))
    for rank, steps in enumerate(workers):
        for step, after in enumerate(steps):
            mean = published.means[step]
            is_exact = IS_VECTOR | (step < published.start_step)  # a sum of two, halved: no choice of order
            assert np.array_equal(after["mean"][is_exact], mean[is_exact])
            assert not after["memory"][is_exact].any()
            assert published.distance(step, after["mean"], mean) <= TOLERANCE
            assert published.distance(step, after["memory"], published.memories[step + 1, rank]) <= TOLERANCE
            # The state that it leaves is, by its spans, the one that the next step was given.
            if step >= published.start_step:
                of_factors = product(after["left"], after["right"])
                assert published.distance(step, of_factors, np.where(IS_VECTOR, 0, mean)) <= TOLERANCE

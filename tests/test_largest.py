"""Top-k by a sampled bound: the answer of a stable sort, whatever the gradient looks like."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.gpu.waits import Waits
from reducers import REDUCERS, kernels, largest
from reducers.kernels import plain
from reducers.search import FixedSearch, Part, Sample, SampledSearch, Search
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Seeds
from tests.cases import layout_of

LAYOUT = layout_of(((7,), (300, 200), (0,), (7,), (50,), (90, 1000), (3,)))
"""Two tensors that are sampled at a density of 0.01, among small ones, two of one size, and one of none."""
N = LAYOUT[-1].stop


CPU = torch.device("cpu")


def build(name: str, density: float) -> Any:
    config = REDUCERS[name].Settings.model_validate({"density": density})
    return REDUCERS[name](config, LAYOUT, seeds=Seeds.derive(1, 0), device=CPU)


def expected(name: str, send: Tensor, density: float) -> list[int]:
    """The k largest of every part, of equal ones the first, in ascending order; NaN is the largest."""
    found, magnitudes = [], send.abs().numpy()
    parts = [(0, N)] if name == "global_topk" else [(slot.start, slot.stop) for slot in LAYOUT]
    for start, stop in parts:
        k = min(stop - start, max(1, int(density * (stop - start))))
        own = magnitudes[start:stop]
        order = np.lexsort((-own, ~np.isnan(own)))  # stable: first by the last key
        found += (start + np.sort(order[:k])).tolist()
    return found


@pytest.fixture(params=[SampledSearch, FixedSearch])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Search]:
    """The search that the reducers use: the CPU's; or a GPU's, with operations of torch alone."""
    if request.param is FixedSearch:
        use_search_of_a_gpu(monkeypatch)
    return request.param


def use_search_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "search_for", lambda device: FixedSearch)
    monkeypatch.setattr(kernels, "form_for", lambda device: plain)


def heavy(rng: torch.Generator) -> Tensor:
    return torch.randn(N, generator=rng, dtype=torch.float64) ** 3


def periodic(rng: torch.Generator) -> Tensor:
    return heavy(rng) * (torch.arange(N) % 250 == 0)


def few_rows(rng: torch.Generator) -> Tensor:
    """Of an embedding, say: all but 1 % of the elements are 0, and these are together."""
    return heavy(rng) * ((torch.arange(N) - LAYOUT[5].start).abs() < 400)


def falling(rng: torch.Generator) -> Tensor:
    return -1.0 / (1 + torch.arange(N, dtype=torch.float64))


def with_nan(rng: torch.Generator) -> Tensor:
    send = heavy(rng)
    send[[3, 1000, 70_000]], send[[5, 70_001]] = float("nan"), float("inf")
    return send


def mostly_nan(rng: torch.Generator) -> Tensor:
    return torch.where(torch.rand(N, generator=rng) < 0.9, float("nan"), heavy(rng))


def tied(rng: torch.Generator) -> Tensor:
    return heavy(rng).sign() * torch.randint(1, 4, (N,), generator=rng)


def constant(rng: torch.Generator) -> Tensor:
    return torch.full((N,), -2.0)


def zero(rng: torch.Generator) -> Tensor:
    return torch.zeros(N)


def subnormal(rng: torch.Generator) -> Tensor:
    return heavy(rng) * 1e-42


KINDS = [heavy, periodic, few_rows, falling, with_nan, mostly_nan, tied, constant, zero, subnormal]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("fused", "dtype"), [(True, torch.float32), (False, torch.float64)])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.3])
@pytest.mark.parametrize("name", ["topk", "global_topk"])
def test_the_largest_are_selected_and_the_first_of_equal_ones(
    search: type[Search],
    name: str,
    density: float,
    dtype: torch.dtype,
    fused: bool,
    kind: Callable[[torch.Generator], Tensor],
) -> None:
    rng = torch.Generator().manual_seed(5)
    whole = kind(rng).to(dtype)
    if search is FixedSearch and dtype == torch.float32 and kind is subnormal and density < 0.25:
        pytest.skip("a GPU's search looks for normal numbers")
    reducer, send = build(name, density), whole.clone()
    if fused:
        grad = torch.where(torch.rand(N, generator=rng) < 0.5, whole, 0)
        send = whole - torch.where(grad.isfinite(), grad, 0)
        whole = send + grad
        reducer.accumulate(send, grad)
    indices = reducer.select(send, Place(0, 1))
    assert send.numpy().tobytes() == whole.numpy().tobytes()
    assert indices.tolist() == expected(name, send, density)


PARTS = [Part(slot.start, slot.stop, min(slot.size, max(1, int(0.01 * slot.size)))) for slot in LAYOUT]


def search_of(kind: type[Search], draw: int = 0) -> Search:
    made = kind(PARTS, CPU)
    made.sample.draw(draw)
    return made


def test_large_tensors_are_sampled_and_the_others_searched_whole() -> None:
    assert [part.is_worth_a_sample() for part in PARTS] == [False, True, False, False, False, True, False]
    _, _, counts = search_of(SampledSearch).begin(heavy(torch.Generator().manual_seed(0)), None, False)
    for part, count in zip(PARTS, counts.tolist(), strict=True):
        assert part.k <= count <= (part.size / 2 if part.is_worth_a_sample() else part.size)


def test_the_candidates_of_a_heavy_tailed_gradient_are_few_and_enough() -> None:
    part = Part(0, N, 2000)  # k > 4 sqrt(N) = 1551
    plan, rng = SampledSearch([part], CPU), torch.Generator().manual_seed(0)
    expected_above = part.num_sampled() * part.k / N  # of the sample above the k-th largest
    rank = part.rank_of_bound()
    for draw in range(20):
        plan.sample.draw(draw)
        _, _, counts = plan.begin(heavy(rng), None, False)
        # The share above the r-th of m is Beta(r, m + 1 - r): a deviation of sqrt(r) / m; 6 are allowed for.
        assert part.k <= counts[0] <= part.k * (rank + 6 * rank**0.5) / expected_above


def misleading(plan: Search) -> Tensor:
    """(N,): the sampled elements are the largest, and fewer than k; the others are larger than 0."""
    send = heavy(torch.Generator().manual_seed(1)) * 0.001
    send[plan.sample.positions] = torch.linspace(2, 3, len(plan.sample.positions)).double()
    return send


def test_a_bound_that_leaves_too_few_is_not_believed_and_the_next_sample_is_another() -> None:
    reducer = build("topk", 0.01)
    plan = reducer._search
    looked_at, send = plan.sample.positions.clone(), misleading(plan)
    _, _, counts = plan.begin(send.clone(), None, False)
    assert any(count < part.k for count, part in zip(counts.tolist(), PARTS, strict=True))
    assert reducer.select(send, Place(0, 1)).tolist() == expected("topk", send, 0.01)
    assert reducer.num_draws == 1
    assert not torch.equal(plan.sample.positions, looked_at)
    # After a resume the positions are those of the state.
    other = build("topk", 0.01)
    other.load_state_dict(reducer.state_dict())
    assert torch.equal(other._search.sample.positions, plan.sample.positions)
    assert reducer.select(send, Place(0, 1)).tolist() == expected("topk", send, 0.01)


@pytest.mark.parametrize("name", ["topk", "global_topk"])
def test_a_gpu_that_is_misled_sends_other_elements_and_counts_the_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_search_of_a_gpu(monkeypatch)
    reducer = build(name, 0.01)
    send = misleading(reducer._search)
    slots, counts = reducer._search.begin(send.clone(), None, False)
    lacking = [part for part, c in zip(reducer.parts(0.01), counts.tolist(), strict=True) if c < part.k]
    assert lacking
    indices = reducer.select(send, Place(0, 1))
    assert len(indices) == len(indices.unique()) == reducer.target_counts()
    for part in lacking:
        candidates = slots[(slots >= part.start) & (slots < part.stop)]
        others = np.setdiff1d(np.arange(part.start, part.stop), candidates.numpy())
        own = indices[(indices >= part.start) & (indices < part.stop)].tolist()
        assert own == sorted([*candidates.tolist(), *others[: part.k - len(candidates)].tolist()])
    assert reducer.metrics()["inexact_steps"] == 1
    reducer.select(heavy(torch.Generator().manual_seed(1)), Place(0, 1))
    assert (reducer.inexact_steps, reducer.num_draws) == (1, 2)


def test_a_gpu_that_has_too_many_candidates_takes_the_first_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    use_search_of_a_gpu(monkeypatch)
    reducer = build("global_topk", 0.01)
    send = torch.linspace(2, 3, N)
    send[reducer._search.sample.positions] = 0.001  # so the bound is far below the others
    slots, counts = reducer._search.begin(send.clone(), None, False)
    assert counts[0] > len(slots) == reducer.parts(0.01)[0].room()
    indices = reducer.select(send, Place(0, 1))
    largest_of_those = slots[send[slots].argsort(descending=True)[: reducer.target_counts()]]
    assert indices.tolist() == sorted(largest_of_those.tolist())
    assert reducer.inexact_steps == 1


@pytest.mark.parametrize(("name", "waits"), [("topk", 0), ("global_topk", 0), ("threshold", 2)])
def test_a_step_of_fixed_k_waits_for_no_device(
    name: str, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_search_of_a_gpu(monkeypatch)
    reducer = build(name, 0.01)
    for _ in range(2):
        send, mean = torch.zeros(N), heavy(torch.Generator().manual_seed(0)).float()
        counter = Waits()
        with counter.counted():
            reducer.accumulate(send, mean, grad_is_mean=True)
            reducer.reduce(send, mean, LocalComm.alone())
        assert counter.found.total() == waits


def test_the_sample_is_the_same_in_every_object_and_has_no_period() -> None:
    part = Part(10, 100_010, 1000)
    sample = Sample([part], CPU)
    sample.draw(0)
    positions = sample.positions.clone()
    other = Sample([part], CPU)
    other.draw(0)
    assert torch.equal(positions, other.positions)
    assert positions.numel() == part.num_sampled()
    assert positions.min() >= part.start
    assert positions.max() < part.stop
    assert (positions.diff() >= 0).all()
    # One in each of m equal blocks of n / m elements: a gap is 0 to 2 blocks, triangular, so that the
    # likeliest has a share of m / n. None of the gaps holds much more.
    expected_most = part.num_sampled() ** 2 / part.size
    assert positions.diff().bincount().max() < expected_most + 6 * expected_most**0.5
    other.draw(1)
    assert not torch.equal(positions, other.positions)


@pytest.mark.parametrize("name", ["topk", "global_topk"])
@pytest.mark.usefixtures("search")
def test_a_density_that_is_set_selects_the_largest_and_needs_a_new_sample_from_a_twofold_k_on(
    name: str,
) -> None:
    reducer, rng = build(name, 0.01), torch.Generator().manual_seed(3)
    # K = max(k, 4 sqrt n) is at most 1.84 times what it is at 0.01, and at 0.03 more than 2 times.
    for density, is_new in ((0.012, False), (0.007, False), (0.019, False), (0.03, True), (0.02, False)):
        plan, send = reducer._search, heavy(rng)
        reducer.set_density(density)
        assert (reducer._search is not plan) == is_new
        assert reducer.select(send.clone(), Place(0, 1)).tolist() == expected(name, send, density)
        # A resumed one looks at the same positions, though it is built at another density.
        other = build(name, 0.01)
        other.load_state_dict(reducer.state_dict())
        other.set_density(density)
        assert torch.equal(other._search.sample.positions, reducer._search.sample.positions)
        assert torch.equal(other._search.ks, reducer._search.ks)

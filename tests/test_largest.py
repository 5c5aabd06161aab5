"""Top-k by a sampled bound: the plain top-k's answer, whatever the gradient looks like."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from reducers import REDUCERS
from reducers.largest import Part, SampledSearch, WholeSearch, spread
from sage.interfaces import Place, Reducer, Seeds
from tests.cases import layout_of

LAYOUT = layout_of(((7,), (300, 200), (0,), (7,), (50,), (90, 1000), (3,)))
"""Two tensors that are sampled at a density of 0.01, among small ones, two of one size, and one of none."""
N = LAYOUT[-1].stop


def build(name: str, density: float) -> Reducer:
    config = REDUCERS[name].Settings.model_validate({"density": density})
    return REDUCERS[name](config, LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu"))


def plain(name: str, send: Tensor, density: float) -> Tensor:
    """The magnitudes (k,) that torch.topk takes of every part, in ascending order a part; NaN last."""
    pieces = [send] if name == "global_topk" else [send[slot.start : slot.stop] for slot in LAYOUT]
    ks = [min(len(piece), max(1, int(density * len(piece)))) for piece in pieces]
    return torch.cat([piece.abs().topk(k).values.sort().values for piece, k in zip(pieces, ks, strict=True)])


def found(name: str, send: Tensor, indices: Tensor) -> Tensor:
    """The same of selected indices (k,), which must be unique."""
    assert indices.unique().numel() == indices.numel()
    edges = [0, N] if name == "global_topk" else [slot.start for slot in LAYOUT] + [N]
    parts = [indices[(indices >= a) & (indices < b)] for a, b in itertools.pairwise(edges)]
    return torch.cat([send[part].abs().sort().values for part in parts])


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
@pytest.mark.parametrize("density", [0.01, 0.2])
@pytest.mark.parametrize("name", ["topk", "global_topk"])
def test_the_magnitudes_are_those_of_plain_topk(
    name: str, density: float, dtype: torch.dtype, fused: bool, kind: Callable[[torch.Generator], Tensor]
) -> None:
    rng = torch.Generator().manual_seed(5)
    whole = kind(rng).to(dtype)
    reducer, send = build(name, density), whole.clone()
    if fused:
        grad = torch.where(torch.rand(N, generator=rng) < 0.5, whole, 0)
        send = whole - torch.where(grad.isfinite(), grad, 0)
        whole = send + grad
        reducer.accumulate(send, grad)
    indices = reducer.select(send, Place(0, 1))  # type: ignore[attr-defined]
    assert send.numpy().tobytes() == whole.numpy().tobytes()
    assert torch.equal(
        found(name, send, indices).nan_to_num(1e300), plain(name, send, density).nan_to_num(1e300)
    )


PARTS = [Part(slot.start, slot.stop, min(slot.size, max(1, int(0.01 * slot.size)))) for slot in LAYOUT]


@pytest.mark.parametrize("kind", KINDS)
def test_the_search_of_any_device_takes_the_same_magnitudes(
    kind: Callable[[torch.Generator], Tensor],
) -> None:
    send, grad = (kind(torch.Generator().manual_seed(seed)) for seed in (5, 6))
    whole = send + grad
    plan = WholeSearch(PARTS)
    chosen = plan.finish(send, plan.begin(send, grad))
    assert send.numpy().tobytes() == whole.numpy().tobytes()
    assert torch.equal(
        found("topk", send, chosen).nan_to_num(1e300), plain("topk", send, 0.01).nan_to_num(1e300)
    )


def test_large_tensors_are_sampled_and_the_others_searched_in_batches_of_one_size() -> None:
    plan = SampledSearch(PARTS)
    assert [(part.start, part.stop) for part in plan.sampled] == [
        (LAYOUT[i].start, LAYOUT[i].stop) for i in (1, 5)
    ]
    assert [tuple(elements.shape) for elements, _ in plan.batches] == [(2, 7), (1, 0), (1, 50), (1, 3)]
    covered = torch.zeros(N)
    for part in plan.sampled:
        covered[part.start : part.stop] += 1
    for gap in plan.gaps:
        covered[gap] += 1
    assert (covered == 1).all()


def test_the_candidates_of_a_heavy_tailed_gradient_are_few_and_enough() -> None:
    plan = SampledSearch(PARTS)
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        for part, own in zip(plan.sampled, plan.begin(heavy(rng), None), strict=True):
            # 16 of the sample above the k-th largest are expected, and the bound is the 32nd: 2 k, with a
            # deviation of k sqrt(32) / 16; 6 of them are allowed for.
            assert part.k <= len(own) <= part.k * (2 + 6 * 32**0.5 / 16)


def test_a_bound_that_leaves_too_few_is_not_believed() -> None:
    plan = SampledSearch(PARTS)
    part = plan.sampled[-1]
    send = heavy(torch.Generator().manual_seed(1)) * 0.001
    send[spread(part, torch.Generator().manual_seed(0))] = 1.0  # any drawn positions
    send[plan.positions] = torch.linspace(2, 3, len(plan.positions)).double()  # and those it looks at
    candidates = plan.begin(send, None)
    assert any(len(own) < part.k for own, part in zip(candidates, plan.sampled, strict=True))
    chosen = plan.finish(send, candidates)
    own = chosen[(chosen >= part.start) & (chosen < part.stop)]
    expected = send[part.start : part.stop].abs().topk(part.k).values.sort().values
    assert torch.equal(send[own].abs().sort().values, expected)


def test_the_sample_is_the_same_in_every_object_and_has_no_period() -> None:
    part = Part(10, 100_010, 1000)
    positions = spread(part, torch.Generator().manual_seed(0))
    assert torch.equal(positions, spread(part, torch.Generator().manual_seed(0)))
    assert positions.numel() == part.num_sampled() == positions.unique().numel() == 1600
    assert positions.min() >= part.start
    assert positions.max() < part.stop
    # Of 1600 independent gaps, none of 125 values holds much more than its share of about 26.
    assert positions.diff().bincount().max() < 60
    assert torch.equal(SampledSearch(PARTS).positions, SampledSearch(PARTS).positions)

"""The shared draws of random_k and random_block."""

from collections import Counter
from functools import partial
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.waits import Waits
from reducers.kernels.block import BlockDraw, PlainBlockDraw
from reducers.kernels.distinct import DistinctDraw, PlainDraw, num_tries
from reducers.random_k import RandomBlock, RandomBlockSettings, RandomK, RandomKSettings, SharedDraw
from sage.interfaces import Seeds
from tests.cases import LAYOUT, layout_of

NUM_DRAWS = 4000
CPU = torch.device("cpu")


def random_k(density: float, shapes: tuple[tuple[int, ...], ...] | None = None, common: int = 1) -> RandomK:
    layout = LAYOUT if shapes is None else layout_of(shapes)
    return RandomK(RandomKSettings(density=density), layout, seeds=Seeds(common, 2), device=CPU)


def random_block(density: float, shapes: tuple[tuple[int, ...], ...]) -> RandomBlock:
    config = RandomBlockSettings(density=density)
    return RandomBlock(config, layout_of(shapes), seeds=Seeds(1, 2), device=CPU)


def counts_by_tensor(drawn: Tensor, shapes: tuple[tuple[int, ...], ...]) -> list[int]:
    return [int(((drawn >= slot.start) & (drawn < slot.stop)).sum()) for slot in layout_of(shapes)]


@pytest.mark.parametrize("density", [0.001, 0.3, 0.5, 0.51, 0.9, 1.0])
@pytest.mark.parametrize("make", [random_k, random_block])
def test_every_tensor_sends_its_count_of_different_elements(make: type[SharedDraw], density: float) -> None:
    shapes = ((50, 40), (7,), (0,), (1,), (2,), ())
    for _ in range(3):
        drawn = make(density, shapes).draw()
        assert len(drawn.unique()) == len(drawn)
        counts = [max(1, int(density * size)) if size else 0 for size in (2000, 7, 0, 1, 2, 1)]
        assert counts_by_tensor(drawn, shapes) == counts


@pytest.mark.parametrize(("n", "k"), [(5, 1), (5, 2), (6, 3), (5, 3), (5, 4)])
def test_every_subset_is_drawn_as_often_as_any_other(n: int, k: int) -> None:
    # 4000 tensors, one draw of each. 20 subsets at most, each count binomial: 5.2 standard deviations are
    # exceeded with probability 20 * 2e-7 = 4e-6 a row.
    drawn = random_k((k + 0.5) / n, ((n,),) * NUM_DRAWS).draw().sort().values
    seen = Counter(map(tuple, (drawn.view(NUM_DRAWS, k) % n).tolist()))
    p = 1 / comb(n, k)
    bound = 5.2 * (NUM_DRAWS * p * (1 - p)) ** 0.5
    assert len(seen) == comb(n, k)
    assert all(abs(count - NUM_DRAWS * p) <= bound for count in seen.values())


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize(("draw", "plain_draw"), [(DistinctDraw, PlainDraw), (BlockDraw, PlainBlockDraw)])
def test_both_forms_of_a_draw_have_the_same_elements(draw: Any, plain_draw: Any, share: float) -> None:
    sizes = torch.tensor([1, 2, 3, 7, 8, 1000, 1, 4099])
    starts, counts = sizes.cumsum(0) - sizes + 10, (share * sizes).ceil().long()
    parts = draw(starts, sizes, counts)
    plain = plain_draw(parts, CPU)
    for key in (0, 1, 2**63, 2**64 - 1):
        drawn = parts.draw(key, CPU)
        assert torch.equal(drawn, plain(key))
        assert drawn.shape == (int(counts.sum()),)


def test_the_form_for_a_device_does_not_wait_for_it() -> None:
    parts = [torch.tensor(x) for x in ([0, 40], [40, 60], [10, 50])]
    plain, block = PlainDraw(DistinctDraw(*parts), CPU), PlainBlockDraw(BlockDraw(*parts), CPU)
    waits = Waits()
    with waits.counted():
        plain(3)
        block(3)
    assert not waits.found


@pytest.mark.parametrize("name", ["random_k", "random_block"])
def test_a_density_that_is_set_draws_what_a_reducer_of_that_density_draws(name: str) -> None:
    shapes = ((50, 40), (7,), (1,))
    make = partial(random_k, shapes=shapes) if name == "random_k" else partial(random_block, shapes=shapes)
    reducer = make(0.01)
    for num_draws, density in enumerate((0.3, 0.01, 0.9, 1.0, 0.05)):
        reducer.set_density(density)
        other = make(density)
        other.generator.count = num_draws
        assert torch.equal(reducer.draw(), other.draw())
        assert reducer.density == other.density


def test_draws_that_do_not_suffice_send_an_element_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reducers.kernels.distinct.num_tries", lambda count, size: count)
    parts = DistinctDraw(torch.tensor([5]), torch.tensor([40]), torch.tensor([20]))
    whole, cut = parts.draw(3, CPU), PlainDraw(parts, CPU)(3)
    assert set(cut.tolist()) < {5, *whole.tolist()}
    assert len(cut) == 20


@pytest.mark.parametrize(("count", "size"), [(1, 2), (10, 20), (500, 1000), (1000, 10**6)])
def test_the_number_of_draws_suffices(count: int, size: int) -> None:
    """With 60 to spare, in 1,000 sequences of torch's own numbers."""
    rng = torch.Generator().manual_seed(count)
    drawn = torch.randint(size, (1000, num_tries(count, size)), generator=rng)
    enough = drawn[:, : num_tries(count, size) - 60]
    assert all(len(row.unique()) >= count for row in enough)


def test_a_block_is_consecutive_wraps_around_and_starts_anywhere() -> None:
    reducer = random_block(0.43, ((9,), (7,)))  # k = 3 of both
    starts = []
    for _ in range(200):
        first, second = reducer.draw()[:3], reducer.draw()[3:] - 9
        assert [(int(place) - int(first[0])) % 9 for place in first] == [0, 1, 2]
        assert [(int(place) - int(second[0])) % 7 for place in second] == [0, 1, 2]
        assert 0 <= first.min() <= first.max() < 9
        assert 0 <= second.min() <= second.max() < 7
        starts.append(int(second[0]))
    assert set(starts) == set(range(7))  # 7 (6/7)^200 = 3e-13: one is missing


def test_the_draw_depends_on_the_common_seed_only() -> None:
    assert torch.equal(random_k(0.1).draw(), random_k(0.1).draw())
    assert not torch.equal(random_k(0.1).draw(), random_k(0.1, common=3).draw())


@pytest.mark.parametrize("name", ["random_k", "random_block"])
def test_a_rank_matches_what_a_low_rank_method_sends(name: str) -> None:
    # (8, 27), (8,), (20, 11), (11,), (1,) at rank 2: 2 (8 + 27), 8, 2 (20 + 11), 11, 1
    seeds = Seeds(1, 2)
    reducer = (
        RandomK(RandomKSettings(rank=2), LAYOUT, seeds=seeds, device=CPU)
        if name == "random_k"
        else RandomBlock(RandomBlockSettings(rank=2), LAYOUT, seeds=seeds, device=CPU)
    )
    assert len(reducer.draw()) == 70 + 8 + 62 + 11 + 1
    assert reducer.expected_payload_bytes(2) == 4 * 152

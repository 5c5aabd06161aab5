"""Recommendation: NeuMF, and who sees which interaction."""

from itertools import combinations

import pytest
import torch

from benchmarks.gpu.waits import Waits
from sage.draws import Draws
from sage.interfaces import Place
from sage.training.optim import Adam, build_optimizer
from tasks.models.neumf import NeuMF
from tasks.movielens import MovieLens20M
from tasks.recommendation import Shuffle, Untaken
from tests.ratings import CPU, Batch, interactions, make_task


def same(some: list[Batch], others: list[Batch]) -> bool:
    """Bit for bit, and as many."""
    assert some
    pairs = zip(some, others, strict=True)
    return all(all(map(torch.equal, batch, other)) for batch, other in pairs)


def joined(batches: list[Batch]) -> Batch:
    users, items, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return users, items, labels


# --- the model ------------------------------------------------------------------------------------


def test_neumf_of_movielens_20m_has_the_published_number_of_parameters() -> None:
    config = MovieLens20M.Settings()
    with torch.device("meta"):
        model = NeuMF(138_493, 26_744, factors=config.factors, widths=config.widths, dropout=config.dropout)
    embeddings = (138_493 + 26_744) * (64 + 128)
    layers = (256 * 256 + 256) + (256 * 128 + 128) + (128 * 64 + 64) + (64 + 64 + 1)
    assert embeddings + layers == 31_832_577
    assert sum(parameter.numel() for parameter in model.parameters()) == 31_832_577


def test_the_logit_is_the_one_worked_by_hand() -> None:
    model = NeuMF(2, 3, factors=1, widths=(2, 1), dropout=0.9).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.user_factors.weight.copy_(torch.tensor([[2.0], [3.0]]))
        model.item_factors.weight.copy_(torch.tensor([[5.0], [7.0], [-11.0]]))
        model.user_features.weight.copy_(torch.tensor([[1.0], [-2.0]]))
        model.last.weight.copy_(torch.tensor([[1.0, 100.0]]))
        logits = model(torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32))
    # p q + 100 relu(feature of the user + 1 of the item + bias 1) + bias 1
    assert logits.tolist() == [2 * 5 + 100 * 3 + 1, 3 * 7 + 0 + 1, 3 * -11 + 0 + 1]


def test_dropout_follows_each_relu_and_drops_nothing_else() -> None:
    model = NeuMF(2, 3, factors=2, widths=(8, 8, 4), dropout=0.5)
    shapes: list[tuple[int, ...]] = []
    model.dropout.register_forward_hook(lambda *found: shapes.append(tuple(found[1][0].shape)))
    model(torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int32))
    assert shapes == [(5, 8), (5, 4)]


def test_the_published_betas_reach_adam() -> None:
    task = make_task(interactions(), 60)
    optimizer = build_optimizer(Adam(lr=0.0045, betas=(0.25, 0.5)), task.model)
    assert isinstance(optimizer, torch.optim.Adam)
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(0.0045, (0.25, 0.5))}


# --- which interaction is where -------------------------------------------------------------------


@pytest.mark.parametrize("size", [*range(1, 40), 1009, 2400])
def test_a_shuffle_is_a_permutation_in_another_order_for_each_seed(size: int) -> None:
    def numbers(seed: int) -> list[int]:
        return Shuffle(size, Draws(seed), CPU)(torch.arange(size, dtype=torch.int32)).tolist()

    assert sorted(numbers(1)) == sorted(numbers(2)) == list(range(size))
    if size > 1000:
        assert numbers(1) != numbers(2)
        # Of a random permutation, 1 place in expectation is fixed; 10 or more: below 1e-6.
        assert sum(place == number for place, number in enumerate(numbers(1))) < 10


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_workers_slices_are_the_single_workers_global_batch(world_size: int, exclude: bool) -> None:
    single = list(make_task(interactions(), 240, exclude=exclude).train_batches(epoch=3))
    tasks = [
        make_task(interactions(), 240, Place(rank, world_size), exclude=exclude) for rank in range(world_size)
    ]
    assert {(task.batch_per_worker, task.steps_per_epoch) for task in tasks} == {(240 // world_size, 10)}
    workers = [list(task.train_batches(epoch=3)) for task in tasks]
    assert same([joined(list(step)) for step in zip(*workers, strict=True)], single)


def test_an_epoch_has_every_positive_once_and_four_negatives_for_each_of_its_user() -> None:
    found = interactions()
    users, items, labels = joined(list(make_task(found, 100).train_batches(0)))  # 100 divides 480 x 5
    positive = labels == 1
    pairs = sorted(zip(users[positive].tolist(), items[positive].tolist(), strict=True))
    assert pairs == sorted(zip(found.users.tolist(), found.items.tolist(), strict=True))
    assert torch.equal(users[~positive].bincount(), torch.full((40,), 4 * 12))
    assert set(labels.tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_labels_are_balanced_over_workers_in_every_global_batch(world_size: int) -> None:
    """The published code gives rank 0 all positives (D12)."""
    found = interactions(num_users=400, num_items=60, taken=12)
    for rank in range(world_size):
        for _, _, labels in make_task(found, 2400, Place(rank, world_size)).train_batches(0):
            # A slice of B of a shuffled epoch has B/5 positives in expectation with a variance below
            # B (1/5) (4/5); 5 deviations: 40 slices here, a chance below 3e-5, and the seed is fixed.
            size = 2400 // world_size
            assert abs(labels.sum().item() - size / 5) <= 5 * (size * 0.16) ** 0.5


def test_negatives_are_drawn_uniformly() -> None:
    found = interactions(num_users=400)
    _, items, labels = joined(list(make_task(found, 2400).train_batches(0)))
    counts = items[labels == 0].bincount(minlength=60)
    assert counts.sum() == 4 * 4800
    # Each is binomial of 19,200 draws and 1/60: mean 320, deviation 17.7; 5 of them, 60 items: below 4e-5.
    assert (counts - 320).abs().max() <= 5 * 17.8


def test_epochs_and_seeds_differ_in_order_and_in_the_items_drawn() -> None:
    found = interactions()
    runs = [(epoch, seed) for epoch in range(3) for seed in range(3)]
    epochs = [joined(list(make_task(found, 240, seed=seed).train_batches(epoch))) for epoch, seed in runs]
    for (users, items, labels), (other_users, other_items, other_labels) in combinations(epochs, 2):
        # Users agree at 1 place of 40 by chance: mean 60 of 2,400, deviation 7.7.
        assert (users == other_users).sum() < 60 + 6 * 7.7
        # About 1,536 places are negative in both, and items agree at 1 of 60: mean 26, deviation 5.
        drawn = (labels == 0) & (other_labels == 0)
        assert drawn.sum() > 1000
        assert (items == other_items)[drawn].sum() < 26 + 6 * 5


@pytest.mark.parametrize("exclude", [False, True])
def test_an_epoch_started_late_is_the_tail_of_the_whole_epoch(exclude: bool) -> None:
    task = make_task(interactions(), 600, Place(1, 3), exclude=exclude)
    whole = list(task.train_batches(2))
    assert len(whole) == 4
    for start in range(4):
        assert same(list(task.train_batches(2, start)), whole[start:])
    assert list(task.train_batches(2, start=4)) == []


def test_taken_items_are_drawn_as_negatives_unless_excluded() -> None:
    found = interactions()
    taken = set(zip(found.users.tolist(), found.items.tolist(), strict=True))

    def num_taken(exclude: bool) -> int:
        users, items, labels = joined(list(make_task(found, 240, exclude=exclude).train_batches(0)))
        drawn = zip(users[labels == 0].tolist(), items[labels == 0].tolist(), strict=True)
        return sum(pair in taken for pair in drawn)

    assert num_taken(exclude=True) == 0
    # Binomial of 1,920 draws and 12/60: mean 384, deviation 17.5.
    assert abs(num_taken(exclude=False) - 384) <= 5 * 17.6


def test_the_untaken_items_are_numbered_in_their_order() -> None:
    taken = {0: [0, 1, 4], 1: [], 2: [5, 3, 3], 3: [1, 2, 3, 4, 5]}
    pairs = [(user, item) for user, items in taken.items() for item in items]
    users, items = torch.tensor(pairs, dtype=torch.int32).T
    untaken = Untaken(users, items, num_users=4, num_items=6)
    for user, of_user in taken.items():
        expected = [item for item in range(6) if item not in of_user]
        assert untaken.counts[user] == len(expected)
        asked = torch.full((len(expected),), user, dtype=torch.int32)
        assert untaken.items(asked, torch.arange(len(expected))).tolist() == expected


def test_untaken_items_are_drawn_uniformly() -> None:
    found = interactions(num_users=400)
    users, items, labels = joined(list(make_task(found, 2400, exclude=True).train_batches(0)))
    # User u took 12 items from 7 u on: seen from there, the other 48 are alike for all.
    seen_from = (items - 7 * users)[labels == 0] % 60
    counts = seen_from.bincount(minlength=60)
    assert not counts[:12].any()
    # Binomial of 19,200 draws and 1/48: mean 400, deviation 19.8; 5 of them, 48 items: below 3e-5.
    assert (counts[12:] - 400).abs().max() <= 5 * 19.8


def test_no_operation_of_a_batch_waits_for_the_device() -> None:
    for exclude in (False, True):
        batches = make_task(interactions(), 240, exclude=exclude).train_batches(0)
        waits = Waits()
        with waits.counted():
            next(batches)
            next(batches)
        assert not waits.found


def test_batches_neither_follow_nor_move_the_global_generator() -> None:
    task = make_task(interactions(), 240)
    torch.manual_seed(1)
    before, first = torch.get_rng_state(), list(task.train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(list(task.train_batches(0)), first)


@pytest.mark.parametrize(
    ("batch", "told"), [(241, "a multiple of the 2 workers, got 241"), (2402, "at most 2400")]
)
def test_a_batch_that_cannot_be_divided_or_exceeds_the_epoch_is_an_error(batch: int, told: str) -> None:
    with pytest.raises(ValueError, match=rf"^task\.global_batch: expected {told}"):
        make_task(interactions(), batch, Place(0, 2))
    make_task(interactions(), 2400, Place(0, 2))

"""HR@10 and NDCG@10: the scores of one user, of all users over workers, and of ranking by popularity."""

from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sage.interfaces import Place, Seeds
from sage.training.optim import Adam, build_optimizer
from tasks.data import synthetic_ratings
from tasks.recommendation import Interactions, popularity, sum_ranks
from tasks.synthetic_ratings import SyntheticRatings, SyntheticRatingsSettings
from tests.ratings import CPU, interactions, make_task


def row(before: int, ties: int = 0, num_negatives: int = 100) -> list[float]:
    """Scores of a user, the held-out item's first: so many negatives above it, and as many of its score."""
    return [0.0, *[1.0] * before, *[0.0] * ties, *[-1.0] * (num_negatives - before - ties)]


@pytest.mark.parametrize(
    ("before", "ties", "hit", "gain"),
    [
        (0, 0, 1.0, 1.0),  # 1 / log2(2)
        (2, 0, 1.0, 0.5),  # third: 1 / log2(4)
        (9, 0, 1.0, 1 / log2(11)),
        (10, 0, 0.0, 0.0),
        (0, 1, 1.0, (1 + 1 / log2(3)) / 2),  # first or second
        (9, 1, 0.5, 1 / log2(11) / 2),  # tenth or eleventh
        (8, 3, 0.5, (1 / log2(10) + 1 / log2(11)) / 4),  # ninth to twelfth
        (10, 90, 0.0, 0.0),
        (0, 100, 10 / 101, sum(1 / log2(1 + place) for place in range(1, 11)) / 101),  # a constant model
    ],
)
def test_hits_and_gains_are_those_worked_by_hand(before: int, ties: int, hit: float, gain: float) -> None:
    hits, gains = sum_ranks(torch.tensor([row(before, ties)]))
    # Float64 sums of 10 terms of at most 1: an error below 10 x 10 x 2^-53.
    assert abs(hits - hit) <= 100 * 2**-53
    assert abs(gains - gain) <= 100 * 2**-53


def test_the_sums_are_over_users() -> None:
    hits, gains = sum_ranks(torch.tensor([row(0), row(2), row(50)]))
    assert hits == 2.0
    assert abs(gains - 1.5) <= 100 * 2**-53  # as above


def test_scores_that_are_no_numbers_are_no_hits() -> None:
    assert sum_ranks(torch.full((3, 101), torch.nan)) == (0.0, 0.0)
    assert sum_ranks(torch.tensor([[torch.nan, *[0.0] * 100]])) == (0.0, 0.0)


def test_popularity_ranks_by_the_number_of_training_interactions() -> None:
    # Items 0, 1, 2 are taken 3, 1 and 0 times; user 0 is tested on item 1, before 2 and after 0.
    users, items = np.array([0, 1, 2, 2], np.int32), np.array([0, 0, 0, 1], np.int32)
    tested = np.array([[1, 0, 2], [0, 1, 2], [2, 0, 1]], np.int32)
    scores = popularity(Interactions(users, items, tested, 3, 3))
    # Places 2, 1 and 3. Float64, as above.
    assert scores["hr@10"] == 1.0
    assert abs(scores["ndcg@10"] - (1 / log2(3) + 1 + 1 / 2) / 3) <= 100 * 2**-53


class Witness(nn.Module):
    """Remembers the pairs it scores; the score of item i for user u is in a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.seen = nn.Parameter(table), []

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        assert not self.training
        self.seen += list(zip(users.tolist(), items.tolist(), strict=True))
        return self.table[users, items]


@pytest.mark.parametrize("num_users", [2, 1025])
def test_every_user_is_scored_once_at_three_workers(num_users: int) -> None:
    """The published code scores the first users W times (D11)."""
    found = interactions(num_users)
    table = torch.rand(num_users, 60, generator=torch.Generator().manual_seed(0))
    seen: list[tuple[int, int]] = []
    totals = np.zeros((2, 2))
    for rank in range(3):
        task = make_task(found, 6, Place(rank, 3))
        task.model = Witness(table)
        sums = task.evaluate()
        totals += np.array([sums["hr@10"], sums["ndcg@10"]])
        seen += task.model.seen
        assert task.model.training
    assert sorted(seen) == sorted(
        (user, item) for user in range(num_users) for item in found.test_items[user]
    )
    expected = sum_ranks(table[torch.arange(num_users)[:, None], torch.from_numpy(found.test_items)])
    assert totals[:, 1].tolist() == [num_users, num_users]
    # The same float64 terms in another order: fewer than 1,100 of at most 1.
    assert np.abs(totals[:, 0] - expected).max() <= 1100**2 * 2**-53


def test_hr_at_10_is_the_score_and_higher_is_better() -> None:
    task = make_task(interactions(), 240)
    assert (task.score, task.higher_is_better, set(task.evaluate())) == ("hr@10", True, {"hr@10", "ndcg@10"})


def test_the_loss_is_the_mean_binary_cross_entropy() -> None:
    task = make_task(interactions(), 240)
    task.model = Witness(torch.tensor([[0.0, torch.log(torch.tensor(3.0))]])).eval()
    batch = (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 1, 1]), torch.tensor([1.0, 1.0, 0.0]))
    loss = task.loss(batch)
    # Probabilities 1/2, 3/4, 3/4: -log of 1/2, 3/4 and 1/4. Float32 terms below 1.4: error below 20 x 2^-24.
    assert abs(loss.item() - np.log([2, 4 / 3, 4]).mean()) <= 20 * 2**-24


# --- synthetic ratings ----------------------------------------------------------------------------


def test_synthetic_ratings_are_the_same_at_every_call_and_as_many_as_the_check_says() -> None:
    first = vars(synthetic_ratings.read())
    np.random.seed(5)  # a global state that must not matter
    second = vars(synthetic_ratings.read())
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert len(first["users"]) == synthetic_ratings.NUM_USERS * (synthetic_ratings.TAKEN - 1)
    assert (first["num_users"], first["num_items"]) == (500, 400)


def test_neumf_clearly_beats_popularity_on_synthetic_ratings() -> None:
    config = SyntheticRatingsSettings(factors=16, widths=(64, 64, 32, 16), dropout=0.2)
    torch.manual_seed(1)
    task = SyntheticRatings(config, Path(), Place(0, 1), seeds=Seeds.derive(1, 0), device=CPU)
    optimizer = build_optimizer(Adam(lr=0.0045, betas=(0.25, 0.5)), task.model)
    for epoch in range(3):
        for batch in task.train_batches(epoch):
            optimizer.zero_grad()
            task.loss(batch).backward()
            optimizer.step()
    hits, count = task.evaluate()["hr@10"]
    # 0.59 against 0.23 in a run; the deviation of a hit rate of 500 users is at most 0.023.
    assert hits / count > popularity(synthetic_ratings.read())["hr@10"] + 0.2

"""Ratings, and their split by leave-one-out (He et al. 2017, arXiv 1708.05031, section 4.1)."""

from dataclasses import dataclass

import numpy as np

from tasks.recommendation import Interactions

MIN_RATINGS = 20
"""Users with fewer ratings are dropped."""
NUM_NEGATIVES = 100
"""Items that a user never rated, among which the held-out one is ranked."""
NEGATIVES_SEED = 0


@dataclass(frozen=True)
class Ratings:
    """Who rated what when, arrays (N,); that a rating was given counts, not its stars."""

    users: np.ndarray
    items: np.ndarray
    times: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> "Ratings":
        return Ratings(self.users[chosen], self.items[chosen], self.times[chosen])


def split(ratings: Ratings) -> Interactions:
    """Leave-one-out: each user's last rating is for testing, among items that the user never rated.

    A pair rated twice counts once, the last time; users with few ratings are dropped; users and items are
    numbered in the order of their ids. Of ratings given at the same time, the item with the largest id is
    last: the order of lines does not matter. Raises ValueError where no user is left, or where one rated
    nearly all items.
    """
    ratings = _latest(_numbered(ratings))
    ratings = _numbered(ratings[np.bincount(ratings.users)[ratings.users] >= MIN_RATINGS])
    if not len(ratings.users):
        raise ValueError(f"expected a user with {MIN_RATINGS} ratings or more, found none")
    num_users, num_items = int(ratings.users.max()) + 1, int(ratings.items.max()) + 1
    held_out = _last_rows(ratings)  # (num_users,)
    negatives = _draw_negatives(ratings, num_users, num_items)  # (num_users, NUM_NEGATIVES)
    trained = np.ones(len(ratings.users), bool)
    trained[held_out] = False
    return Interactions(
        ratings.users[trained],
        ratings.items[trained],
        np.concatenate([ratings.items[held_out, None], negatives], axis=1),
        num_users,
        num_items,
    )


def _numbered(ratings: Ratings) -> Ratings:
    """Users and items as int32 from 0 up, in the order of their ids."""
    users, items = (np.unique(ids, return_inverse=True)[1] for ids in (ratings.users, ratings.items))
    return Ratings(users.astype(np.int32), items.astype(np.int32), ratings.times)


def _keys(ratings: Ratings, num_items: int) -> np.ndarray:
    """One int64 number for each user and item, in the order of both."""
    keys: np.ndarray = ratings.users.astype(np.int64) * num_items + ratings.items
    return keys


def _latest(ratings: Ratings) -> Ratings:
    """Sorted by user, then item, and of each pair the last rating only."""
    keys = _keys(ratings, int(ratings.items.max()) + 1)
    order = np.lexsort((ratings.times, keys))
    keys = keys[order]
    return ratings[order[np.append(keys[1:] != keys[:-1], True)]]


def _last_rows(ratings: Ratings) -> np.ndarray:
    """Of ratings sorted by user and item: the row (num_users,) of each user's last rating."""
    counts = np.bincount(ratings.users)
    starts = np.cumsum(counts) - counts
    is_last = ratings.times == np.repeat(np.maximum.reduceat(ratings.times, starts), counts)
    rows: np.ndarray = np.maximum.reduceat(np.where(is_last, np.arange(len(is_last)), -1), starts)
    return rows


def _draw_negatives(ratings: Ratings, num_users: int, num_items: int) -> np.ndarray:
    """Items (num_users, NUM_NEGATIVES) int32, in each row distinct and never rated by its user. Every such
    set is as likely, since what is drawn again depends on equality alone."""
    most = int(np.bincount(ratings.users).max())
    if most + NUM_NEGATIVES > num_items:
        rated_most = f"a user rated {most:,} of the {num_items:,} items"
        raise ValueError(f"expected {NUM_NEGATIVES} items that each user never rated; {rated_most}")
    rated = _keys(ratings, num_items)  # (N,), sorted
    rng = np.random.default_rng(NEGATIVES_SEED)
    drawn = rng.integers(num_items, size=(num_users, NUM_NEGATIVES), dtype=np.int32)
    rows = np.arange(num_users)  # those that may hold a rated or repeated item
    while len(rows):
        part = np.sort(drawn[rows], axis=1)
        keys = rows[:, None] * num_items + part
        bad = rated[np.minimum(np.searchsorted(rated, keys), len(rated) - 1)] == keys
        bad[:, 1:] |= part[:, 1:] == part[:, :-1]
        part[bad] = rng.integers(num_items, size=int(bad.sum()), dtype=np.int32)
        drawn[rows] = part
        rows = rows[bad.any(axis=1)]
    return drawn

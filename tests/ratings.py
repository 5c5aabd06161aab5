"""Interactions and ratings that tests make, and a small task on them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sage.interfaces import Place, Seeds
from tasks.data.leave_one_out import Ratings
from tasks.recommendation import Interactions, Recommendation, RecommendationSettings

CPU = torch.device("cpu")
Batch = tuple[Tensor, Tensor, Tensor]
SMALL = {"factors": 4, "widths": (8, 4)}


class Given(Recommendation):
    """On interactions given by a test."""

    @classmethod
    def check(cls, config: object, data: Path, world_size: int) -> None:
        raise NotImplementedError


def interactions(num_users: int = 40, num_items: int = 60, taken: int = 12) -> Interactions:
    """User u took `taken` consecutive items, modulo num_items, from 7 u on, and is tested on the 10 after."""
    users = np.repeat(np.arange(num_users), taken)
    items = (7 * users + np.tile(np.arange(taken), num_users)) % num_items
    tested = (7 * np.arange(num_users)[:, None] + taken + np.arange(10)) % num_items
    arrays = (array.astype(np.int32) for array in (users, items, tested))
    return Interactions(*arrays, num_users, num_items)


def make_task(
    found: Interactions, batch: int, place: Place | None = None, *, seed: int = 1, exclude: bool = False
) -> Recommendation:
    place = place or Place(0, 1)
    config = RecommendationSettings(name="given", global_batch=batch, exclude_positives=exclude, **SMALL)
    return Given(config, found, place, seeds=Seeds.derive(seed, place.rank), device=CPU)


def ratings_of(num_users: int, per_user: int, num_items: int) -> Ratings:
    """User 10 u rates distinct items 3 i at distinct times; lines in a random order."""
    rng = np.random.default_rng(0)
    items = np.concatenate([rng.permutation(num_items)[:per_user] for _ in range(num_users)])
    users = np.repeat(np.arange(num_users), per_user)
    order = rng.permutation(len(users))
    return Ratings(10 * users[order], 3 * items[order], rng.permutation(len(users)))


def together(*parts: Ratings) -> Ratings:
    """One after another."""
    return Ratings(*(np.concatenate([vars(part)[key] for part in parts]) for key in vars(parts[0])))

"""Makes data sets of the official format and size from a seed, for measurements without the published data.

Their content means nothing. What counts for the cost of a step is as published: the shapes, and roughly how
frequent a token, user or item is.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tasks.data import text
from tasks.data.cifar import CIFAR10, CIFAR100, CifarSet
from tasks.data.corpus import Corpus
from tasks.data.leave_one_out import MIN_RATINGS, Ratings, split
from tasks.data.movielens import SETS, MovieLensSet
from tasks.data.ptb import PTB
from tasks.data.wikitext2 import WIKITEXT2

TOKENS = {"wikitext2": (2_127_402, 221_606, 250_140), "ptb": (929_589, 73_760, 82_430)}
"""How many tokens the training, validation and test texts have: WikiText-2 as spaCy splits it; Penn Treebank
split at spaces, as Mikolov et al. 2010 count."""
NUM_TYPES = {"wikitext2": 28_869, "ptb": 10_000}
SEED = 0


def find_or_make(name: str, data: Path, temporary: Path) -> tuple[Path, str]:
    """The folder of a task's prepared data, and "real" or "made".

    That is the folder data where it holds them; otherwise the temporary folder, in which they are made.
    """
    prepared = PLACES[name]
    if prepared.path(data).exists():
        return data, "real"
    file = prepared.path(temporary)
    if not file.exists():
        file.parent.mkdir(parents=True)
        prepared.make(file)
    return temporary, "made"


def make_cifar(source: CifarSet, file: Path) -> None:
    rng = np.random.default_rng(SEED)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 50_000), ("test", 10_000)):
        arrays[f"{part}_x"] = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_y"] = rng.integers(source.num_classes, size=count, dtype=np.uint8)
    np.savez(file, **arrays)


def make_text(corpus: Corpus, file: Path) -> None:
    """Token numbers by Zipf's law: the odds of the r-th type are 1 / r."""
    rng, num_types = np.random.default_rng(SEED), NUM_TYPES[corpus.name]
    odds = 1 / np.arange(1, num_types + 1)
    train, valid, test = (
        rng.choice(num_types, count, p=odds / odds.sum()).astype(np.int32) for count in TOKENS[corpus.name]
    )
    vocabulary = np.array([f"type{rank}" for rank in range(num_types)])
    text.save(file, text.Text(train, valid, test, vocabulary))


def make_interactions(source: MovieLensSet, file: Path) -> None:
    np.savez(file, **vars(split(draw_ratings(*source.sizes))))


def draw_ratings(num_rows: int, num_users: int, num_items: int) -> Ratings:
    """Ratings sorted by user and item, which are numbered from 0 and differ much in frequency.

    Each item has a rating, and each user at least 20 of different items. A pair of both may come twice.
    """
    rng = np.random.default_rng(SEED)
    least = MIN_RATINGS * num_users
    users = np.concatenate(
        [np.repeat(np.arange(num_users), MIN_RATINGS), _skewed(rng, num_users, num_rows - least, 1.5)]
    )  # (rows,)
    items = _skewed(rng, num_items, num_rows, 2.0)
    # The first ratings of the users, one user after the other, go round the items: no user has one twice.
    items[:least] = np.arange(least) % num_items
    order = np.lexsort((items, users))
    return Ratings(users[order], items[order], rng.integers(789_652_009, 1_427_784_002, num_rows))


def _skewed(rng: np.random.Generator, count: int, size: int, power: float) -> np.ndarray:
    """Random numbers (size,) below count; small ones are more frequent."""
    return (count * rng.random(size) ** power).astype(np.int64)


class PreparedFile(NamedTuple):
    """A task's data as its preparation leaves it."""

    path: Callable[[Path], Path]
    """Where the file is in a folder of data."""
    make: Callable[[Path], None]
    """Writes a made file at a path."""


PLACES: dict[str, PreparedFile] = {
    **{source.name: PreparedFile(source.path, partial(make_cifar, source)) for source in (CIFAR10, CIFAR100)},
    **{
        corpus.name: PreparedFile(partial(corpus.path, name="spacy"), partial(make_text, corpus))
        for corpus in (WIKITEXT2, PTB)
    },
    **{name: PreparedFile(source.path, partial(make_interactions, source)) for name, source in SETS.items()},
}
"""By the names of all tasks with published data."""

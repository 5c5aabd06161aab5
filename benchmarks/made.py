"""Data sets of the official format and size, made from a seed, for measurements without the published data.

What they hold means nothing; the cost of a step is that of their shapes, and of how frequent
a token, user or item is.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tasks.data import text
from tasks.data.cifar import CIFAR10, CIFAR100, CifarSet
from tasks.data.corpus import Corpus
from tasks.data.leave_one_out import MIN_RATINGS, Ratings, split
from tasks.data.movielens import SETS, MovieLensSet
from tasks.data.ptb import PTB
from tasks.data.wikitext2 import WIKITEXT2

TOKENS = {"wikitext2": (2_127_402, 221_606, 250_140), "ptb": (929_589, 73_760, 82_430)}
"""Of the training, validation and test texts: WikiText-2 by spaCy, as prepared; Penn Treebank by its spaces,
as Mikolov et al. 2010 count them."""
NUM_TYPES = {"wikitext2": 28_869, "ptb": 10_000}
SEED = 0


def find_or_make(name: str, data: Path, temporary: Path) -> tuple[Path, str]:
    """The folder of a task's prepared data, and "real" or "made": data, or the temporary one, filled here."""
    path, make = PLACES[name]
    if path(data).exists():
        return data, "real"
    file = path(temporary)
    if not file.exists():
        file.parent.mkdir(parents=True)
        make(file)
    return temporary, "made"


def make_cifar(source: CifarSet, file: Path) -> None:
    rng = np.random.default_rng(SEED)
    arrays: dict[str, Any] = {}
    for part, count in (("train", 50_000), ("test", 10_000)):
        arrays[f"{part}_x"] = rng.integers(256, size=(count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_y"] = rng.integers(source.num_classes, size=count, dtype=np.uint8)
    np.savez(file, **arrays)


def make_text(corpus: Corpus, file: Path) -> None:
    """Token numbers by Zipf's law: the r-th type with odds of 1 / r."""
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
    """Ratings sorted by user and item; users and items of skewed frequency, numbered from 0, each item with a
    rating and each user with 20 of different items or more. A pair may come twice."""
    rng = np.random.default_rng(SEED)
    least = MIN_RATINGS * num_users
    users = np.concatenate(
        [np.repeat(np.arange(num_users), MIN_RATINGS), _skewed(rng, num_users, num_rows - least, 1.5)]
    )  # (rows,)
    items = _skewed(rng, num_items, num_rows, 2.0)
    # The first ratings of all users together go through the items again and again: none repeats for a user.
    items[:least] = np.arange(least) % num_items
    order = np.lexsort((items, users))
    return Ratings(users[order], items[order], rng.integers(789_652_009, 1_427_784_002, num_rows))


def _skewed(rng: np.random.Generator, count: int, size: int, power: float) -> np.ndarray:
    """Numbers (size,) below count, the small ones more frequent."""
    return (count * rng.random(size) ** power).astype(np.int64)


Place = tuple[Callable[[Path], Path], Callable[[Path], None]]
PLACES: dict[str, Place] = {
    **{source.name: (source.path, partial(make_cifar, source)) for source in (CIFAR10, CIFAR100)},
    **{
        corpus.name: (partial(corpus.path, name="spacy"), partial(make_text, corpus))
        for corpus in (WIKITEXT2, PTB)
    },
    **{name: (source.path, partial(make_interactions, source)) for name, source in SETS.items()},
}
"""Of each task with published data: where its prepared file is in a folder, and how one is made."""

"""Recommendation from implicit feedback: which item does a user take next? Data resident on the device,
negatives drawn anew each epoch, HR@10 and NDCG@10 with every user scored once."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import isqrt
from typing import Annotated, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from pydantic import Field, Strict, model_validator
from torch import Tensor

from sage.config import Named
from sage.draws import Draws, bits_at, modulo
from sage.interfaces import Place, Seeds, Task, seed_of
from tasks.models.neumf import NeuMF

CUTOFF = 10
"""A hit is a held-out item among the first 10: HR@10, NDCG@10."""
EVALUATION_USERS = 512
"""Users at a time on a worker when evaluating; bounds the memory, does not change the result's meaning."""


@dataclass(frozen=True)
class Interactions:
    """Who took what: users (N,) and items (N,) for training, int32; for testing the candidates of every user
    (num_users, 1 + negatives) int32, the held-out item first, then items that the user never took."""

    users: np.ndarray
    items: np.ndarray
    test_items: np.ndarray
    num_users: int
    num_items: int


class RecommendationSettings(Named):
    """NeuMF and its training; a data set's own settings add global_batch."""

    global_batch: int = Field(ge=1)
    """Interactions in a step, positive and negative, over all workers; a multiple of their number."""
    negatives: int = Field(default=4, ge=1, le=1000)
    """Negatives drawn for each positive, anew each epoch."""
    exclude_positives: bool = False
    """Draw no negative that the user took in training; as published, all items are drawn from alike."""
    factors: int = Field(default=64, ge=1)
    """Width of the factorisation's embeddings."""
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Strict(False), Field(min_length=2)] = (
        256,
        256,
        128,
        64,
    )
    """The MLP's widths: its input, user and item in equal parts, and each layer's output."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """After each ReLU of the MLP."""

    @model_validator(mode="after")
    def _input_is_even(self) -> Self:
        if self.widths[0] % 2:
            raise ValueError(
                f"widths: expected an even first width, half of it for the user, got {self.widths[0]}"
            )
        return self


def check_batch(config: RecommendationSettings, num_positives: int, world_size: int) -> None:
    """Raise ValueError where a global batch cannot be divided over the workers, or exceeds an epoch."""
    batch, most = config.global_batch, num_positives * (1 + config.negatives)
    if batch % world_size:
        raise ValueError(f"task.global_batch: expected a multiple of the {world_size} workers, got {batch}")
    if batch > most:
        raise ValueError(f"task.global_batch: expected at most {most} (an epoch's interactions), got {batch}")


class Shuffle:
    """A permutation of range(size) that is computed position by position, and never stored.

    An epoch of MovieLens 20M has 10^8 interactions: torch.randperm takes 8 s and 0.4 GB for them on every
    worker, which needs only its own slices. The numbers are laid out in rows of about sqrt(size), the last
    one shorter; in turn each column and each row is rotated by a random offset of its own: a generalised
    Feistel network (Black & Rogaway 2002, "Ciphers with arbitrary finite domains") in which no number falls
    outside the range, so that no device is waited for. Its bits depend on the draws, not on the device.
    """

    ROUNDS = 3

    def __init__(self, size: int, draws: Draws, device: torch.device) -> None:
        """size: at most 46,340^2, so that numbers fit in int32."""
        assert 0 < size <= 46_340**2
        self._columns = isqrt(size - 1) + 1
        rows = -(-size // self._columns)
        last = size - (rows - 1) * self._columns  # columns of the last row
        heights = torch.where(torch.arange(self._columns, device=device) < last, rows, rows - 1)
        widths = torch.where(torch.arange(rows, device=device) < rows - 1, self._columns, last)
        self._rotations = [(Rotation(heights, draws), Rotation(widths, draws)) for _ in range(self.ROUNDS)]

    def __call__(self, positions: Tensor) -> Tensor:
        """positions (B,) int32, each below size -> the numbers there, (B,) int32."""
        rows, columns = positions // self._columns, positions % self._columns
        for of_columns, of_rows in self._rotations:
            rows = of_columns(rows, columns)
            columns = of_rows(columns, rows)
        return rows * self._columns + columns


class Rotation:
    """Rotates each of several lines, of any lengths, by an offset that is drawn for it."""

    def __init__(self, lengths: Tensor, draws: Draws) -> None:
        """lengths (lines,) int64. A line of length 0 is never asked for."""
        self._lengths = lengths.int()
        self._shifts = (draws.below(lengths.clamp(min=1)) - lengths).int()

    def __call__(self, places: Tensor, lines: Tensor) -> Tensor:
        """Where the places (B,) int32 of the lines (B,) int32 come to lie in them."""
        # place + offset - length, or place + offset where that is below 0
        moved = self._shifts.index_select(0, lines).add_(places)
        return torch.where(moved < 0, moved + self._lengths.index_select(0, lines), moved)


class Untaken:
    """The items that each user did not take, by their number among them."""

    def __init__(self, users: Tensor, items: Tensor, num_users: int, num_items: int) -> None:
        """users, items (N,) int32: who took what. Every user must have left an item."""
        self._num_items = num_items
        pairs = (users.long() * num_items + items).unique()  # ascending
        owners, taken = pairs // num_items, pairs % num_items
        self._firsts = torch.searchsorted(pairs, torch.arange(num_users, device=pairs.device) * num_items)
        self.counts = num_items - owners.bincount(minlength=num_users)
        """(users,): how many there are."""
        assert (self.counts > 0).all()
        # How many untaken items are before each taken one; ascending for each user, and so over all.
        before = taken - torch.arange(len(pairs), device=pairs.device) + self._firsts[owners]
        self._before = owners * num_items + before

    def items(self, users: Tensor, numbers: Tensor) -> Tensor:
        """users (B,) int32, numbers (B,) int64, each below its user's count -> the items (B,) int32."""
        # The u-th untaken item is u + the number of taken ones that have at most u untaken ones before them.
        ends = torch.searchsorted(self._before, users.long() * self._num_items + numbers, right=True)
        return (numbers + ends - self._firsts[users]).int()


def sum_ranks(scores: Tensor) -> tuple[float, float]:
    """scores (U, 1 + negatives), the held-out item's first -> the sums over users of HR@10 and NDCG@10.

    HR@10 is 1 where the held-out item is among the user's 10 best, NDCG@10 is 1 / log2(1 + its place), or 0
    past the 10th (He et al. 2017, section 4.1). Where negatives have the same score as the held-out item, the
    result is the mean over all orders of them: a constant model has HR@10 = 10 / 101, not 1. A negative whose
    score is NaN counts as placed before it.
    """
    held_out, others = scores[:, :1], scores[:, 1:]
    ties = (others == held_out).sum(1)
    before = (~(others <= held_out)).sum(1)
    places = torch.arange(scores.shape[1], device=scores.device)
    inside = places < CUTOFF  # place 0 is the best
    gains = inside / (places + 2.0).double().log2()
    # over[k]: the sum over places below k; the item's place is one of before ... before + ties, all alike.
    sums = []
    for values in (inside.double(), gains):
        over = F.pad(values.cumsum(0), (1, 0))
        sums.append(((over[before + ties + 1] - over[before]) / (ties + 1)).sum().item())
    return sums[0], sums[1]


def popularity(found: Interactions) -> dict[str, float]:
    """The scores of a ranking by the number of training interactions, on the same candidates."""
    counts = np.bincount(found.items, minlength=found.num_items)
    hits, gains = sum_ranks(torch.from_numpy(counts[found.test_items]))
    return {"hr@10": hits / found.num_users, "ndcg@10": gains / found.num_users}


class Recommendation(Task):
    """Binary cross entropy of NeuMF on Interactions.

    An epoch holds each positive once and, for each, `negatives` of the same user with items drawn uniformly.
    They are shuffled together, alike on all workers, and each worker takes its slice of every global batch,
    so that the workers' labels differ by chance alone. The interactions left over at the end, fewer than a
    global batch, are not used; they are others each epoch.
    """

    score = "hr@10"
    score_limits = (0.0, 1.0)
    higher_is_better = True

    def __init__(
        self,
        config: RecommendationSettings,
        found: Interactions,
        place: Place,
        *,
        seeds: Seeds,
        device: torch.device,
    ) -> None:
        check_batch(config, len(found.users), place.world_size)
        model = NeuMF(
            found.num_users,
            found.num_items,
            factors=config.factors,
            widths=config.widths,
            dropout=config.dropout,
        )
        self.model = model.to(device)
        self.config, self.place, self.seeds, self.device = config, place, seeds, device
        self.num_items = found.num_items
        self.batch_per_worker = config.global_batch // place.world_size
        self.num_interactions = len(found.users) * (1 + config.negatives)
        self.steps_per_epoch = self.num_interactions // config.global_batch
        self._users = torch.from_numpy(found.users).to(device)  # (N,) int32
        self._items = torch.from_numpy(found.items).to(device)  # (N,) int32
        self._untaken = (
            Untaken(self._users, self._items, found.num_users, found.num_items)
            if config.exclude_positives
            else None
        )
        shard = slice(place.rank, None, place.world_size)  # every user on exactly one worker
        self._test_users = torch.arange(found.num_users, dtype=torch.int32)[shard].to(device)
        self._test_items = torch.from_numpy(found.test_items[shard]).to(device)  # (users, 1 + negatives)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Users (B,) and items (B,) int32, and labels (B,) float32: 1 for taken, 0 for drawn.

        The randomness of a batch depends on seed, epoch and batch alone, so an epoch can start anywhere.
        """
        order = Draws(seed_of(self.seeds.common, "order", epoch))
        shuffle = Shuffle(self.num_interactions, order, self.device)
        size = self.batch_per_worker
        for batch in range(start, self.steps_per_epoch):
            first = (batch * self.place.world_size + self.place.rank) * size
            positions = torch.arange(first, first + size, dtype=torch.int32, device=self.device)
            numbers = shuffle(positions)
            positive, rows = numbers < len(self._users), numbers % len(self._users)
            users = self._users[rows]
            items = torch.where(positive, self._items[rows], self._draw(epoch, positions, users))
            yield users, items, positive.float()

    def _draw(self, epoch: int, positions: Tensor, users: Tensor) -> Tensor:
        """An item (B,) int32 for each of an epoch's positions (B,) and users (B,), alike on all workers."""
        key = Draws(seed_of(self.seeds.common, "negatives", epoch)).key()
        bits = bits_at(key, positions.long())
        if self._untaken is None:
            return modulo(bits, self.num_items).int()
        return self._untaken.items(users, modulo(bits, self._untaken.counts[users]))

    def loss(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        users, items, labels = batch
        return F.binary_cross_entropy_with_logits(self.model(users, items), labels)

    @torch.no_grad()
    def evaluate(self) -> dict[str, tuple[float, float]]:
        """HR@10 and NDCG@10 of this worker's users."""
        self.model.eval()
        hits = gains = 0.0
        for users, items in zip(
            self._test_users.split(EVALUATION_USERS), self._test_items.split(EVALUATION_USERS), strict=True
        ):
            scores = self.model(users.repeat_interleave(items.shape[1]), items.flatten()).float()
            more_hits, more_gains = sum_ranks(scores.view(items.shape))
            hits, gains = hits + more_hits, gains + more_gains
        self.model.train()
        count = float(len(self._test_users))
        return {"hr@10": (hits, count), "ndcg@10": (gains, count)}

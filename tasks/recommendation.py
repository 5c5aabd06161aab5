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
    worker, which needs only its own slices. A generalised Feistel network over pairs (left, right), the round
    functions being tables of random numbers, with cycle walking: after Black & Rogaway 2002, "Ciphers with
    arbitrary finite domains". Its bits depend on the generator alone, not on the device.
    """

    ROUNDS = 6

    def __init__(self, size: int, rng: torch.Generator, device: torch.device) -> None:
        """rng: a CPU generator. size: at most 46,340^2, so that pairs fit in int32."""
        assert 0 < size <= 46_340**2
        self.size, self._side = size, isqrt(size - 1) + 1  # the smallest side with side^2 >= size
        tables = torch.randint(self._side, (self.ROUNDS, self._side), generator=rng, dtype=torch.int32)
        self._tables = tables.to(device)

    def __call__(self, positions: Tensor) -> Tensor:
        """positions (B,) int32, each below size -> the numbers there, (B,) int32."""
        numbers = self._permute(positions)
        # Permute the few numbers in [size, side^2) again. nonzero: a host synchronisation.
        while len(outside := (numbers >= self.size).nonzero().squeeze(1)):
            numbers[outside] = self._permute(numbers[outside])
        return numbers

    def _permute(self, numbers: Tensor) -> Tensor:
        left, right = numbers // self._side, numbers % self._side
        for table in self._tables:
            # (l, r) <- (r, (l + f(r)) mod side)
            left, right = right, table.index_select(0, right).add_(left).remainder_(self._side)
        return left * self._side + right


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
        self._taken = (
            self._pairs(self._users, self._items).sort().values if config.exclude_positives else None
        )
        shard = slice(place.rank, None, place.world_size)  # every user on exactly one worker
        self._test_users = torch.arange(found.num_users, dtype=torch.int32)[shard].to(device)
        self._test_items = torch.from_numpy(found.test_items[shard]).to(device)  # (users, 1 + negatives)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Users (B,) and items (B,) int32, and labels (B,) float32: 1 for taken, 0 for drawn.

        The randomness of a batch depends on seed, epoch and batch alone, so an epoch can start anywhere.
        """
        rng = torch.Generator().manual_seed(seed_of(self.seeds.common, "order", epoch))
        shuffle = Shuffle(self.num_interactions, rng, self.device)
        size = self.batch_per_worker
        for batch in range(start, self.steps_per_epoch):
            first = (batch * self.place.world_size + self.place.rank) * size
            positions = torch.arange(first, first + size, dtype=torch.int32, device=self.device)
            numbers = shuffle(positions)
            positive, rows = numbers < len(self._users), numbers % len(self._users)
            users = self._users[rows]
            items = torch.where(positive, self._items[rows], self._draw(epoch, batch, 0))
            if self._taken is not None:
                self._redraw(epoch, batch, users, items, positive)
            yield users, items, positive.float()

    def _draw(self, epoch: int, batch: int, attempt: int) -> Tensor:
        """This worker's slice (B,) int32 of items drawn for the whole global batch, alike on all workers."""
        rng = torch.Generator().manual_seed(seed_of(self.seeds.common, "negatives", epoch, batch, attempt))
        drawn = torch.randint(self.num_items, (self.config.global_batch,), generator=rng, dtype=torch.int32)
        first = self.place.rank * self.batch_per_worker
        return drawn[first : first + self.batch_per_worker].to(self.device)

    def _redraw(self, epoch: int, batch: int, users: Tensor, items: Tensor, positive: Tensor) -> None:
        """Replace, in place, the negatives that their user took; nobody took the items it is tested on."""
        attempt = 0
        while (taken := ~positive & self._is_taken(users, items)).any():  # a host synchronisation
            attempt += 1
            items.copy_(torch.where(taken, self._draw(epoch, batch, attempt), items))

    def _is_taken(self, users: Tensor, items: Tensor) -> Tensor:
        assert self._taken is not None
        pairs = self._pairs(users, items)
        nearest = torch.searchsorted(self._taken, pairs).clamp_(max=len(self._taken) - 1)
        return self._taken[nearest] == pairs

    def _pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """One int64 number for each user and item."""
        return users.long() * self.num_items + items

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

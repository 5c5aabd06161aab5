"""Language modelling: an LSTM over a long text, its hidden state carried from batch to batch; perplexity."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from pydantic import Field
from torch import Tensor

from sage.config import Named
from sage.interfaces import Place, Seeds, Task
from tasks.data.corpus import Corpus
from tasks.data.text import Text, TokenizerName
from tasks.models.lstm import LanguageLSTM

EVALUATION_COLUMNS = 64
"""Pieces that a held-out text is read in side by side, however many workers there are. Each starts without
context, so that more of them would raise the perplexity a little."""
EVALUATION_STEPS = 4
"""Tokens of each column at a time when evaluating: where memory is faulted in anew, larger scores (steps,
columns, types) cost more than their arithmetic. Does not change the result's meaning."""
NO_TARGET = -100
"""Where a column has no token left to predict: cross_entropy's ignore_index."""


class LanguageSettings(Named):
    batch_per_worker: int = Field(default=128, ge=1)
    """Columns of the text that a worker reads side by side."""
    bptt: int = Field(default=30, ge=1)
    """Tokens of each column in a step; gradients do not reach further back."""
    units: int = Field(default=650, ge=1)
    """Width of the embedding, which is the output layer too, and of each LSTM layer."""
    layers: int = Field(default=3, ge=1)
    """LSTM layers."""
    dropout: float = Field(default=0.4, ge=0, lt=1)
    """After the embedding, between the layers and after the last."""
    train_tokens: Annotated[int, Field(ge=2)] | None = None
    """Train on the first so many tokens of the training text, for a quick run; null: on all of it."""


class LanguageModelling(Task):
    """Cross entropy of each next token.

    The training text is cut into batch_per_worker x world_size columns of equal length; the last tokens,
    fewer than there are columns, are not used. Worker r reads columns r B to (r + 1) B - 1, with
    B = batch_per_worker, so that all workers together read what one with the whole batch does. The last step
    of an epoch may be shorter than bptt, on all workers alike.
    """

    score = "perplexity"
    score_limits = (1.0, math.inf)
    higher_is_better = False
    evaluated = "valid"
    state_names = ("hidden",)
    model: LanguageLSTM

    def __init__(
        self, config: LanguageSettings, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None:
        text = self.read(config, data)
        train = text.train[: config.train_tokens]
        check_batch(config.batch_per_worker, len(train), place.world_size)
        self.model = LanguageLSTM(len(text.vocabulary), config.units, config.layers, config.dropout).to(
            device
        )
        self.batch_per_worker, self.bptt = config.batch_per_worker, config.bptt
        self.device = device
        self._train = columns_of(train, config.batch_per_worker, place).to(device)  # (length, B) int32
        self._valid, self._test = (
            evaluation_columns(tokens, place).to(device) for tokens in (text.valid, text.test)
        )
        self.steps_per_epoch = -(-(len(self._train) - 1) // config.bptt)  # rounded up
        self.hidden = self.model.first_hidden(config.batch_per_worker)
        """(2, layers, B, units): what the next training batch starts from."""

    @classmethod
    @abstractmethod
    def read(cls, config: Any, data: Path) -> Text:
        """The text. Raises ValueError, in one line, where it is missing or damaged."""

    @classmethod
    def check(cls, config: LanguageSettings, data: Path, world_size: int) -> None:
        train = cls.read(config, data).train[: config.train_tokens]
        check_batch(config.batch_per_worker, len(train), world_size)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Tokens (T, B) int64 and those that follow them (T, B), T = bptt; every epoch reads the same.

        The hidden state becomes zero at batch 0. From a later start it stays as it is: a resumed run has
        restored `hidden` from the task's state.
        """
        if start == 0:
            self.hidden = torch.zeros_like(self.hidden)
        for batch in range(start, self.steps_per_epoch):
            chunk = self._train[batch * self.bptt : (batch + 1) * self.bptt + 1].long()  # (T + 1, B)
            yield chunk[:-1], chunk[1:]

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross entropy over the batch's tokens. Advances the hidden state."""
        tokens, targets = batch
        scores, hidden = self.model(tokens, self.hidden)
        self.hidden = hidden.detach().to(self.hidden.dtype)  # autocast may have changed the type
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())

    def evaluate(self) -> dict[str, tuple[float, float]]:
        """loss over this worker's share of the validation text."""
        return self._score(self._valid)

    def evaluate_at_end(self) -> dict[str, tuple[float, float]]:
        """The same of the test text."""
        return self._score(self._test)

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """perplexity = exp(total cross entropy / total tokens), over all workers."""
        mean = torch.tensor(values["loss"], dtype=torch.float64)
        return values | {"perplexity": mean.exp().item()}  # inf where Python's exp would raise

    @torch.no_grad()
    def _score(self, columns: Tensor) -> dict[str, tuple[float, float]]:
        """columns (2, length, columns): tokens and targets. The hidden state of training is left alone."""
        self.model.eval()
        tokens, targets = columns
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        hidden = self.model.first_hidden(tokens.shape[1])
        if tokens.numel():
            chunks = (part.split(EVALUATION_STEPS) for part in (tokens, targets))
            for some, wanted in zip(*chunks, strict=True):
                scores, hidden = self.model(some, hidden)
                total += F.cross_entropy(
                    scores.flatten(0, 1), wanted.flatten(), ignore_index=NO_TARGET, reduction="sum"
                )
        self.model.train()
        return {"loss": (total.item(), float((targets != NO_TARGET).sum().item()))}  # host synchronisations


def check_batch(batch_per_worker: int, num_tokens: int, world_size: int) -> None:
    """Raise ValueError where a column would have no token to predict."""
    most = num_tokens // (2 * world_size)
    if batch_per_worker > most:
        raise ValueError(
            f"task.batch_per_worker: expected at most {most} (columns of 2 tokens each, from {num_tokens} "
            f"tokens over {world_size} workers), got {batch_per_worker}"
        )


def columns_of(tokens: np.ndarray, batch: int, place: Place) -> Tensor:
    """tokens (N,) in consecutive columns of equal length, this worker's batch of them: (length, batch)."""
    num_columns = batch * place.world_size
    length = len(tokens) // num_columns
    columns = torch.from_numpy(tokens[: length * num_columns]).view(num_columns, length)
    return columns[place.rank * batch : (place.rank + 1) * batch].t().contiguous()


def evaluation_columns(tokens: np.ndarray, place: Place) -> Tensor:
    """This worker's columns of a held-out text (N,): tokens and targets (2, length, columns) int64.

    The N - 1 tokens that follow another are cut into EVALUATION_COLUMNS consecutive pieces, whose lengths
    differ by at most one, and dealt to the workers: each is predicted once, whatever N and the world size.
    """
    count = len(tokens) - 1
    bounds = torch.arange(EVALUATION_COLUMNS + 1) * count // EVALUATION_COLUMNS
    mine = slice(place.rank, None, place.world_size)
    starts, stops = bounds[:-1][mine], bounds[1:][mine]  # (columns,)
    places = starts + torch.arange(-(-count // EVALUATION_COLUMNS))[:, None]  # (length, columns)
    inside = places < stops
    places = places.clamp(max=count - 1)
    numbers = torch.from_numpy(tokens).long()
    return torch.stack((numbers[places], numbers[places + 1].where(inside, NO_TARGET)))


class CorpusSettings(LanguageSettings):
    tokenizer: TokenizerName = "spacy"
    """spacy: spaCy's English tokens, lower-cased (the published form); whitespace: the corpus's own."""


class CorpusModelling(LanguageModelling):
    """A corpus as its preparation left it; a subclass says which."""

    corpus: ClassVar[Corpus]

    @classmethod
    def read(cls, config: CorpusSettings, data: Path) -> Text:
        return cls.corpus.read(data, config.tokenizer)

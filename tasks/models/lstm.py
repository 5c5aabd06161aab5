"""The LSTM language model."""

import torch
from torch import Tensor, nn

EMBEDDING_RANGE = 0.1
"""The embedding's first values are uniform within +- this; value of the published runs."""


class LanguageLSTM(nn.Module):
    """Embedding > LSTM layers > softmax over the types, whose weight is the embedding's.

    Weight tying: Press & Wolf 2016, arXiv 1608.05859; dropout after the embedding, between the layers and
    after the last: Zaremba et al. 2014, arXiv 1409.2329. 28,949,319 parameters with 28,869 types, 650 units
    and 3 layers. Each layer is a module of its own, since the dropout inside of one of several layers is
    cuDNN's on a GPU, which draws from a state of its own that no checkpoint can hold.
    """

    def __init__(self, num_types: int, units: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_types, units)
        self.dropout = nn.Dropout(dropout)
        self.lstm = nn.ModuleList(nn.LSTM(units, units) for _ in range(layers))
        self.decoder = nn.Linear(units, num_types)
        nn.init.uniform_(self.embedding.weight, -EMBEDDING_RANGE, EMBEDDING_RANGE)
        nn.init.zeros_(self.decoder.bias)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (T, B), hidden (2, layers, B, units): outputs and cells before the first of them ->
        scores (T, B, types) of what follows each token, and hidden after the last."""
        outputs, ends = self.embedding(tokens), []
        for layer, output, cell in zip(self.lstm, *hidden.unsqueeze(2), strict=True):  # (1, B, units) each
            outputs, end = layer(self.dropout(outputs), (output, cell))
            ends.append(torch.stack(end))  # (2, 1, B, units)
        return self.decoder(self.dropout(outputs)), torch.cat(ends, dim=1)

    def first_hidden(self, batch: int) -> Tensor:
        """(2, layers, batch, units) zeros: before any token."""
        return self.embedding.weight.new_zeros(2, len(self.lstm), batch, self.embedding.embedding_dim)

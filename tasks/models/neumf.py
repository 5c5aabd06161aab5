"""Neural matrix factorisation: which user takes which item."""

from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn


class NeuMF(nn.Module):
    """He et al. 2017, arXiv 1708.05031, section 3.4: a generalised matrix factorisation beside an MLP.

    The two have embeddings of their own: `factors` wide, and half of widths[0], so that user and item
    together are the MLP's input. A last linear layer with a bias reads both, [p_u * q_i, mlp([p'_u, q'_i])].
    With 138,493 users, 26,744 items, 64 factors and widths 256-256-128-64: 31,832,577 parameters, of which
    165,237 x 192 are embeddings and 65,792 + 32,896 + 8,256 + 129 the layers.
    Dropout follows each ReLU of the MLP; neither embeddings nor factors are dropped. First weights as in the
    paper's code: embeddings normal with deviation 0.01, the MLP Glorot uniform, the last layer LeCun uniform.
    """

    def __init__(
        self, num_users: int, num_items: int, *, factors: int, widths: tuple[int, ...], dropout: float
    ) -> None:
        super().__init__()
        self.user_factors = nn.Embedding(num_users, factors)
        self.item_factors = nn.Embedding(num_items, factors)
        self.user_features = nn.Embedding(num_users, widths[0] // 2)
        self.item_features = nn.Embedding(num_items, widths[0] // 2)
        self.layers = nn.ModuleList(nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths))
        self.last = nn.Linear(factors + widths[-1], 1)
        self.dropout = nn.Dropout(dropout)
        self._reset()

    def _reset(self) -> None:
        for table in (self.user_factors, self.item_factors, self.user_features, self.item_features):
            nn.init.normal_(table.weight, std=0.01)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        nn.init.kaiming_uniform_(self.last.weight, nonlinearity="linear")  # deviation 1 / sqrt(inputs)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """users, items (B,) of an integer type -> logits (B,)."""
        product = self.user_factors(users) * self.item_factors(items)  # (B, factors)
        features = torch.cat([self.user_features(users), self.item_features(items)], dim=1)  # (B, widths[0])
        for layer in self.layers:
            features = self.dropout(F.relu(layer(features)))
        logits: Tensor = self.last(torch.cat([product, features], dim=1))  # (B, 1)
        return logits.squeeze(1)

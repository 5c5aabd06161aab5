"""NeuMF on MovieLens: 100K, 1M and 20M, each with a global batch for its size."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from sage.config import Named
from sage.interfaces import Place, Seeds
from tasks.data.movielens import ML_1M, ML_20M, ML_100K, MovieLensSet
from tasks.recommendation import Recommendation, RecommendationSettings, check_batch


class MovieLens100KSettings(RecommendationSettings):
    name: Literal["ml-100k"] = "ml-100k"
    global_batch: int = Field(default=2**12, ge=1)
    """Interactions in a step, positive and negative, over all workers; a multiple of their number."""


class MovieLens1MSettings(RecommendationSettings):
    name: Literal["ml-1m"] = "ml-1m"
    global_batch: int = Field(default=2**16, ge=1)
    """Interactions in a step, positive and negative, over all workers; a multiple of their number."""


class MovieLens20MSettings(RecommendationSettings):
    name: Literal["ml-20m"] = "ml-20m"
    global_batch: int = Field(default=2**20, ge=1)
    """Interactions in a step, positive and negative, over all workers; a multiple of their number."""


class _MovieLens(Recommendation):
    """On a prepared data set."""

    source: ClassVar[MovieLensSet]

    def __init__(
        self, config: RecommendationSettings, data: Path, place: Place, *, seeds: Seeds, device: torch.device
    ) -> None:
        super().__init__(config, self.source.read(data), place, seeds=seeds, device=device)

    @classmethod
    def check(cls, config: RecommendationSettings, data: Path, world_size: int) -> None:
        check_batch(config, cls.source.check(data), world_size)


class MovieLens100K(_MovieLens):
    """943 users, 1,682 items, 99,057 positives."""

    Settings: ClassVar[type[Named]] = MovieLens100KSettings
    source = ML_100K


class MovieLens1M(_MovieLens):
    """6,040 users, 3,706 items, 994,169 positives."""

    Settings: ClassVar[type[Named]] = MovieLens1MSettings
    source = ML_1M


class MovieLens20M(_MovieLens):
    """138,493 users, 26,744 items, 19,861,770 positives."""

    Settings: ClassVar[type[Named]] = MovieLens20MSettings
    source = ML_20M

"""NeuMF on interactions drawn from a latent-factor model: recommendation without a download."""

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field

from sage.config import Named
from sage.interfaces import Place, Seeds
from tasks.data import synthetic_ratings
from tasks.recommendation import Recommendation, RecommendationSettings, check_batch


class SyntheticRatingsSettings(RecommendationSettings):
    name: Literal["synthetic_ratings"] = "synthetic_ratings"
    global_batch: int = Field(default=2400, ge=1)
    """Interactions in a step, positive and negative, over all workers; a multiple of their number."""


class SyntheticRatings(Recommendation):
    """500 users, 400 items, 24,500 positives."""

    Settings: ClassVar[type[Named]] = SyntheticRatingsSettings

    def __init__(
        self,
        config: SyntheticRatingsSettings,
        data: Path,
        place: Place,
        *,
        seeds: Seeds,
        device: torch.device,
    ) -> None:
        super().__init__(config, synthetic_ratings.read(), place, seeds=seeds, device=device)

    @classmethod
    def check(cls, config: SyntheticRatingsSettings, data: Path, world_size: int) -> None:
        check_batch(config, synthetic_ratings.NUM_USERS * (synthetic_ratings.TAKEN - 1), world_size)

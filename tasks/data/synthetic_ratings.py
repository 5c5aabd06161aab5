"""Interactions drawn from a latent-factor model: what NeuMF can learn and popularity cannot; no download."""

import numpy as np

from tasks.data.leave_one_out import Ratings, split
from tasks.recommendation import Interactions

NUM_USERS, NUM_ITEMS = 500, 400
TAKEN = 50
"""Items that a user takes."""
NUM_FACTORS = 4
AFFINITY, POPULARITY = 4.0, 0.5
"""Deviations of the two parts of an item's logit: what the user likes, and what everybody does."""
SEED = 0


def read() -> Interactions:
    """The same at every call. A user takes TAKEN items without replacement, with odds of exp(logit), by the
    Gumbel trick (Vieira 2014); the time of each is drawn, so that any of them may be held out."""
    rng = np.random.default_rng(SEED)
    users, items = (rng.standard_normal((count, NUM_FACTORS)) for count in (NUM_USERS, NUM_ITEMS))
    logits = AFFINITY * (users @ items.T) / NUM_FACTORS**0.5 + POPULARITY * rng.standard_normal(NUM_ITEMS)
    order = np.argsort(-(logits + rng.gumbel(size=logits.shape)), axis=1)
    taken = order[:, :TAKEN].reshape(-1)  # (NUM_USERS * TAKEN,)
    return split(Ratings(np.repeat(np.arange(NUM_USERS), TAKEN), taken, rng.permutation(len(taken))))

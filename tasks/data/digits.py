"""scikit-learn's digits: 1,797 real 8 x 8 images of hand-written digits, inside the package; no download."""

import numpy as np
from sklearn.datasets import load_digits

from tasks.classification import ImageSet

NUM_TRAIN = 1437
"""80 % of the 1,797 images; the rest is the test set."""
SPLIT_SEED = 0


def read() -> ImageSet:
    """Images (N, 8, 8, 1) with values 0 to 16; the same split at every call."""
    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]  # (1797, 8, 8, 1)
    labels = digits.target.astype(np.uint8)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return ImageSet(images[train], labels[train], images[test], labels[test])

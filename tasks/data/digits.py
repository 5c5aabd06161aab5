"""scikit-learn's digits: 1,797 real 8 x 8 images of hand-written digits, inside the package; no download."""

import gzip
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from tasks.classification import ImageSet

NUM_TRAIN = 1437
"""80 % of the 1,797 images; the rest is the test set."""
SPLIT_SEED = 0


def read() -> ImageSet:
    """Images (N, 8, 8, 1) with values 0 to 16; the same split at every call."""
    table = _read_table()  # (1797, 65): the pixels, row by row, and the label
    images = table[:, :-1].reshape(-1, 8, 8, 1)
    labels = table[:, -1]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return ImageSet(images[train], labels[train], images[test], labels[test])


def _read_table() -> np.ndarray:
    """What sklearn.datasets.load_digits reads, without its import, which takes as long as the training."""
    package = find_spec("sklearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    with gzip.open(file, "rt") as lines:
        return np.loadtxt(lines, delimiter=",").astype(np.uint8)

"""CIFAR-10 in its prepared form: DATA/cifar10/cifar10.npz with train_x, train_y, test_x, test_y, uint8,
NHWC."""

import math
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from tasks.classification import ImageSet

KEYS = ("train_x", "train_y", "test_x", "test_y")
PREPARE = "./prepare_dataset.sh cifar10 --data"


def path(data: Path) -> Path:
    return data / "cifar10" / "cifar10.npz"


def check(data: Path) -> int:
    """The number of training images, from the headers alone. Raises ValueError, in one line, where the
    prepared file is missing, is none, or has wrong keys, shapes or types."""
    file = path(data)
    try:
        headers = _headers(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; make it with: {PREPARE} {data}") from None
    except Exception as error:  # a damaged archive fails in many ways
        raise ValueError(f"{file}: expected a prepared npz file; it cannot be read: {error}") from None
    if not set(KEYS) <= set(headers):
        raise ValueError(f"{file}: expected the arrays {', '.join(KEYS)}, got {', '.join(headers) or 'none'}")
    for part in ("train", "test"):
        count = headers[f"{part}_x"][0][0] if headers[f"{part}_x"][0] else 0
        for key, shape in ((f"{part}_x", (count, 32, 32, 3)), (f"{part}_y", (count,))):
            if headers[key] != (shape, np.dtype(np.uint8)) or count == 0:
                got_shape, got_type = headers[key]
                expected = "(N, 32, 32, 3)" if key.endswith("_x") else f"({count},)"
                raise ValueError(f"{file}: expected {key} as uint8 {expected}, got {got_type} {got_shape}")
    return headers["train_x"][0][0]


def prepare(data: Path, archive: Path | None, source: type[CIFAR10] = CIFAR10) -> str:
    """Make the prepared file, by torchvision from the official place or from its archive; says what was done.

    Nothing is done where the file is there; an interrupted call leaves none. Raises ValueError where the
    archive is not the published one, by its MD5 checksum.
    """
    file = path(data)
    if file.exists():
        check(data)
        return f"{file} is there already"
    if archive is not None and not check_integrity(archive, source.tgz_md5):
        raise ValueError(
            f"{archive}: expected {source.filename} with MD5 {source.tgz_md5}, got another or none"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        if archive is not None:
            extract_archive(str(archive), folder)
        parts = {
            part: source(folder, train=part == "train", download=archive is None)
            for part in ("train", "test")
        }
        arrays = {f"{part}_x": images.data for part, images in parts.items()}
        arrays |= {f"{part}_y": np.array(images.targets, np.uint8) for part, images in parts.items()}
        whole = Path(folder) / file.name
        np.savez_compressed(whole, **arrays)
        whole.replace(file)
    return f"{file}: {len(arrays['train_x'])} images for training, {len(arrays['test_x'])} for testing"


def read(data: Path) -> ImageSet:
    """The whole data set; check() has passed."""
    with np.load(path(data), allow_pickle=False) as arrays:
        return ImageSet(**{key: arrays[key] for key in KEYS})


def _headers(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    headers = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(member)
                if member.tell() + math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size:
                    raise ValueError(f"{name} is not as long as it says")
                headers[name.removesuffix(".npy")] = (shape, dtype)
    return headers

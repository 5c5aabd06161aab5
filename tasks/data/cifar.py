"""CIFAR-10 and CIFAR-100 in their prepared form: DATA/NAME/NAME.npz with train_x, train_y, test_x, test_y,
uint8, NHWC."""

import hashlib
import shlex
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tasks.classification import ImageSet
from tasks.data.npz import Headers, read_headers

if TYPE_CHECKING:
    from torchvision import datasets

KEYS = ("train_x", "train_y", "test_x", "test_y")
Found = TypeVar("Found")


@dataclass(frozen=True)
class CifarSet:
    """One of the two data sets of Krizhevsky 2009, Learning multiple layers of features from tiny images."""

    name: str
    num_classes: int
    load_official: "Callable[[], type[datasets.CIFAR10]]"
    """Imports torchvision's reader, which takes a second and only preparing needs: it knows the official
    place, the archive's format and its checksums."""

    def path(self, data: Path) -> Path:
        return data / self.name / f"{self.name}.npz"

    def check(self, data: Path) -> int:
        """The number of training images, from the headers and labels alone. Raises ValueError, in one line,
        where the prepared file is missing, damaged, or has wrong keys, shapes, types or labels."""
        file = self.path(data)
        headers = self._attempt(read_headers, data)
        _check_headers(file, headers)
        for key, largest in self._attempt(_largest_labels, data).items():
            if largest >= self.num_classes:
                raise ValueError(f"{file}: expected labels below {self.num_classes} in {key}, got {largest}")
        return headers["train_x"][0][0]

    def prepare(self, data: Path, given: Path | None) -> str:
        """Make the prepared file with torchvision, and return what was done, in words. The source is the
        official place or what is given: the archive, or a folder with the archive or with its files.

        An existing file stays as it is; an interrupted call leaves no file. Raises ValueError where what is
        given does not have the published MD5 checksums, or where nothing can be downloaded.
        """
        file = self.path(data)
        if file.exists():
            self.check(data)
            return f"{file} is there already"
        verified = None if given is None else self._verified(given)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            arrays = self._arrays(self._unpacked(verified, Path(temporary)))
            whole = Path(temporary) / file.name
            np.savez_compressed(whole, **arrays)
            whole.replace(file)
        return f"{file}: {len(arrays['train_x'])} images for training, {len(arrays['test_x'])} for testing"

    def read(self, data: Path) -> ImageSet:
        """The whole data set; check() has passed."""
        with np.load(self.path(data), allow_pickle=False) as arrays:
            return ImageSet(**{key: arrays[key] for key in KEYS})

    def _attempt(self, read: Callable[[Path], Found], data: Path) -> Found:
        """What read returns of the prepared file. Raises ValueError, in one line, where it cannot be read."""
        file = self.path(data)
        try:
            return read(file)
        except FileNotFoundError:
            command = f"./prepare_dataset.sh {self.name} --data {shlex.quote(str(data))}"
            raise ValueError(f"{file}: there is no such file; make it with: {command}") from None
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{file}: expected a prepared npz file; it cannot be read: {error}") from None

    def _verified(self, given: Path) -> Path:
        """The archive, or the folder with the unpacked one. Raises ValueError where a checksum is wrong."""
        official, name = self.load_official(), given.resolve().name
        meta = (official.meta["filename"], official.meta["md5"])
        if name == official.base_folder or (given / official.base_folder).is_dir():
            root = given.resolve().parent if name == official.base_folder else given
            for file, md5 in (*official.train_list, *official.test_list, meta):
                _check_md5(root / official.base_folder / file, file, md5)
            return root
        archive = given / official.filename if given.is_dir() else given
        _check_md5(archive, official.filename, official.tgz_md5)
        return archive

    def _unpacked(self, verified: Path | None, temporary: Path) -> Path:
        """The folder with the unpacked archive: the temporary one, where it had to be unpacked."""
        from torchvision.datasets.utils import extract_archive

        if verified is None:
            official = self.load_official()
            try:
                official(temporary, download=True)
            except (OSError, RuntimeError) as error:  # no network, no answer, or another file there
                reason = f"cannot be downloaded ({error}); fetch it by hand and pass it with --from"
                raise ValueError(f"{official.url}: {reason}") from None
        elif verified.is_file():
            extract_archive(str(verified), str(temporary))
        else:
            return verified
        return temporary

    def _arrays(self, root: Path) -> dict[str, Any]:
        """Images (N, 32, 32, 3) and labels (N,), uint8, of the unpacked archive in a folder."""
        official = self.load_official()
        arrays: dict[str, Any] = {}
        for part in ("train", "test"):
            images = official(root, train=part == "train")
            arrays |= {f"{part}_x": images.data, f"{part}_y": np.array(images.targets, np.uint8)}
        return arrays


def _load_reader(name: str) -> "type[datasets.CIFAR10]":
    from torchvision import datasets

    reader: type[datasets.CIFAR10] = getattr(datasets, name)
    return reader


CIFAR10 = CifarSet("cifar10", 10, partial(_load_reader, "CIFAR10"))
CIFAR100 = CifarSet("cifar100", 100, partial(_load_reader, "CIFAR100"))


def _check_md5(file: Path, name: str, md5: str) -> None:
    """Raise ValueError where a file is not the published one of a name."""
    if not file.is_file():
        raise ValueError(f"{file}: expected {name} with MD5 {md5}; there is no such file")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "md5").hexdigest()
    if found != md5:
        raise ValueError(f"{file}: expected {name} with MD5 {md5}; it is cut short, or another")


def _check_headers(file: Path, headers: Headers) -> None:
    """Raise ValueError where keys, shapes or types are not those of the prepared form."""
    if not set(KEYS) <= set(headers):
        raise ValueError(f"{file}: expected the arrays {', '.join(KEYS)}, got {', '.join(headers) or 'none'}")
    for part in ("train", "test"):
        count = headers[f"{part}_x"][0][0] if headers[f"{part}_x"][0] else 0
        for key, shape in ((f"{part}_x", (count, 32, 32, 3)), (f"{part}_y", (count,))):
            if headers[key] != (shape, np.dtype(np.uint8)) or count == 0:
                got_shape, got_type = headers[key]
                expected = "(N, 32, 32, 3)" if key.endswith("_x") else f"({count},)"
                raise ValueError(f"{file}: expected {key} as uint8 {expected}, got {got_type} {got_shape}")


def _largest_labels(file: Path) -> dict[str, int]:
    with np.load(file, allow_pickle=False) as arrays:
        return {key: int(arrays[key].max()) for key in ("train_y", "test_y")}

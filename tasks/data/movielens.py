"""MovieLens (Harper & Konstan 2015, doi 10.1145/2827872) in its prepared form, DATA/NAME/NAME.npz: users
(N,) and items (N,), sorted by both, test_items (num_users, 101), int32; num_users and num_items, int64."""

import hashlib
import re
import shlex
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tasks.data.archive import copy_limited
from tasks.data.fetch import fetch_first
from tasks.data.leave_one_out import MIN_RATINGS, NUM_NEGATIVES, Ratings, split
from tasks.data.npz import Headers, read_headers
from tasks.recommendation import Interactions, popularity

MAX_BYTES = 1_000_000_000
"""Of an unpacked file of ratings; the largest, ml-20m's, has 533 million."""
COLUMNS = ("userId", "movieId", "timestamp")
PLACE = "https://files.grouplens.org/datasets/movielens"
SHA256 = {
    "ml-100k": "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
    "ml-1m": "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
    "ml-20m": "96f243c338a8665f6bcc89c53edf6ee39162a846940de6b7c8c48aeada765ff3",
}
"""Of the official archives, as tensorflow_datasets 4.9.10 records them."""


def describe(found: Interactions) -> str:
    """How large it is, and how ranking by popularity scores."""
    scores = ", ".join(f"{name} {value:.4f}" for name, value in popularity(found).items())
    sizes = (
        f"{found.num_users:,} users, {found.num_items:,} items, {len(found.users):,} training interactions"
    )
    return f"{sizes}; ranking by popularity: {scores}"


@dataclass(frozen=True)
class MovieLensSet:
    """A data set, where it is published, and the format of its ratings."""

    name: str
    file: str
    """The file of ratings, in a folder named like the data set."""
    line: str
    """What its lines look like, for a person."""
    separator: str
    """A regular expression."""
    fields: tuple[str, ...]
    """What a line has between its separators."""
    has_header: bool
    sizes: tuple[int, int, int]
    """Published numbers of ratings, users and items."""

    def path(self, data: Path) -> Path:
        return data / self.name / f"{self.name}.npz"

    def check(self, data: Path) -> int:
        """The number of training interactions, from the headers alone. Raises ValueError, in one line, where
        the prepared file is missing, damaged, or has wrong arrays."""
        file = self.path(data)
        try:
            headers = read_headers(file)
        except FileNotFoundError:
            command = f"./prepare_dataset.sh {self.name} --data {shlex.quote(str(data))}"
            raise ValueError(f"{file}: there is no such file; make it with: {command}") from None
        except Exception as error:  # a damaged archive fails in many ways
            raise ValueError(f"{file}: expected a prepared npz file; it cannot be read: {error}") from None
        return _check_headers(file, headers)

    def read(self, data: Path) -> Interactions:
        """The whole data set; check() has passed."""
        with np.load(self.path(data), allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in ("users", "items", "test_items")}
            return Interactions(
                **found, num_users=int(arrays["num_users"]), num_items=int(arrays["num_items"])
            )

    def prepare(self, data: Path, given: Path | None) -> str:
        """Make the prepared file from the official archive, downloaded or given, or from what is in it: a
        folder or the file of ratings. Returns what was done, and how ranking by popularity scores, in words.

        An existing file stays as it is; an interrupted call leaves no file. Raises ValueError, in one line,
        where these ratings cannot be found or read.
        """
        file = self.path(data)
        if file.exists():
            self.check(data)
            return f"{file} is there already; {describe(self.read(data))}"
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
            ratings = self._parse(self._locate(given, Path(temporary)))
            sizes = (len(ratings.users), *(len(np.unique(ids)) for ids in (ratings.users, ratings.items)))
            try:
                found = split(ratings)
            except ValueError as error:
                raise ValueError(f"{given or self.name}: {error}") from None
            whole = Path(temporary) / file.name
            np.savez(whole, **vars(found))
            whole.replace(file)
        done = [f"{file}: {describe(found)}"]
        if dropped := sizes[1] - found.num_users:
            done.append(
                f"dropped: {dropped:,} of {sizes[1]:,} users, who rated fewer than {MIN_RATINGS} items"
            )
        if sizes != self.sizes:
            ours, published = (", ".join(f"{size:,}" for size in row) for row in (sizes, self.sizes))
            done.append(
                f"NOT the published {self.name}: ratings, users, items are {ours}, published {published}"
            )
        return "\n".join(done)

    def _locate(self, given: Path | None, temporary: Path) -> Path:
        """The file of ratings. One in an archive is unpacked into the temporary folder."""
        if given is None:
            places = ((f"{PLACE}/{self.name}.zip",),)
            [archive] = fetch_first(self.name, places, temporary, self._verify)
            return self._unpacked(archive, temporary)
        if given.is_file():
            return given if given.name == self.file else self._unpacked(given, temporary)
        for file in (given / self.file, given / self.name / self.file):
            if file.is_file():
                return file
        if (given / f"{self.name}.zip").is_file():
            return self._unpacked(given / f"{self.name}.zip", temporary)
        what = f"a folder with {self.file} or {self.name}.zip" if given.is_dir() else "an archive or a folder"
        raise ValueError(f"{given}: expected {self.name}, {what}; found none")

    def _verify(self, archive: Path) -> None:
        with archive.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
        if found != SHA256[self.name]:
            raise ValueError(
                f"expected SHA-256 {SHA256[self.name]}, got {found}; it is cut short, or another"
            )

    def _unpacked(self, archive: Path, folder: Path) -> Path:
        """The file of ratings out of an archive; reading it verifies its CRC-32."""
        member = f"{self.name}/{self.file}"
        try:
            with zipfile.ZipFile(archive) as opened:
                if member not in opened.namelist():
                    files = ", ".join(opened.namelist()[:3]) or "nothing"
                    raise ValueError(f"{archive}: expected {self.name} with {member} in it, got {files} ...")
                with opened.open(member) as content, (folder / self.file).open("wb") as target:
                    copy_limited(content, target, MAX_BYTES, f"{archive}: {member}")
        except (zipfile.BadZipFile, EOFError, zlib.error) as error:
            reason = f"expected the archive {self.name}.zip; it is something else, or cut short: {error}"
            raise ValueError(f"{archive}: {reason}") from None
        return folder / self.file

    def _parse(self, file: Path) -> Ratings:
        """The ratings in a file. Raises ValueError where a line is not a rating."""
        import pandas as pd  # here: it takes 0.7 s, and every run imports this module

        with file.open("rb") as content:
            first = content.readline(1000).decode("ascii", "replace").strip()
        fields = re.split(self.separator, first)
        if not first:
            raise ValueError(f"{file}: expected ratings, the file is empty")
        if self.has_header and (missing := [name for name in COLUMNS if name not in fields]):
            raise ValueError(
                f"{file}: expected the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing"
            )
        if not self.has_header and len(fields) != len(self.fields):
            compared = f"like {self.line!r}, got {first[:40]!r}"
            raise ValueError(f"{file}: expected lines of {self.name}, {compared}")
        try:
            frame = pd.read_csv(
                file,
                sep=self.separator,
                header=0 if self.has_header else None,
                names=fields if self.has_header else list(self.fields),
                usecols=list(COLUMNS),
                dtype={"userId": np.int32, "movieId": np.int32, "timestamp": np.int64},
            )
        except (ValueError, OverflowError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{file}: expected ratings of {self.name}; a line is cut short, or not a rating: {reason}"
            ) from None
        if not len(frame):
            raise ValueError(f"{file}: expected ratings, got none after the header")
        return Ratings(*(frame[name].to_numpy() for name in COLUMNS))


def _check_headers(file: Path, headers: Headers) -> int:
    """The number of training interactions; ValueError where shapes or types are not the prepared form's."""
    count, num_users = ((headers.get(key, ((), None))[0] or (0,))[0] for key in ("users", "test_items"))
    shapes = {"users": (count,), "items": (count,), "test_items": (num_users, 1 + NUM_NEGATIVES)}
    for key, shape in (shapes | {"num_users": (), "num_items": ()}).items():
        expected = (shape, np.dtype(np.int32 if shape else np.int64))
        if headers.get(key) != expected or 0 in shape:
            got = "{1} {0}".format(*headers[key]) if key in headers else "none"
            raise ValueError(f"{file}: expected the array {key} as {expected[1]} {shape}, got {got}")
    return count


_CSV = ("userId", "movieId", "rating", "timestamp")
_DOUBLE_COLONS = ("userId", "_1", "movieId", "_3", "rating", "_5", "timestamp")  # a::b, cut at each colon
# Of u.data the separator is a tab, as published; a space is taken too.
ML_100K = MovieLensSet(
    "ml-100k", "u.data", "196\t242\t3\t881250949", r"\s+", _CSV, False, (100_000, 943, 1_682)
)
ML_1M = MovieLensSet(
    "ml-1m", "ratings.dat", "1::1193::5::978300760", ":", _DOUBLE_COLONS, False, (1_000_209, 6_040, 3_706)
)
ML_20M = MovieLensSet(
    "ml-20m", "ratings.csv", "1,2,3.5,1112486027", ",", _CSV, True, (20_000_263, 138_493, 26_744)
)
SETS = {found.name: found for found in (ML_100K, ML_1M, ML_20M)}

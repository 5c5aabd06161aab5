"""Preparation of CIFAR-10 and CIFAR-100, from small archives made in the official format."""

import hashlib
import io
import pickle
import subprocess
import tarfile
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
from torchvision import datasets

from tasks.data import movielens, ptb, wikitext2
from tasks.data.cifar import CIFAR10, CIFAR100, CifarSet
from tasks.data.prepare import PREPARE

ROOT = Path(__file__).parent.parent
Entry = dict[str, Any]


@dataclass
class Made:
    """An archive like the official one, the data set that it is, and what its prepared form must hold."""

    archive: Path
    source: CifarSet
    expected: dict[str, np.ndarray]
    unpacked: Path


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def made_entries(source: CifarSet, rng: np.random.Generator) -> dict[str, Entry]:
    """3 images a file, channel by channel, as in the official files: CIFAR-100 has labels of two kinds."""
    official, entries = source.load_official(), {}
    for name, _ in (*official.train_list, *official.test_list):
        labels = rng.integers(source.num_classes, size=3).tolist()
        kinds = {"labels": labels} if source is CIFAR10 else {"coarse_labels": [0] * 3, "fine_labels": labels}
        entries[name] = {"data": rng.integers(256, size=(3, 3072), dtype=np.uint8), **kinds}
    return entries


def prepared_form(source: CifarSet, entries: dict[str, Entry]) -> dict[str, np.ndarray]:
    official, arrays = source.load_official(), {}
    for part, files in (("train", official.train_list), ("test", official.test_list)):
        chosen = [entries[name] for name, _ in files]
        pixels = np.concatenate([entry["data"] for entry in chosen]).reshape(-1, 3, 32, 32)
        arrays[f"{part}_x"] = pixels.transpose(0, 2, 3, 1)
        arrays[f"{part}_y"] = np.concatenate([list(entry.values())[-1] for entry in chosen])
    return arrays


def make(folder: Path, source: CifarSet) -> Made:
    """An archive with 3 images a file, and torchvision's reader for it, which has its checksums."""
    entries = made_entries(source, np.random.default_rng(0))
    official = source.load_official()
    meta = official.meta
    contents = {name: pickle.dumps(entry) for name, entry in entries.items()}
    contents[meta["filename"]] = pickle.dumps({meta["key"]: [str(n) for n in range(source.num_classes)]})
    unpacked = folder / official.base_folder
    unpacked.mkdir(parents=True)
    for name, content in contents.items():
        (unpacked / name).write_bytes(content)
    archive = folder / official.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(unpacked, arcname=unpacked.name)
    changes = {
        "tgz_md5": md5(archive.read_bytes()),
        "train_list": [[name, md5(contents[name])] for name, _ in official.train_list],
        "test_list": [[name, md5(contents[name])] for name, _ in official.test_list],
        "meta": {**meta, "md5": md5(contents[meta["filename"]])},
    }
    reader: type[datasets.CIFAR10] = type("Reader", (official,), changes)
    made = replace(source, load_official=lambda: reader)
    return Made(archive, made, prepared_form(source, entries), unpacked)


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    return make(tmp_path / "fetched", request.param)


def holds_what_is_expected(made: Made, data: Path) -> bool:
    """The prepared file, alone in its folder, with every image and label of the archive."""
    images, file = made.source.read(data), made.source.path(data)
    assert made.source.check(data) == len(made.expected["train_x"])
    assert list(file.parent.iterdir()) == [file]
    return all(
        np.array_equal(getattr(images, key), values) and getattr(images, key).dtype == np.uint8
        for key, values in made.expected.items()
    )


def files_in(data: Path) -> list[Path]:
    return [path for path in data.rglob("*") if not path.is_dir()]


# --- from what is there ---------------------------------------------------------------------------


def test_an_archive_becomes_the_prepared_form_once(made: Made, tmp_path: Path) -> None:
    num_train = {"cifar10": 15, "cifar100": 3}[made.source.name]
    data, file = tmp_path / "data", made.source.path(tmp_path / "data")
    said = made.source.prepare(data, made.archive)
    assert said == f"{file}: {num_train} images for training, 3 for testing"
    assert file == data / made.source.name / f"{made.source.name}.npz"
    assert holds_what_is_expected(made, data)
    before = file.stat().st_mtime_ns
    made.archive.unlink()
    assert made.source.prepare(data, made.archive) == f"{file} is there already"
    assert file.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "which", ["the archive's folder", "the unpacked folder's parent", "the unpacked folder"]
)
def test_a_folder_serves_as_well_as_an_archive_and_is_left_as_it_was(
    made: Made, tmp_path: Path, which: str
) -> None:
    given = made.unpacked if which == "the unpacked folder" else made.archive.parent
    if which == "the archive's folder":
        for path in made.unpacked.iterdir():
            path.unlink()
        made.unpacked.rmdir()
    else:
        made.archive.unlink()
    before = {path: path.read_bytes() for path in files_in(given)}
    made.source.prepare(tmp_path / "data", given)
    assert holds_what_is_expected(made, tmp_path / "data")
    assert {path: path.read_bytes() for path in files_in(given)} == before


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99, 1.01])
def test_a_torn_or_other_archive_is_refused_and_leaves_nothing(
    made: Made, tmp_path: Path, kept: float
) -> None:
    content = made.archive.read_bytes() + b"x" * 1000
    made.archive.write_bytes(content[: int(kept * (len(content) - 1000))])
    with pytest.raises(
        ValueError,
        match=r"^/.*: expected cifar-100?-python\.tar\.gz with MD5 \w+; it is cut short, or another$",
    ) as told:
        made.source.prepare(tmp_path / "data", made.archive)
    assert str(told.value).startswith(f"{made.archive}: ")
    assert not (tmp_path / "data").exists()


def test_the_other_cifars_archive_is_refused(tmp_path: Path) -> None:
    ten, hundred = make(tmp_path / "10", CIFAR10), make(tmp_path / "100", CIFAR100)
    for made, other in ((ten, hundred), (hundred, ten)):
        for given in (other.archive, other.unpacked):
            with pytest.raises(ValueError, match=f"expected {made.archive.name} with MD5"):
                made.source.prepare(tmp_path / "data", given)
    assert not (tmp_path / "data").exists()


def test_a_torn_file_in_an_unpacked_folder_is_named(made: Made, tmp_path: Path) -> None:
    for torn in made.unpacked.iterdir():
        whole = torn.read_bytes()
        torn.write_bytes(whole[:-1])
        with pytest.raises(
            ValueError, match=r"expected \S+ with MD5 \w+; it is cut short, or another$"
        ) as told:
            made.source.prepare(tmp_path / "data", made.unpacked)
        assert str(told.value).startswith(f"{torn}: ")
        torn.write_bytes(whole)
    assert not (tmp_path / "data").exists()


def test_a_path_where_nothing_is_is_refused(made: Made, tmp_path: Path) -> None:
    for given in (tmp_path / "missing.tar.gz", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=f"^{given}.*: expected .* with MD5 .*; there is no such file$"):
            made.source.prepare(tmp_path / "data", given)


def test_an_interrupted_conversion_leaves_no_half_made_result(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(file: Path, **arrays: np.ndarray) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", torn)
    with pytest.raises(KeyboardInterrupt):
        made.source.prepare(tmp_path / "data", made.archive)
    assert files_in(tmp_path / "data") == []


# --- by the net -----------------------------------------------------------------------------------


class Answer(io.BytesIO):
    """What a server sends: it announces a length, and may send less."""

    def __init__(self, url: str, content: bytes, length: int) -> None:
        super().__init__(content)
        self.url, self.length = url, length


@pytest.mark.parametrize("kept", [1.0, 0.5, None], ids=["whole", "cut short", "no network"])
def test_a_download_is_whole_or_refused(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: float | None
) -> None:
    content = made.archive.read_bytes()
    asked: list[str] = []

    def urlopen(request: urllib.request.Request) -> Answer:
        asked.append(request.full_url)
        if kept is None:
            raise urllib.error.URLError("Name or service not known")
        return Answer(request.full_url, content[: int(kept * len(content))], len(content))

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    data = tmp_path / "data"
    if kept == 1.0:
        made.source.prepare(data, None)
        assert holds_what_is_expected(made, data)
    else:
        with pytest.raises(
            ValueError, match=r": cannot be downloaded \(.+\); fetch it by hand .* --from$"
        ) as told:
            made.source.prepare(data, None)
        assert str(told.value).startswith(f"https://www.cs.toronto.edu/~kriz/{made.archive.name}: ")
        assert len(str(told.value).splitlines()) == 1
        assert files_in(data) == []
    assert set(asked) == {f"https://www.cs.toronto.edu/~kriz/{made.archive.name}"}


# --- what a prepared file may hold ----------------------------------------------------------------


def test_a_label_that_the_data_set_does_not_have_is_refused(made: Made, tmp_path: Path) -> None:
    made.source.prepare(tmp_path / "data", made.archive)
    with np.load(made.source.path(tmp_path / "data")) as arrays:
        contents = dict(arrays)
    for key in ("train_y", "test_y"):
        changed = contents | {key: np.array([0, made.source.num_classes, 1], np.uint8)}
        changed |= {"train_x": contents["train_x"][:3], "train_y": changed["train_y"][:3]}
        np.savez(made.source.path(tmp_path / "data"), **changed)
        limit = made.source.num_classes
        with pytest.raises(ValueError, match=f"expected labels below {limit} in {key}, got {limit}$"):
            made.source.check(tmp_path / "data")


# --- the script -----------------------------------------------------------------------------------


def test_the_script_knows_every_data_set() -> None:
    found = {name: resolve_name(place) for name, place in PREPARE.items()}
    sources = {"cifar10": CIFAR10, "cifar100": CIFAR100, **movielens.SETS, "ptb": ptb, "wikitext2": wikitext2}
    assert found == {name: source.prepare for name, source in sources.items()}


@pytest.mark.parametrize("source", [CIFAR10, CIFAR100], ids=["cifar10", "cifar100"])
def test_the_script_says_in_one_line_what_is_wrong(tmp_path: Path, source: CifarSet) -> None:
    archive = tmp_path / source.load_official().filename
    archive.write_bytes(b"no archive")
    words = ["./prepare_dataset.sh", source.name, "--from", str(archive), "--data", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"prepare_dataset.sh: {archive}: expected {archive.name} with MD5")
    assert len(done.stderr.splitlines()) == 1

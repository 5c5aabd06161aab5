"""MovieLens in its official formats: prepared once, and what is refused."""

import os
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.data import movielens
from tasks.data.leave_one_out import Ratings, split
from tasks.data.movielens import ML_1M, ML_20M, ML_100K, SETS, MovieLensSet
from tasks.movielens import MovieLens100K
from tests.ratings import ratings_of, together


def text_of(source: MovieLensSet, ratings: Ratings) -> str:
    """The ratings in the official format."""
    between = {"ml-100k": "\t", "ml-1m": "::", "ml-20m": ","}[source.name]
    stars = "3.5" if source is ML_20M else "4"
    lines = [
        between.join(map(str, (user + 1, item + 1, stars, time)))
        for user, item, time in zip(ratings.users, ratings.items, ratings.times, strict=True)
    ]
    return "\n".join([*(["userId,movieId,rating,timestamp"] if source is ML_20M else []), *lines, ""])


def archive_of(source: MovieLensSet, folder: Path, text: str) -> Path:
    archive = folder / f"{source.name}.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr(f"{source.name}/README", "about")
        opened.writestr(f"{source.name}/{source.file}", text)
    return archive


FORMATS = pytest.mark.parametrize("source", SETS.values(), ids=SETS)


def given_as(kind: str, source: MovieLensSet, folder: Path, text: str) -> Path:
    """The ratings as an archive, in a folder with it, unpacked in a folder or its parent, or as the file."""
    if kind in ("archive", "folder of the archive"):
        archive = archive_of(source, folder, text)
        return archive if kind == "archive" else folder
    inside = folder / source.name
    inside.mkdir()
    (inside / source.file).write_text(text)
    return {"parent": folder, "folder": inside, "file": inside / source.file}[kind]


@FORMATS
@pytest.mark.parametrize("kind", ["archive", "folder of the archive", "folder", "parent", "file"])
def test_each_official_format_becomes_the_prepared_form_once(
    tmp_path: Path, source: MovieLensSet, kind: str
) -> None:
    ratings = ratings_of(30, 25, 200)
    given = given_as(kind, source, tmp_path, text_of(source, ratings))
    data = tmp_path / "data"
    told = source.prepare(data, given)
    num_items = len(np.unique(ratings.items))
    assert f"30 users, {num_items} items, 720 training interactions; ranking by popularity: hr@10 0." in told
    assert f"NOT the published {source.name}: ratings, users, items are 750, 30, {num_items}" in told
    assert source.check(data) == 720
    found, expected = vars(source.read(data)), vars(split(ratings))
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert [entry.name for entry in (data / source.name).iterdir()] == [f"{source.name}.npz"]
    before = source.path(data).stat().st_mtime_ns
    assert "is there already; 30 users" in source.prepare(data, tmp_path / "gone")
    assert source.path(data).stat().st_mtime_ns == before


def test_data_of_the_published_sizes_is_not_remarked_upon_and_dropped_users_are(tmp_path: Path) -> None:
    ratings = ratings_of(30, 25, 200)
    single = Ratings(np.array([7]), np.array([7]), np.array([7]))
    one = together(ratings, single)
    source = replace(ML_100K, sizes=(751, 31, len(np.unique(one.items))))
    (tmp_path / "u.data").write_text(text_of(ML_100K, one))
    told = source.prepare(tmp_path, tmp_path)
    assert "NOT" not in told
    assert told.splitlines()[1:] == ["dropped: 1 of 31 users, who rated fewer than 20 items"]


def no_line_break(text: str) -> str:
    return text.rsplit("\n", 2)[0] + "\n77"


BAD: dict[str, tuple[MovieLensSet, Callable[[str], str], str]] = {
    "empty": (ML_100K, lambda _: "", "expected ratings, the file is empty"),
    "header only": (
        ML_20M,
        lambda text: text.splitlines()[0] + "\n",
        "expected ratings, got none after the header",
    ),
    "a column is missing": (
        ML_20M,
        lambda text: text.replace("timestamp", "when"),
        "expected the columns userId, movieId, timestamp; timestamp is missing",
    ),
    "no header": (ML_20M, lambda text: text.split("\n", 1)[1], "userId, movieId, timestamp is missing"),
    "three fields": (
        ML_100K,
        lambda _: "1\t2\t3\n",
        r"expected lines of ml-100k, like '196.*', got '1.t2.t3'",
    ),
    "another format": (
        ML_1M,
        lambda text: text.replace("::", "\t"),
        r"lines of ml-1m, like '1::1193::5::978300760', got '31",
    ),
    "torn in a line": (ML_100K, no_line_break, "a line is cut short, or not a rating: .*NA"),
    "words": (ML_1M, lambda text: text + "a::b::c::d\n", "a line is cut short, or not a rating: .*'a'"),
    "few ratings": (
        ML_100K,
        lambda text: "".join(text.splitlines(True)[:19]),
        "expected a user with 20 ratings",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_ratings_file_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    source, spoil, told = BAD[name]
    given = tmp_path / source.file
    given.write_text(spoil(text_of(source, ratings_of(30, 25, 200))))
    with pytest.raises(ValueError, match=told) as error:
        source.prepare(tmp_path / "data", given)
    assert str(error.value).startswith(f"{given}: ")
    assert len(str(error.value).splitlines()) == 1
    assert not source.path(tmp_path / "data").exists()
    assert list((tmp_path / "data" / source.name).iterdir()) == []


@FORMATS
def test_a_torn_or_other_archive_is_one_line_and_leaves_nothing(tmp_path: Path, source: MovieLensSet) -> None:
    archive = archive_of(source, tmp_path, text_of(source, ratings_of(30, 25, 200)))
    whole = archive.read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    other = ML_1M if source is not ML_1M else ML_20M
    contents = {"cut short": whole[: len(whole) // 2], "cut short: .*": bytes(damaged)}
    contents[f"expected {source.name} with {source.name}/{source.file} in it"] = archive_of(
        other, tmp_path, text_of(other, ratings_of(30, 25, 200))
    ).read_bytes()
    for told, content in contents.items():
        archive.write_bytes(content)
        with pytest.raises(ValueError, match=told) as error:
            source.prepare(tmp_path / "data", archive)
        assert len(str(error.value).splitlines()) == 1
        assert list((tmp_path / "data" / source.name).iterdir()) == []


def test_nothing_given_where_it_is_said_to_be_is_an_error(tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"^{given}: expected ml-1m, .* found none$"):
            ML_1M.prepare(tmp_path / "data", given)


def test_no_network_is_one_line_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    told = (
        r"^ml-1m cannot be downloaded; .* --from \(https://files.grouplens.*/ml-1m.zip: no route to host\)$"
    )
    with pytest.raises(ValueError, match=told):
        ML_1M.prepare(tmp_path, None)


def test_a_download_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive_of(ML_1M, tmp_path, text_of(ML_1M, ratings_of(30, 25, 200)))
    monkeypatch.setattr(movielens, "PLACE", tmp_path.as_uri())
    with pytest.raises(ValueError, match="expected SHA-256 a6898adb"):
        ML_1M.prepare(tmp_path / "data", None)
    assert not ML_1M.path(tmp_path / "data").exists()


def test_an_interrupted_conversion_leaves_no_half_made_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "u.data").write_text(text_of(ML_100K, ratings_of(30, 25, 200)))

    def torn(file: Path, **arrays: np.ndarray) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(KeyboardInterrupt):
        ML_100K.prepare(tmp_path / "data", tmp_path)
    assert list((tmp_path / "data" / "ml-100k").iterdir()) == []


def test_a_missing_or_damaged_prepared_file_is_one_line(tmp_path: Path) -> None:
    config = MovieLens100K.Settings()
    command = rf"make it with: \./prepare_dataset\.sh ml-100k --data {tmp_path}$"
    with pytest.raises(ValueError, match=command):
        MovieLens100K.check(config, tmp_path, 2)
    (tmp_path / "u.data").write_text(text_of(ML_100K, ratings_of(30, 25, 200)))
    ML_100K.prepare(tmp_path, tmp_path)
    file = ML_100K.path(tmp_path)
    whole = file.read_bytes()
    with pytest.raises(ValueError, match=r"task\.global_batch: expected at most 3600"):
        MovieLens100K.check(config, tmp_path, 2)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected a prepared npz file"):
        ML_100K.check(tmp_path)
    good = vars(split(ratings_of(30, 25, 200)))
    for key, bad in {
        "users": np.int64(3),
        "items": good["items"][1:],
        "test_items": good["test_items"][:, 1:],
    }.items():
        np.savez(file, **(good | {key: bad}))
        with pytest.raises(ValueError, match="expected the array"):
            ML_100K.check(tmp_path)


@pytest.mark.realdata
def test_movielens_100k_has_943_users_and_1682_items(tmp_path: Path) -> None:
    data = Path(os.environ.get("SAGE_DATA", ""))
    if not os.environ.get("SAGE_DATA") or not (data / "ml-100k" / "u.data").is_file():
        pytest.skip("needs SAGE_DATA, a folder with ml-100k/u.data")
    told = ML_100K.prepare(tmp_path, data / "ml-100k")
    assert "943 users, 1,682 items, 99,057 training interactions" in told
    assert "dropped" not in told
    assert "NOT" not in told
    assert ML_100K.check(tmp_path) == 100_000 - 943

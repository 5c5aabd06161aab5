"""Archives that may come from anywhere: links are refused, and no small archive becomes a large one."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from tasks.data.archive import copy_limited, from_tar, from_zip
from tasks.data.movielens import MAX_BYTES, ML_100K
from tasks.data.wikitext2 import WIKITEXT2, prepare

WANTED = ["train.txt"]


def tar_of(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    path = folder / "made.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in members:
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def linked(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("a/train.txt")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize("target", ["/etc/passwd", "../../secret", "missing", "a/train.txt"])
@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_a_member_that_is_no_file_is_refused_in_one_line(kind: bytes, target: str, tmp_path: Path) -> None:
    archive = tar_of(tmp_path, (linked(kind, target), b""))
    with pytest.raises(
        ValueError, match=r"made\.tar\.gz: a/train\.txt: expected a file, got a link"
    ) as error:
        prepare(tmp_path / "data", archive)
    assert "\n" not in str(error.value)


def test_a_file_is_found_in_any_folder_and_its_path_is_not_used(tmp_path: Path) -> None:
    archive = tar_of(
        tmp_path, (tarfile.TarInfo("../../x/train.txt"), b"abc"), (tarfile.TarInfo("other"), b"d")
    )
    assert list(from_tar(archive, WANTED, 3)) == [("train.txt", b"abc")]
    with zipfile.ZipFile(tmp_path / "made.zip", "w") as opened:
        opened.writestr("/abs/../train.txt", "abc")
        opened.writestr("train.txt/", "")
    assert list(from_zip(tmp_path / "made.zip", WANTED, 3)) == [("train.txt", b"abc")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made.tar.gz", "made.zip"]


def zip_of_zeros(path: Path, member: str, num_bytes: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as opened, opened.open(member, "w") as target:
        for _ in range(num_bytes // 2**20):
            target.write(bytes(2**20))
    return path


def test_a_small_zip_that_holds_much_is_refused_before_it_is_in_memory(tmp_path: Path) -> None:
    archive = zip_of_zeros(tmp_path / "made.zip", "wiki.train.tokens", 2**30)
    assert archive.stat().st_size < 1_100_000
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"wiki\.train\.tokens: expected at most 100,000,000 bytes, got more"
    ):
        prepare(tmp_path / "data", archive)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * 100_000_000  # the limit, and what the reader's buffers grow by
    assert not list((tmp_path / "data").rglob("*.npz"))
    assert WIKITEXT2.name == "wikitext2"


def test_ratings_are_unpacked_up_to_a_limit_and_leave_nothing(tmp_path: Path) -> None:
    archive = zip_of_zeros(tmp_path / "ml-100k.zip", "ml-100k/u.data", MAX_BYTES + 2**21)
    with pytest.raises(ValueError, match=r"ml-100k/u\.data: expected at most 1,000,000,000 bytes, got more"):
        ML_100K.prepare(tmp_path / "data", archive)
    left = [path for path in (tmp_path / "data").rglob("*") if path.is_file()]
    assert left == []


def test_a_copy_stops_at_the_limit() -> None:
    target = io.BytesIO()
    copy_limited(io.BytesIO(b"abc"), target, 3, "x")
    assert target.getvalue() == b"abc"
    with pytest.raises(ValueError, match="x: expected at most 2 bytes"):
        copy_limited(io.BytesIO(b"abc"), io.BytesIO(), 2, "x")

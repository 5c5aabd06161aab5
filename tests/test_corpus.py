"""Preparation of text corpora, from small archives made in the official forms, and from places on disk."""

import hashlib
import io
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.data.corpus import Corpus, prepare
from tasks.data.ptb import PTB
from tasks.data.wikitext2 import WIKITEXT2

TEXTS = {
    "train": " \n = The <unk> Title = \n \n Don 't stop the <unk> . \n",
    "valid": " The end . \n",
    "test": " A start \n the end \n",
}
WIKITEXT, TREEBANK = (
    replace(corpus, num_lines={part: text.count("\n") for part, text in TEXTS.items()}, md5={})
    for corpus in (WIKITEXT2, PTB)
)


def made_folder(folder: Path, names: str) -> Path:
    """The three texts, named as a pattern with {} for the part says."""
    for part, text in TEXTS.items():
        file = folder / names.format(part)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
    return folder


def made_zip(folder: Path) -> Path:
    """As wikitext-2-v1.zip."""
    archive = folder / "wikitext-2-v1.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("wikitext-2/", "")
        for part in ("test", "train", "valid"):
            target.writestr(f"wikitext-2/wiki.{part}.tokens", TEXTS[part])
    return archive


def made_tgz(folder: Path) -> Path:
    """As simple-examples.tgz, with a text by characters beside the one by words."""
    archive = folder / "simple-examples.tgz"
    with tarfile.open(archive, "w:gz") as target:
        for name, text in [("char.train", "T h e"), *TEXTS.items()]:
            member = tarfile.TarInfo(f"./simple-examples/data/ptb.{name}.txt")
            member.size = len(text)
            target.addfile(member, io.BytesIO(text.encode()))
    return archive


SOURCES: dict[str, tuple[Corpus, Callable[[Path], Path]]] = {
    "zip": (WIKITEXT, made_zip),
    "tgz": (TREEBANK, made_tgz),
    "folder": (WIKITEXT, lambda folder: made_folder(folder / "raw", "{}.txt")),
    "folder in a folder": (WIKITEXT, lambda folder: made_folder(folder / "raw", "wikitext-2/wiki.{}.tokens")),
    "folder of the treebank": (TREEBANK, lambda folder: made_folder(folder / "raw", "ptb.{}.txt")),
}


def words_of(corpus: Corpus, data: Path, part: str, name: str = "whitespace") -> str:
    text = corpus.read(data, "whitespace" if name == "whitespace" else "spacy")
    return " ".join(text.vocabulary[getattr(text, part)])


@pytest.mark.parametrize("source", SOURCES)
def test_each_official_form_becomes_the_prepared_form_once(tmp_path: Path, source: str) -> None:
    corpus, make = SOURCES[source]
    data, archive = tmp_path / "data", make(tmp_path)
    assert "tokens 15 train, 4 valid, 6 test" in prepare(data, archive, corpus)
    folder = data / corpus.name
    assert sorted(file.name for file in folder.iterdir()) == ["spacy.npz", "whitespace.npz"]
    end = "<eos>"
    train = f"{end} = The <unk> Title = {end} {end} Don 't stop the <unk> . {end}"
    assert words_of(corpus, data, "train") == train
    assert words_of(corpus, data, "valid") == f"The <unk> . {end}"
    assert words_of(corpus, data, "test") == f"<unk> <unk> {end} the <unk> {end}"
    before = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    shutil.rmtree(archive) if archive.is_dir() else archive.unlink()
    assert "tokens 15 train" in prepare(data, archive, corpus)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_the_spacy_form_is_lower_case_with_whole_specials(tmp_path: Path) -> None:
    prepare(tmp_path, made_zip(tmp_path), WIKITEXT)
    words = words_of(WIKITEXT, tmp_path, "train", "spacy").split()  # spaCy's own token of a space falls away
    assert " ".join(words) == "<eos> = the <unk> title = <eos> <eos> don ' t stop the <unk> . <eos>"


def test_one_tokenizers_form_that_is_missing_is_made_and_the_other_left_alone(tmp_path: Path) -> None:
    archive = made_zip(tmp_path)
    prepare(tmp_path, archive, WIKITEXT)
    kept, made = WIKITEXT.path(tmp_path, "whitespace"), WIKITEXT.path(tmp_path, "spacy")
    before, content = kept.stat().st_mtime_ns, made.read_bytes()
    made.unlink()
    prepare(tmp_path, archive, WIKITEXT)
    assert kept.stat().st_mtime_ns == before
    assert np.array_equal(np.load(io.BytesIO(content))["train"], np.load(made)["train"])


def broken(folder: Path, how: str) -> Path:
    source = made_folder(folder / "raw", "{}.txt")
    if how.startswith("torn"):
        archive = made_zip(folder) if how == "torn zip" else made_tgz(folder)
        archive.write_bytes(archive.read_bytes()[: -len(archive.read_bytes()) // 3])
        return archive
    if how == "damaged zip":
        archive = made_zip(folder)
        content = bytearray(archive.read_bytes())
        place = content.find(b"wiki.train.tokens") + 25
        content[place : place + 4] = b"\xff\xff\xff\xff"
        archive.write_bytes(content)
        return archive
    if how == "no archive":
        (folder / "text.zip").write_bytes(b"words")
        return folder / "text.zip"
    if how == "nothing":
        return folder / "elsewhere"
    contents = {
        "empty": b"",
        "blank": b" \n",
        "other": b" words \n" * 9,
        "cut": b" \n words \n \n cut",
        "latin": b"\xe4\n",
    }
    if how == "missing":
        (source / "train.txt").unlink()
    else:
        (source / "train.txt").write_bytes(contents[how])
    return source


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("torn zip", r"expected a folder, a zip or a tar archive; it is something else, or cut short"),
        ("torn tgz", r"it cannot be read, and may be cut short"),
        ("damaged zip", r"it cannot be read, and may be cut short"),
        ("no archive", r"expected a folder, a zip or a tar archive; it is something else, or cut short"),
        ("nothing", r"expected a folder, a zip or a tar archive; it is missing"),
        ("empty", r"train\.txt: expected text, the file is empty"),
        ("blank", r"train\.txt: expected text, the file is empty"),
        ("other", r"train\.txt: expected the 4 lines of \w+, got 9; it is cut short, or another corpus"),
        ("cut", r"train\.txt: expected the 4 lines of \w+, got 3; it is cut short, or another corpus"),
        ("latin", r"train\.txt: expected text in UTF-8: .* at byte 0"),
        ("missing", r"expected \w+, with a file .* or train\.txt; found none"),
    ],
)
def test_what_is_torn_empty_or_another_corpus_is_refused_in_one_line(
    tmp_path: Path, how: str, told: str
) -> None:
    source = broken(tmp_path, how)
    with pytest.raises(ValueError, match=told) as refused:
        prepare(tmp_path / "data", source, TREEBANK if how == "torn tgz" else WIKITEXT)
    assert str(refused.value).startswith(str(source))
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_an_archive_of_the_published_name_must_have_the_published_checksum(tmp_path: Path) -> None:
    archive = made_zip(tmp_path)
    with pytest.raises(
        ValueError, match=r"wikitext-2-v1\.zip: expected the published file, with MD5 542ccef"
    ):
        prepare(tmp_path / "data", archive, replace(WIKITEXT, md5=WIKITEXT2.md5))
    prepare(tmp_path / "data", archive.rename(tmp_path / "mine.zip"), replace(WIKITEXT, md5=WIKITEXT2.md5))


def torn_npz(file: Path, **arrays: np.ndarray) -> None:
    file.write_bytes(b"half")
    raise KeyboardInterrupt


def test_an_interrupted_conversion_leaves_no_half_made_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = made_zip(tmp_path)
    monkeypatch.setattr(np, "savez_compressed", torn_npz)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", archive, WIKITEXT)
    assert list((tmp_path / "data" / "wikitext2").iterdir()) == []


# --- from the net ---------------------------------------------------------------------------------


def offered(corpus: Corpus, *places: tuple[Path, ...]) -> Corpus:
    """The corpus at these places, with the checksums of what lies at the last of them."""
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in places[-1] if file.exists()}
    urls = tuple(tuple(file.as_uri() for file in place) for place in places)
    return replace(corpus, places=urls, md5=sums)


def test_a_mirror_serves_where_the_official_place_does_not_or_has_another_file(tmp_path: Path) -> None:
    torn = made_zip(tmp_path)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    whole = Path(shutil.copy(torn, mirror))
    torn.write_bytes(torn.read_bytes()[:-50])
    corpus = offered(WIKITEXT, (tmp_path / "nowhere.zip",), (torn,), (whole,))
    assert "tokens 15 train" in prepare(tmp_path / "data", None, corpus)
    assert words_of(corpus, tmp_path / "data", "test") == "<unk> <unk> <eos> the <unk> <eos>"
    names = sorted(file.name for file in (tmp_path / "data" / "wikitext2").iterdir())
    assert names == ["spacy.npz", "whitespace.npz"]


def test_a_place_may_offer_the_three_files(tmp_path: Path) -> None:
    folder = made_folder(tmp_path / "mirror", "ptb.{}.txt")
    files = tuple(folder / f"ptb.{part}.txt" for part in TEXTS)
    corpus = offered(TREEBANK, (tmp_path / "nowhere.tgz",), files)
    assert "tokens 15 train, 4 valid, 6 test" in prepare(tmp_path / "data", None, corpus)


def test_without_network_one_line_names_the_places_and_the_way_out(tmp_path: Path) -> None:
    gone = [tmp_path / name for name in ("official.zip", "mirror.zip")]
    with pytest.raises(ValueError, match=r"^wikitext2 cannot be downloaded; .* use --from") as refused:
        prepare(tmp_path / "data", None, offered(WIKITEXT, *((file,) for file in gone)))
    assert len(str(refused.value).splitlines()) == 1
    assert all(file.as_uri() in str(refused.value) for file in gone)
    assert list((tmp_path / "data" / "wikitext2").iterdir()) == []


class Answer(io.BytesIO):
    """A response that promised more than came."""

    headers = {"Content-Length": "1000"}


def test_a_download_that_ends_early_is_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer(b"half"))
    with pytest.raises(ValueError, match=r"the download ended after 4 of 1000 bytes"):
        prepare(tmp_path / "data", None, replace(WIKITEXT, places=(("http://somewhere/a.zip",),)))


def test_an_interrupted_download_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: object, target: io.BufferedWriter) -> None:
        target.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "copyfileobj", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "data", None, offered(WIKITEXT, (made_zip(tmp_path),)))
    assert list((tmp_path / "data" / "wikitext2").iterdir()) == []


def test_both_corpora_have_an_official_place_a_mirror_and_the_published_sizes() -> None:
    for corpus in (WIKITEXT2, PTB):
        assert len(corpus.places) >= 2
        assert set(corpus.files) == set(corpus.num_lines) == {"train", "valid", "test"}

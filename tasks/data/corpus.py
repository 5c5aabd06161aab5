"""A text corpus in three files, as it is published: fetched, verified, and converted once to the prepared
form, DATA/<name>/<tokenizer>.npz."""

import hashlib
import io
import shlex
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

from tasks.data.archive import from_tar, from_zip, read_limited
from tasks.data.fetch import Places, fetch_first
from tasks.data.text import PARTS, SPECIALS, Text, TokenizerName, build, read, save, tokenizer

MAX_BYTES = 100_000_000
"""Of one text; the largest here has 11 million."""
TOKENIZERS: tuple[TokenizerName, ...] = get_args(TokenizerName)


@dataclass(frozen=True)
class Corpus:
    """Where a corpus is found, and by what it is recognised."""

    name: str
    places: Places
    """A place is one archive, or the three files."""
    files: dict[str, tuple[str, ...]]
    """Of each part: the names that its file may have."""
    num_lines: dict[str, int]
    """Of each part: how many line ends its file has. Another number: another corpus, or cut short."""
    md5: dict[str, str]
    """Of what a place offers, by file name: the published checksum, where there is one."""

    def path(self, data: Path, name: TokenizerName) -> Path:
        return data / self.name / f"{name}.npz"

    def read(self, data: Path, name: TokenizerName) -> Text:
        """A tokenizer's prepared form. Raises ValueError, in one line, where it is missing or damaged."""
        command = f"./prepare_dataset.sh {self.name} --data {shlex.quote(str(data))}"
        return read(self.path(data, name), command)


def prepare(data: Path, source: Path | None, corpus: Corpus) -> str:
    """Make the prepared forms, one for each tokenizer, from a folder or an archive, or from the internet, and
    return what was done, in words.

    Existing files stay as they are; an interrupted call leaves no incomplete file. Raises ValueError, in one
    line, where the source is not the corpus, or nothing can be downloaded.
    """
    missing = [name for name in TOKENIZERS if not corpus.path(data, name).exists()]
    lines_done = [_describe(corpus, data, name) for name in TOKENIZERS if name not in missing]
    if not missing:
        return "\n".join(lines_done)
    folder = data / corpus.name
    texts = _texts(source, corpus) if source is not None else {}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        if source is None:
            files = fetch_first(corpus.name, corpus.places, Path(scratch), partial(_verify, corpus))
            texts = _texts(files[0] if len(files) == 1 else Path(scratch), corpus)
        for name in missing:
            lines = {part: _lines(text) for part, text in texts.items()}
            whole = Path(scratch) / f"{name}.npz"
            save(whole, build(lines, tokenizer(name), SPECIALS[name]))
            whole.replace(corpus.path(data, name))
            lines_done.append(_describe(corpus, data, name))
    return "\n".join(lines_done)


def _describe(corpus: Corpus, data: Path, name: TokenizerName) -> str:
    text = corpus.read(data, name)
    sizes = ", ".join(f"{getattr(text, part).size:,} {part}" for part in PARTS)
    return f"{corpus.path(data, name)}: tokens {sizes}; {len(text.vocabulary):,} types"


def _lines(text: str) -> Iterator[str]:
    """Lines as a text file's are: \\n, \\r\\n or \\r end one, and no other character does."""
    return (line.rstrip("\n") for line in io.StringIO(text, newline=None))


# --- reading what was published -------------------------------------------------------------------


def _texts(source: Path, corpus: Corpus) -> dict[str, str]:
    """part -> text, from a folder or an archive, verified."""
    if source.is_file():
        _verify(corpus, source)
    wanted = [name for names in corpus.files.values() for name in names]
    files = _contents(source, wanted)
    texts = {}
    for part, names in corpus.files.items():
        name = next((name for name in names if name in files), None)
        if name is None:
            raise ValueError(
                f"{source}: expected {corpus.name}, with a file {' or '.join(names)}; found none"
            )
        texts[part] = _decoded(files[name], source / name)
        found, expected = texts[part].count("\n"), corpus.num_lines[part]
        if found != expected:
            raise ValueError(
                f"{source / name}: expected the {expected:,} lines of {corpus.name}, got {found:,}; it is "
                "cut short, or another corpus"
            )
    return texts


def _contents(source: Path, wanted: list[str]) -> dict[str, bytes]:
    """File name -> content of the wanted files, from a folder (or a folder in it), a zip or a tar archive."""
    reader = next((read for suits, read in _READERS if suits(source)), None)
    if reader is None:
        what = "it is something else, or cut short" if source.exists() else "it is missing"
        raise ValueError(f"{source}: expected a folder, a zip or a tar archive; {what}")
    try:
        return dict(reader(source, wanted))
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{source}: it cannot be read, and may be cut short: {error}") from None


def _from_folder(source: Path, wanted: list[str]) -> Iterator[tuple[str, bytes]]:
    for name in wanted:
        for file in sorted([*source.glob(f"*/{name}"), *source.glob(name)]):  # the last one counts
            with file.open("rb") as content:
                yield name, read_limited(content, MAX_BYTES, str(file))


_READERS: tuple[tuple[Callable[[Path], bool], Callable[..., Iterator[tuple[str, bytes]]]], ...] = (
    (Path.is_dir, _from_folder),
    (lambda source: source.is_file() and zipfile.is_zipfile(source), partial(from_zip, max_bytes=MAX_BYTES)),
    (lambda source: source.is_file() and tarfile.is_tarfile(source), partial(from_tar, max_bytes=MAX_BYTES)),
)


def _decoded(content: bytes, file: Path) -> str:
    if not content.strip():
        raise ValueError(f"{file}: expected text, the file is empty")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected text in UTF-8: {error.reason} at byte {error.start}") from None


def _verify(corpus: Corpus, file: Path) -> None:
    """Raise ValueError where a file has the name of a published one, and another checksum."""
    expected, found = corpus.md5.get(file.name), hashlib.md5(file.read_bytes()).hexdigest()
    if expected is not None and found != expected:
        raise ValueError(f"{file}: expected the published file, with MD5 {expected}, got {found}")

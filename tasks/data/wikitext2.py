"""WikiText-2 (Merity et al. 2016, arXiv 1609.07843): articles of Wikipedia, 2 million tokens."""

from pathlib import Path

from tasks.data import corpus

WIKITEXT2 = corpus.Corpus(
    name="wikitext2",
    places=(
        ("https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-2-v1.zip",),
        ("https://wikitext.smerity.com/wikitext-2-v1.zip",),
    ),
    files={part: (f"wiki.{part}.tokens", f"{part}.txt") for part in ("train", "valid", "test")},
    # Both as torchtext 0.18 states them.
    num_lines={"train": 36718, "valid": 3760, "test": 4358},
    md5={"wikitext-2-v1.zip": "542ccefacc6c27f945fb54453812b3cd"},
)


def prepare(data: Path, source: Path | None) -> str:
    """As corpus.prepare, from the official zip or a folder with its files (or train.txt, valid.txt,
    test.txt)."""
    return corpus.prepare(data, source, WIKITEXT2)

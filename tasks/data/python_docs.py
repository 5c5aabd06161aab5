"""The text of Python's own language reference (pydoc_data.topics), inside Python; no download.

About 93,000 tokens and 1,800 types; both differ a little from one version of Python to the next.
"""

import re
from pydoc_data.topics import topics

from tasks.data.text import UNK, Text, build

MIN_FREQUENCY = 3
"""A type that the training text has more rarely is <unk>."""
ROUND, NUM_TRAIN, NUM_VALID = 100, 80, 10
"""Of every 100 paragraphs in a row: the first to train on, the next to validate, the last 10 to test."""


def read() -> Text:
    """A token is a word or a sign."""
    return build(paragraphs(), re.compile(r"\w+|[^\w\s]").findall, (UNK,), MIN_FREQUENCY)


def paragraphs() -> dict[str, list[str]]:
    """part -> its paragraphs, the lines of this text, in lower case. One that several topics share counts
    once: none is in two parts."""
    texts = (re.split(r"\n\s*\n", topics[topic].lower()) for topic in sorted(topics))
    every = (" ".join(paragraph.split()) for found in texts for paragraph in found)
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for index, paragraph in enumerate(dict.fromkeys(filter(None, every))):
        place = index % ROUND
        part = "train" if place < NUM_TRAIN else "valid" if place < NUM_TRAIN + NUM_VALID else "test"
        parts[part].append(paragraph)
    return parts

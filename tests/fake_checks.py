"""Checks that fail in every way, for the tests of what runs them."""

import os
import time
from collections.abc import Iterator

from benchmarks.gpu.checks import Check, Row, Section, Setup


def works() -> Iterator[Row]:
    yield {"figure": 1.5, "process": os.getpid()}


def raises() -> Iterator[Row]:
    yield {"figure": 1.5}
    raise ValueError("a bad\nfigure")


def crashes() -> Iterator[Row]:
    os._exit(3)
    yield {}


def hangs() -> Iterator[Row]:
    time.sleep(1000)
    yield {}


def checks(setup: Setup) -> list[Check]:
    given = [works, raises, crashes, works, hangs, works]
    return [Check(f"{index} {call.__name__}", call, seconds=5) for index, call in enumerate(given)]


def few_checks(setup: Setup) -> list[Check]:
    return [Check("works", works)]


def no_checks(setup: Setup) -> list[Check]:
    return []


EVERY_WAY = Section("every way", "Fails in every way.", 30, checks)
FRESH = Section("fresh", "In a process of its own.", 10, few_checks, fresh=True)
RESERVED = Section("reserved", "Keeps its time.", 1000, no_checks)

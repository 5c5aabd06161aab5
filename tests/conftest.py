"""The tests run torch as the program does: threads that wait for one another sleep."""

import pytest

from sage.workers import environment

environment.set_defaults()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="try the tests marked gpu on the CPU")

"""The tests run torch as the program does: threads that wait for one another sleep. Where there is no GPU,
Triton's interpreter runs its kernels, which triton must know when it is imported first, by whomever."""

import os

import pytest
import torch

from sage.workers import environment

environment.set_defaults()
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rehearse", action="store_true", help="try the tests marked gpu on the CPU")

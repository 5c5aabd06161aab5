"""Digits are learned through DistributedDataParallel as by a flat loop."""

import pytest
import torch

from tests.ddp_worker import LEARNED
from tests.test_ddp_hook import Seen, run_selected


@pytest.fixture(scope="module")
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    return run_selected(request, "learns", tmp_path_factory.mktemp("learned"), parameter="name")


@pytest.mark.parametrize("name", LEARNED)
def test_the_score_is_the_flat_loops_within_its_spread(name: str, learned: dict[str, Seen]) -> None:
    found, _ = learned[name]
    flat, hook = torch.tensor(found["flat"]), torch.tensor(found["hook"])  # (5 seeds,)
    assert flat.min() > 0.5  # guessing gives 0.1
    assert hook.mean() >= flat.mean() - (flat.max() - flat.min())

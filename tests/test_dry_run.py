"""What --dry-run predicts of a network: the kinds of collectives and their bytes, for every reducer."""

import pytest
import torch

from reducers import REDUCERS
from sage.interfaces import Progress
from sage.network import Call
from sage.training.dry_run import expected_calls
from tests.cases import CASES, Case, N


@pytest.mark.parametrize("world_size", [2, 8])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_dry_run_predicts_the_bytes_that_a_reducer_expects(case: Case, world_size: int) -> None:
    config = REDUCERS[case.reducer].Settings.model_validate(case.settings)
    reducer = case.build()
    reducer.begin_step(Progress(epoch=0.0, step=0, lr=0.1, steps_per_epoch=2))
    calls = expected_calls(reducer, torch.zeros(N), config, world_size)

    expected = reducer.expected_payload_bytes(world_size)
    assert sum(call.payload_bytes for call in calls) == pytest.approx(expected, rel=1e-9)
    kinds = {call.kind for call in calls} - {"broadcast"}
    if case.sends_union and case.collectives is None:
        assert kinds == {"all_gather", "all_reduce"}
    elif case.reducer == "block_int":
        assert calls == [Call("all_to_all", pytest.approx(world_size * calls[1].payload_bytes)), calls[1]]
        assert calls[1].kind == "all_gather"
    else:
        assert kinds == {"all_gather" if case.gathers_only else "all_reduce"}

"""A checkpoint resumed by another number of workers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sage.exchange.comm import LocalComm
from sage.runfolder import manifest
from sage.runfolder.checkpoint import read_state
from sage.runfolder.manifest import SHARED, worker_file
from sage.training.train import Trainer
from tests.test_resume import RUNS, TURNING, quick, settings_in, weights_in
from tests.toy import bits_of, state_of, train_until, trainer_of

__all__ = ["quick"]  # a fixture that every test here gets

RESHARDED = {
    "sage": settings_in("sage", reducer={"density": 0.1}),
    "sage, fading residual": settings_in(
        "sage", feedback={"name": "residual", "lr_correction": True}, schedule=TURNING
    ),
    "topk, momentum": RUNS["topk, momentum"],
    "atomo": settings_in("atomo", reducer={"rank": 2}),
    "powersgd": settings_in("powersgd", reducer={"rank": 2}),
    "random_k": settings_in("random_k", reducer={"density": 0.3}),
    "accordion": settings_in("accordion", reducer={"inner": "topk", "interval_epochs": 1}),
    "signum": settings_in("signum"),
}
OWN, COMMON = ("sage", "atomo"), ("powersgd", "random_k")
"""Reducers whose generators are a worker's own, and those whose generators are alike on all workers."""


def generators_in(state: dict[str, Any]) -> list[str]:
    """The states of the generators in a reducer's state."""
    found = []
    for name, value in state.items():
        if name == "generator":
            found.append(str(value) if isinstance(value, dict) else str(value.tolist()))
        elif isinstance(value, dict):
            found += generators_in(value)
    return found


def assert_is_the_mean(new: Any, old: list[Any]) -> int:
    """Assert that a state is the mean of the old states, in float64 and rounded once; returns how many of its
    numbers are not zero. What is not a floating point number must be the first's."""
    if isinstance(new, dict):
        parts = ((new[name], [state[name] for state in old]) for name in new if name != "generator")
        return sum(assert_is_the_mean(*part) for part in parts)
    if isinstance(new, float) or (isinstance(new, Tensor) and new.is_floating_point()):
        values = torch.stack([torch.as_tensor(value, dtype=torch.float64) for value in old])
        mean, new = values.mean(0), torch.as_tensor(new)
        # The rounding to new's type, and of the float64 sum, product and mean in either order.
        bound = torch.finfo(new.dtype).eps / 2 * mean.abs() + 2.0**-50 * values.abs().amax(0)
        assert ((new.double() - mean).abs() <= bound).all()
        return int(mean.count_nonzero())
    assert bits_of(new) == bits_of(old[0])
    return 0


def parts_of(exchange: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the feedback and the reducer hold, of an exchange of one bucket."""
    (bucket,) = exchange["buckets"]
    feedback, reducer = dict(bucket["feedback"]), dict(bucket["reducer"])
    for parameter, values in exchange["parameters"].items():
        for name, value in values.items():
            owner = feedback if name.startswith("feedback.") else reducer
            owner[f"{parameter}/{name}"] = value
    return feedback, reducer


@pytest.mark.parametrize(("old_size", "new_size"), [(2, 3), (3, 2), (2, 1)])
@pytest.mark.parametrize("name", RESHARDED)
def test_other_workers_get_the_mean_of_the_residuals_and_train_on(
    name: str, old_size: int, new_size: int, tmp_path: Path
) -> None:
    settings, folder = RESHARDED[name], tmp_path / "run"
    LocalComm.run(old_size, lambda comm: train_until(2, settings, comm, folder))  # 8 or 5 steps an epoch
    found = manifest.newest(folder)
    shared, states = (
        read_state(found, SHARED),
        [read_state(found, worker_file(rank)) for rank in range(old_size)],
    )

    def worker(comm: LocalComm) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], Trainer]:
        with trainer_of(settings, comm, folder=folder, keeps=True, resumed=found) as trainer:
            given = parts_of(trainer.exchange.state_dict())
            before = state_of(trainer)
            # Three steps of 8 or 5 are as far as 1.875 of 5, or 4.8 of 8; or 6 of 16: rounded up.
            expected = {(2, 3): 2, (3, 2): 5, (2, 1): 6}[old_size, new_size]
            assert (trainer.position.index, trainer.position.step) == (expected, 3)
            trainer.run()
            return *given, before, trainer

    results = LocalComm.run(new_size, worker)  # each epoch ends with a check of the replicas
    olds = [parts_of(state["parts"]["exchange"]) for state in states]
    for feedback, reducer, before, trainer in results:
        residuals = assert_is_the_mean(feedback, [old[0] for old in olds])
        numbers = assert_is_the_mean(reducer, [old[1] for old in olds])
        assert (residuals if feedback else numbers) > 0
        assert before["weights"] == weights_in(shared)
        after = state_of(trainer)["weights"]
        assert after == state_of(results[0][3])["weights"] != before["weights"]
    new = [generators_in(reducer) for _, reducer, _, _ in results]
    old = [generators_in(reducer) for _, reducer in olds]
    if settings.reducer.name in OWN:
        distinct = {generator for (generator,) in [*old, *new]}
        assert len(distinct) == old_size + new_size
    if settings.reducer.name in COMMON:
        assert len({generator for (generator,) in [*old, *new]}) == 1

"""Every reducer inside DistributedDataParallel keeps the laws of a flat exchange, bucket for bucket."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import CASES, Case
from tests.ddp_worker import BAD_STEP, REFERENCES
from tests.toy import bits_of

ROOT = Path(__file__).parent.parent
EPSILON = 2.0**-24
every_case = pytest.mark.parametrize("case", CASES, ids=str)
Seen = list[Any]
"""What a scenario has seen, by rank."""


def run(
    world_size: int, folder: Path, scenarios: list[str], worker: str = "tests.ddp_worker"
) -> dict[str, Seen]:
    """Run a worker module's scenarios in a group of processes."""
    command = [sys.executable, "-m", worker]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder / "rendezvous"), str(folder), *scenarios],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return {
        scenario: [
            torch.load(path, weights_only=False)
            if (path := folder / f"{number}-{rank}.pt").exists()
            else None
            for rank in range(world_size)
        ]
        for number, scenario in enumerate(scenarios)
    }


@pytest.fixture(scope="module")
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    return run_selected(request, "case", tmp_path_factory.mktemp("cases"))


def run_selected(
    request: pytest.FixtureRequest, kind: str, folder: Path, parameter: str = "case"
) -> dict[str, Seen]:
    """What the rows that are selected have seen: one pair of processes runs them all.

    parameter: which of a test's parameters is its row.
    """
    fixture = request.fixturename
    users = [item for item in request.session.items if fixture in getattr(item, "fixturenames", ())]
    rows = sorted({str(item.callspec.params[parameter]) for item in users})  # type: ignore[attr-defined]
    seen = run(2, folder, [f"{kind}:{row}" for row in rows])
    return {name.partition(":")[2]: found for name, found in seen.items()}


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    references = [f"reference:{name}" for name in REFERENCES]
    scenarios = [*references, "unused", "half", "scaled", "joined", "errors", "primed"]
    return run(2, tmp_path_factory.mktemp("others"), scenarios)


# --- every reducer --------------------------------------------------------------------------------


@every_case
def test_replicas_are_alike_and_several_buckets_are_exchanged(case: Case, cases: dict[str, Seen]) -> None:
    first, second = (seen["threaded"] for seen in cases[str(case)])
    assert bits_of(first["means"]) == bits_of(second["means"])
    assert all(mean.isfinite().all() for step in first["means"] for mean in step.values())
    assert first["buckets"] == [1, 3, 3, 3, 3, 3]  # DDP arranges them anew after the first backward


@every_case
def test_threaded_is_inline_bit_for_bit(case: Case, cases: dict[str, Seen]) -> None:
    for seen in cases[str(case)]:
        assert bits_of(seen["threaded"]) == bits_of(seen["inline"])


def check_conservation(workers: list[dict[str, Any]], step: int, rounding: float) -> None:
    """What left the workers' memories in a step is what arrived, by name. workers: own, waiting and means of
    each, which are lists by step of dictionaries by name. A memory may be longer, filled up with zeros; one
    that is missing is zero."""
    after = [worker["waiting"][step] for worker in workers]
    before = [worker["waiting"][step - 1] if step else {} for worker in workers]
    wanted: dict[str, Tensor] = {}  # (workers, size)
    sent: dict[str, Tensor] = {}
    for name, mean in workers[0]["means"][step].items():
        own = torch.stack([worker["own"][step][name].flatten() for worker in workers]).double()
        waited, left = (
            torch.stack(
                [one.get(name, torch.zeros(mean.numel()))[: mean.numel()] for one in waiting]
            ).double()
            for waiting in (before, after)
        )
        wanted[name] = own + waited
        sent[name] = wanted[name] - left
    largest = max(want.abs().max().item() for want in wanted.values() if want.numel())
    for name, mean in workers[0]["means"][step].items():
        # As in test_laws.py, 1.5 EPSILON sum|x| for two workers, and one addition more, of the gradient to
        # the memory.
        bound = 2.02 * EPSILON * wanted[name].abs().sum(0) + rounding * largest
        assert ((mean.flatten() - sent[name].mean(0)).abs() <= bound).all()


@pytest.mark.parametrize("case", [c for c in CASES if "conservation" not in c.unpromised], ids=str)
def test_what_left_the_memory_arrives_by_name_also_when_the_buckets_change(
    case: Case, cases: dict[str, Seen]
) -> None:
    for step in range(6):
        check_conservation([seen["threaded"] for seen in cases[str(case)]], step, case.rounding)


@every_case
def test_six_steps_are_three_and_a_reload_and_three_after_priming(case: Case, cases: dict[str, Seen]) -> None:
    for seen in cases[str(case)]:
        assert seen["straight"]["buckets"] == [3] * 6
        assert bits_of(seen["straight"]) == bits_of(seen["reloaded"])


@every_case
def test_a_bad_gradient_in_the_last_bucket_moves_nothing(case: Case, cases: dict[str, Seen]) -> None:
    for seen in cases[str(case)]:
        check_bad_step(seen["skipped"], num_parameters=8)


def check_bad_step(seen: dict[str, Any], num_parameters: int) -> None:
    """Of what pass_bad_step has seen in one process."""
    assert seen["usable"] == [step != BAD_STEP for step in range(BAD_STEP + 2)]
    assert seen["is_same"][BAD_STEP]
    assert len(seen["bad"]) == num_parameters
    assert all(grad.isnan().all() for grad in seen["bad"].values())
    assert all(grad.isfinite().all() for grad in seen["after"].values())


# --- what DDP can do ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REFERENCES)
def test_exact_through_the_hook_is_plain_ddp_bit_for_bit(name: str, others: dict[str, Seen]) -> None:
    for seen in others[f"reference:{name}"]:
        assert [set(step) for step in seen["hook"]] == [set(step) for step in seen["ddp"]]
        for ours, theirs in zip(seen["hook"], seen["ddp"], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert any(mean.any() for mean in seen["ddp"][0].values())


@pytest.mark.parametrize("world_size", [3, 4])
def test_with_more_workers_exact_divides_as_ddp_does(world_size: int, tmp_path: Path) -> None:
    """With three a division before and one after the sum, or a product with 1/3, differ."""
    (found,) = run(world_size, tmp_path, ["reference:plain"]).values()
    for seen in found:
        for ours, theirs in zip(seen["hook"], seen["ddp"], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_what_waits_for_a_parameter_that_no_worker_uses_goes_on_waiting(others: dict[str, Seen]) -> None:
    assert others["unused"][0][0]["first.weight"].any()  # of rank 0, which alone has used it
    for seen in others["unused"]:
        assert torch.equal(seen[1]["first.weight"], seen[0]["first.weight"])  # at odd steps nobody uses it
        assert not torch.equal(seen[1]["trunk.weight"], seen[0]["trunk.weight"])
        assert not any(step["second.weight"].any() for step in seen)


def test_sixteen_bit_buckets_are_exchanged_in_float32(others: dict[str, Seen]) -> None:
    first, second = others["half"]
    for mean, one, other in zip(first["mean"], first["own"], second["own"], strict=True):
        assert mean.dtype == torch.bfloat16
        assert torch.equal(mean, ((one.float() + other.float()) / 2).bfloat16())
    assert {memory.dtype for memory in first["memory"].values()} == {torch.float32}


def test_under_a_grad_scaler_the_memory_is_in_unscaled_units_and_one_step_is_skipped(
    others: dict[str, Seen],
) -> None:
    """A scale of a power of two changes no bit of a normal number."""
    for seen in others["scaled"]:
        assert seen["with"].pop("scale") == 512.0  # halved once
        seen["without"].pop("scale")
        assert bits_of(seen["with"]) == bits_of(seen["without"])
        assert all(weight.isfinite().all() for weight in seen["with"]["weights"].values())


def test_uneven_inputs_under_join_are_those_of_ddp(others: dict[str, Seen]) -> None:
    first, second = others["joined"]
    assert bits_of(first["hook"]) == bits_of(first["ddp"])
    assert bits_of(first["topk"]) == bits_of(second["topk"])
    assert bits_of(first["topk"]) != bits_of(first["ddp"])


def test_priming_changes_nothing_but_the_buckets(others: dict[str, Seen]) -> None:
    for seen in others["primed"]:
        assert seen["is_same"]
        assert seen["names"][0] == seen["names"][1]
        assert seen["step"] == 2


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("reducer", "ArithmeticError: the factors do not fit"),
        ("epoch", "ValueError: epoch: expected steps_per_epoch where the exchange is made"),
        ("state", "ValueError: state: expected the parameter 0.weight, got a state without any"),
        ("join", "ValueError: join: expected divide_by_initial_world_size=True, got False"),
        ("model", "ValueError: expected a model in DistributedDataParallel, got Sequential"),
    ],
)
def test_what_cannot_work_is_an_error_of_backward_with_its_text(
    what: str, told: str, others: dict[str, Seen]
) -> None:
    for seen in others["errors"]:
        assert seen[what].startswith(told)


def test_the_error_of_a_lost_worker_or_one_with_fewer_batches_names_it(tmp_path: Path) -> None:
    """Of three workers one ends its loop early: under DDP its process ends, in a plain loop it goes on to
    something else until the others' time is up."""
    (found,) = run(3, tmp_path, ["lost"]).values()
    for seen in found[:2]:
        for way, step in (("ddp", 3), ("attached", 2)):
            assert re.fullmatch(
                f"CommunicationError: all_reduce failed: .*: rank 2 did not come to step {step}, .*",
                seen[way],
            )

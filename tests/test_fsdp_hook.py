"""Reducers between the replicas of an FSDP2 model keep the laws of a flat exchange, shard for
shard: four processes, two replicas of two shards."""

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from tests.fsdp_worker import NUM_STEPS, ROWS, SHARDS
from tests.test_ddp_hook import Seen, check_bad_step, check_conservation, run
from tests.toy import bits_of

if not hasattr(FSDPModule, "set_all_reduce_hook"):
    pytest.skip("needs torch 2.7 or newer: FSDPModule.set_all_reduce_hook", allow_module_level=True)
every_row = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """What every scenario has seen, by rank: one start of four processes runs them all."""
    scenarios = ["warm_up", *ROWS, "native", "skip", "half", "unused", "errors"]
    return run(4, tmp_path_factory.mktemp("fsdp"), scenarios, "tests.fsdp_worker")


def replicas_of(found: Seen) -> list[Seen]:
    """For each shard what its processes have seen, one of each replica."""
    return [found[shard::SHARDS] for shard in range(SHARDS)]


def test_exact_is_hybrid_sharding_of_fsdp_itself_bit_for_bit(seen: dict[str, Seen]) -> None:
    for ours, theirs in zip(seen["exact"], seen["native"], strict=True):
        assert bits_of(ours["straight"]["means"]) == bits_of(theirs)
        assert any(mean.any() for mean in theirs[0].values())


@every_row
def test_replicas_are_alike_and_what_left_a_memory_arrives(name: str, seen: dict[str, Seen]) -> None:
    for shard in replicas_of(seen[name]):
        workers = [found["straight"] for found in shard]
        assert bits_of(workers[0]["means"]) == bits_of(workers[1]["means"])
        assert bits_of(workers[0]["weights"]) == bits_of(workers[1]["weights"])
        if "conservation" not in ROWS[name].unpromised:
            for step in range(NUM_STEPS):
                check_conservation(workers, step, ROWS[name].rounding)


@every_row
def test_four_steps_are_two_and_a_reload_and_two(name: str, seen: dict[str, Seen]) -> None:
    for found in seen[name]:
        assert bits_of(found["straight"]) == bits_of(found["reloaded"])


def test_a_memory_is_a_shards(seen: dict[str, Seen]) -> None:
    """Of 8 x 15 + 15 + 15 x 5 + 5 elements; FSDP fills 15 and 5 rows up to 2 x 8 and 2 x 3."""
    for found in seen["topk"]:
        sizes = {name: memory.numel() for name, memory in found["straight"]["waiting"][-1].items()}
        assert sizes == {"0.weight": 8 * 8, "0.bias": 8, "2.weight": 3 * 15, "2.bias": 3}
        assert found["straight"]["modules"] == 2


def test_a_bad_gradient_in_one_shard_of_one_replica_moves_nothing_in_any(seen: dict[str, Seen]) -> None:
    for found in seen["skip"]:
        check_bad_step(found, num_parameters=4)
        assert sum(found["is_same"]) == 1  # the other steps have moved something


def test_what_the_hook_compiles_is_compiled_before_the_first_step(seen: dict[str, Seen]) -> None:
    for found in seen["warm_up"]:
        assert found["before"]["_scan"]
        assert found["after"] == found["before"]


def test_sixteen_bit_gradients_are_exchanged_in_float32(seen: dict[str, Seen]) -> None:
    for first, second in replicas_of(seen["half"]):
        for name, mean in first["mean"].items():
            assert torch.equal(mean, ((first["own"][name] + second["own"][name]) / 2).bfloat16().float())
        assert {memory.dtype for memory in first["memory"].values()} == {torch.float32}


def test_what_waits_for_a_module_without_a_backward_goes_on_waiting(seen: dict[str, Seen]) -> None:
    for found in seen["unused"]:
        first, second, _ = (step["memory"] for step in found)
        assert [step["step"] for step in found] == [1, 2, 3]
        for name in first:
            assert torch.equal(first[name], second[name]) == name.startswith("0.")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("plain", "expected a model that was given to fully_shard, got Sequential"),
        ("none", "replicas: without them there is nothing to compress: expected fully_shard(..., mesh="),
        ("alone", "replicas: expected at least 2, got 1: there is nothing to compress"),
        ("whole mesh", "replicas: expected a mesh of one dimension"),
        ("shards", "replicas: expected processes that hold the same shard"),
        (
            "native",
            "expected fully_shard(..., mesh=mesh['shard']) and replicas=mesh['replicate']; got a mesh of",
        ),
        ("outside", "parameter 2.weight: expected it in a module given to fully_shard, got another"),
        ("two groups", "expected one shard group for all modules, got [("),
        ("unused", "module of first.weight: expected gradients of all its 4 parameters, 12 elements a shard"),
        (
            "ddp",
            "expected a model in DistributedDataParallel, got FSDPSequential: for a model without it use",
        ),
        ("attach", "parameter 0.weight: expected it whole, got a shard: use reducers.hook_fsdp"),
    ],
)
def test_what_cannot_work_is_one_line(what: str, told: str, seen: dict[str, Seen]) -> None:
    for found in seen["errors"]:
        assert found[what].startswith(f"ValueError: {told}")
        assert "\n" not in found[what]

"""Training through DistributedDataParallel: the numbers of flat training, wherever they can be the same."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import run
from tests.overlap_worker import BAD_STEP, REDUCERS, STEPS
from tests.toy import settings_of

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
SAME_BITS = ("exact", "topk")
"""Methods that treat a bucket as they treat the whole gradient, on two workers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("overlap")


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What all scenarios of tests/overlap_worker.py have seen, by rank: one pair of processes runs them."""
    command = [sys.executable, "-m", "tests.overlap_worker"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder / "rendezvous"), str(folder)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def lines_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name / "0" / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the same training ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("name", SAME_BITS)
def test_overlapped_training_has_the_bits_of_flat_training(
    name: str, how: str, seen: list[dict[str, Any]]
) -> None:
    for worker in seen:
        flat, overlapped = (worker[f"{name} {how}"][way]["state"] for way in ("flat", "overlapped"))
        if how == "clipped":  # the norm's sum is ordered otherwise
            _check_close(flat["weights"], overlapped["weights"])
            continue
        for part in ("weights", "buffers", "optimizer", "task"):
            assert flat[part] == overlapped[part]
        if name == "topk":
            assert flat["exchange"]["parameters"] == overlapped["exchange"]["parameters"]


def _check_close(flat: dict[str, Any], overlapped: dict[str, Any]) -> None:
    for name, (_, _, bits) in flat.items():
        ours, theirs = (
            torch.frombuffer(bytearray(found), dtype=torch.float32) for found in (overlapped[name][2], bits)
        )
        # A norm as a sum of 178 squares in another order: 178 * 2^-24 = 1.1e-5 of a mean of norm 0.05 at
        # most. 16 steps of lr 0.1 with momentum 0.9 (a factor below 10), and 10 for curvature.
        assert (ours - theirs).abs().max() <= 16 * 0.1 * 10 * 10 * 1.1e-5 * 0.05


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("name", REDUCERS)
def test_workers_agree_and_bytes_are_counted(name: str, how: str, seen: list[dict[str, Any]]) -> None:
    first, second = (worker[f"{name} {how}"]["overlapped"] for worker in seen)
    for part in ("weights", "optimizer"):
        assert first["state"][part] == second["state"][part]
    flat = seen[0][f"{name} {how}"]["flat"]
    if name in SAME_BITS and how != "skipping":
        for count in ("payload_bytes", "wire_bytes", "padding_bytes"):
            assert first["totals"][count] == flat["totals"][count]
        for value in ("mean", "std", "p99"):  # a mean over buckets
            assert first["density"][value] == pytest.approx(flat["density"][value], rel=1e-12)
    assert first["totals"]["payload_bytes"] > 0
    if name != "exact":
        assert len(first["state"]["exchange"]["buckets"]) > 1


@pytest.mark.parametrize("name", REDUCERS)
def test_a_run_that_is_stopped_resumes_bit_for_bit(name: str, seen: list[dict[str, Any]]) -> None:
    for worker in seen:
        assert worker[f"{name} resumed"]["resumed"] == worker[f"{name} resumed"]["whole"]


def test_each_bucket_restarts_its_own_generator_from_a_seed(seen: list[dict[str, Any]]) -> None:
    for worker in seen:
        found = worker["reseeded"]
        assert found["before"][0] != found["before"][1]
        assert found["after"][0] == found["after"][1]
        assert found["after"][0][0] != found["after"][0][1]  # of two buckets


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
def test_lines_say_what_those_of_flat_training_say(
    name: str, seen: list[dict[str, Any]], folder: Path
) -> None:
    flat, overlapped = (lines_of(folder, f"{name}-plain-{way}") for way in ("flat", "overlapped"))
    norms = {"gradient_norm", "residual_norm", "compression_error"}
    for theirs, ours in zip(flat, overlapped, strict=True):
        lacks = norms if name == "exact" and ours["kind"] == "step" else set()
        assert set(theirs) - lacks == set(ours)
        assert set(ours["seconds"]) == set(theirs["seconds"]) | ({"hidden"} if name != "exact" else set())
        if name in SAME_BITS:
            means = {"density", "target_density", "union_density"} & set(ours)  # over buckets: rounded
            same = set(ours) - norms - means - {"seconds"}
            assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}
            assert all(ours[key] == pytest.approx(theirs[key], rel=1e-12) for key in means)
        if name == "topk" and ours["kind"] == "step":
            # Sums of 178 squares in another order: 178 * 2^-24 = 1.1e-5 at most; squared, twice that.
            assert all(ours[key] == pytest.approx(theirs[key], rel=2.2e-5) for key in norms)


def test_the_phases_of_an_epoch_are_no_more_than_its_wall_time(
    seen: list[dict[str, Any]], folder: Path
) -> None:
    """What is hidden, and what of the exchange is communication, is in no sum."""
    for name in REDUCERS:
        for line in lines_of(folder, f"{name}-plain-overlapped"):
            if line["kind"] == "epoch":
                seconds = line["seconds"]
                apart = {"wall", "hidden", "communicate"}
                assert sum(value for key, value in seconds.items() if key not in apart) <= seconds["wall"]
                assert 0 <= seconds["communicate"] <= seconds["reduce"]
                if name != "exact":
                    assert seconds["hidden"] > 0


# --- what cannot be used --------------------------------------------------------------------------


def test_a_step_that_is_skipped_is_counted_and_said_as_in_flat_training(
    seen: list[dict[str, Any]], folder: Path
) -> None:
    for name in REDUCERS:
        flat, overlapped = (lines_of(folder, f"{name}-skipping-{way}")[-1] for way in ("flat", "overlapped"))
        assert flat["skipped"] == overlapped["skipped"] == 1


def test_the_error_of_a_number_that_is_not_finite_names_it_and_the_worker(seen: list[dict[str, Any]]) -> None:
    told = seen[0]["errors"]
    assert told == seen[1]["errors"]
    when = f"at epoch 0, step {BAD_STEP}"
    for name in ("exact", "topk"):
        for late in (False, True):
            assert told[f"{name} loss {late}"] == f"the loss became nan on rank 1 {when}"
    for late in (False, True):
        assert told[f"topk gradient {late}"] == f"the gradient of 0.weight became -inf on rank 1 {when}"
    # DDP's own mean does not say whose it was.
    mean = "the workers' mean gradient of 0.weight became"
    assert told["exact gradient False"] == f"{mean} -inf on rank 0 {when}"
    assert told["exact gradient True"] == f"the largest magnitude of {mean} inf on rank 0 {when}"


def test_parameters_that_a_step_does_not_use_need_a_setting(seen: list[dict[str, Any]]) -> None:
    for worker in seen:
        found = worker["unused"]
        assert found["refused"] == (
            "overlap.find_unused_parameters: expected true, since a step has not used all parameters, "
            "got false"
        )
        for name in SAME_BITS:
            flat, overlapped = (found[f"{name} {way}"]["state"] for way in ("flat", "overlapped"))
            assert flat["weights"] == overlapped["weights"]
            assert flat["optimizer"] == overlapped["optimizer"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--simulate", "2"], "overlap: expected null with --simulate, whose workers compute one at a time"),
        ([], "overlap: expected null, or several workers (--workers N), got one"),
        (
            ["compile=true", "--workers", "2"],
            "compile: expected false with overlap, with which it is not tested, got true",
        ),
        (
            ["clip.norm=1", "--workers", "2"],
            "clip.before_reduce: expected false with overlap, which sends the first bucket before the norm "
            "of the whole gradient is known, got true",
        ),
        (
            ["precision=tf32", "--workers", "2"],
            "precision: expected float32 or bfloat16 with overlap, got tf32, which is on or off for the "
            "whole process: the reducer's own products would be rounded while backward computes",
        ),
        (
            ["overlap={bucket_mb: 0}", "--workers", "2"],
            "overlap.bucket_mb: expected a number in (0, inf), got 0",
        ),
        (
            ["overlap={bucket: 1}", "--workers", "2"],
            "overlap.bucket: unknown key; did you mean bucket_mb?",
        ),
        (
            ["overlap=yes please", "--workers", "2"],
            "overlap: expected a mapping with keys of bucket_mb, find_unused_parameters or null, got "
            "'yes please'",
        ),
        (["accumulate_steps=0"], "accumulate_steps: expected an integer in [1, inf), got 0"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overlap = [] if any(word.startswith("overlap") for word in words) else ["overlap=true"]
    assert run.main([DIGITS, *overlap, *words, "--runs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"run.py: {told}"]


def test_true_is_a_mapping_of_defaults_and_false_is_null() -> None:
    assert settings_of(overlap=True).overlap == settings_of(overlap={}).overlap is not None
    assert settings_of(overlap=False).overlap is None
    dumped = settings_of(overlap=True).model_dump(mode="json")["overlap"]
    assert settings_of(overlap=dumped).overlap == settings_of(overlap=True).overlap

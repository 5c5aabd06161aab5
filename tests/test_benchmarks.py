"""What the benchmarks measure with: made data of the official sizes, the reading of a run's lines, checks
that may fail, hang or crash."""

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu.checks import Row, Setup
from benchmarks.gpu.measure import timed
from benchmarks.gpu.page import format_value, make_page
from benchmarks.gpu.programs import read_tests
from benchmarks.gpu.runner import run_sections
from benchmarks.gpu.waits import counted_waits
from benchmarks.made import PLACES, draw_ratings, find_or_make
from benchmarks.published import CONFIGS, Seconds, published_configs, seconds_of, step_lines, task_of
from tasks.data.leave_one_out import split
from tasks.data.movielens import ML_100K
from tasks.data.ptb import PTB
from tests.fake_checks import EVERY_WAY, FRESH, RESERVED

CPU = torch.device("cpu")


def test_the_published_configurations_are_those_with_published_data_and_without_small_ones() -> None:
    names = set(published_configs())
    others = {file.stem for file in CONFIGS.glob("*.yaml")} - names
    assert {name for name in others if task_of(name) in PLACES} == {
        name for name in others if name.endswith("_small")
    }
    families = (
        "cifar10_resnet18",
        "cifar100_senet18",
        "wikitext2_lstm",
        "ptb_lstm",
        "ncf_ml-1m",
        "ncf_ml-20m",
    )
    assert names >= set(families)


@pytest.mark.parametrize(("num_users", "num_items"), [(943, 1_682), (60, 1_000)])
def test_the_split_drops_no_made_user_and_no_made_item(num_users: int, num_items: int) -> None:
    ratings = draw_ratings(60 * num_users, num_users, num_items)
    assert len(ratings.users) == 60 * num_users
    assert np.array_equal(ratings.users, np.sort(ratings.users))
    found = split(ratings)
    assert (found.num_users, found.num_items) == (num_users, num_items)


def test_data_is_made_once_and_only_where_there_is_none(tmp_path: Path) -> None:
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    assert find_or_make("ml-100k", data, temporary) == (temporary, "made")
    file = ML_100K.path(temporary)
    ML_100K.check(temporary)
    before = file.stat().st_mtime_ns
    assert find_or_make("ml-100k", data, temporary) == (temporary, "made")
    assert file.stat().st_mtime_ns == before
    assert find_or_make("ml-100k", temporary, data) == (temporary, "real")
    assert not data.exists()


def test_a_made_text_has_the_published_sizes_in_the_prepared_form(tmp_path: Path) -> None:
    find_or_make("ptb", tmp_path / "data", tmp_path)
    text = PTB.read(tmp_path, "spacy")
    assert [len(part) for part in (text.train, text.valid, text.test)] == [929_589, 73_760, 82_430]
    assert len(text.vocabulary) == 10_000


def test_a_runs_step_lines_are_read_without_the_one_being_written(tmp_path: Path) -> None:
    assert step_lines(tmp_path) == []
    (tmp_path / "run").mkdir()
    lines = [{"kind": "step", "step": 0}, {"kind": "epoch", "step": 1}, {"kind": "step", "step": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"kind": "st')
    assert step_lines(tmp_path) == [lines[0], lines[2]]


def test_a_steps_seconds_are_its_phases_with_communicate_inside_reduce() -> None:
    phases = [
        {"data": 1.0, "forward": 2.0, "backward": 4.0, "reduce": 8.0, "communicate": 5.0, "optimizer": 16.0},
        {"data": 0.0, "forward": 1.0, "backward": 1.0, "reduce": 1.0, "optimizer": 1.0, "evaluate": 99.0},
        {"data": 0.0, "forward": 3.0, "backward": 3.0, "reduce": 3.0, "communicate": 2.0, "optimizer": 1.0},
    ]
    lines = [{"seconds": seconds} for seconds in phases]
    assert seconds_of(lines, "communicate") == Seconds(median=2.0, fastest=0.0, slowest=5.0)
    assert seconds_of(lines, "step") == Seconds(median=10.0, fastest=4.0, slowest=31.0)


# --- checks that need a GPU -----------------------------------------------------------------------


def run_fakes(sections: list, limit_seconds: float, folder: Path) -> tuple[dict[str, list[Row]], list[Row]]:
    """The rows by section, and those that were shown meanwhile."""
    shown: list[Row] = []
    setup = Setup(CPU, folder, small=False)
    rows = run_sections(sections, setup, limit_seconds, lambda name, rows: shown.extend(rows))
    return rows, shown


def test_a_check_that_raises_hangs_or_crashes_costs_its_own_rows(tmp_path: Path) -> None:
    rows, shown = run_fakes([EVERY_WAY, FRESH], 200, tmp_path)
    first, raised, crashed, second, hung, third = rows["every way"]
    assert raised == {"check": "1 raises", "failed": "ValueError: a bad"}
    assert crashed == {"check": "2 crashes", "failed": "its process ended with exit code 3"}
    assert hung == {"check": "4 hangs", "failed": "took longer than 5 s"}
    assert first["figure"] == second["figure"] == third["figure"] == 1.5
    (fresh,) = rows["fresh"]
    assert len({first["process"], second["process"], third["process"], fresh["process"]}) == 4
    assert shown == rows["every way"] + rows["fresh"]


def test_checks_for_which_there_is_no_time_are_named(tmp_path: Path) -> None:
    started = time.monotonic()
    rows, _ = run_fakes([EVERY_WAY, RESERVED], 2, tmp_path)
    assert time.monotonic() - started < 60
    assert [row["left out"] for row in rows["every way"]] == ["no time was left for it"] * 6
    assert rows["reserved"] == []


def test_the_page_has_a_table_for_each_kind_of_row_and_names_what_failed() -> None:
    rows: list[Row] = [
        {"method": "a|b", "ms": 0.12345, "right": True},
        {"method": "c", "ms": 1234.5, "right": None},
        {"bytes": 4},
        {"check": "x", "failed": "ValueError: y"},
        {"check": "z", "left out": "no time was left for it"},
    ]
    facts = {
        "processor": "A processor",
        "versions": {"torch": "9", "cuda": None},
        "commit": "c",
        "wall_seconds": 3,
    }
    page = make_page("a-name", facts, [EVERY_WAY, FRESH], {"every way": rows})
    assert (
        page
        == """# a-name

A processor. torch 9; commit c, 3 s.

## every way

Fails in every way.

| method | ms | right |
| --- | --- | --- |
| a\\|b | 0.123 | yes |
| c | 1,234 |  |

| bytes |
| --- |
| 4 |

Failed:

- x: ValueError: y

Left out:

- z: no time was left for it
"""
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (5e-4, "5.00e-04"), (99.96, "100"), (123.4, "123"), (2e6, "2.00e+06"), (12345, "12,345")],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert format_value(value) == text


def test_pytests_report_becomes_counts_failures_and_reasons(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        """<testsuites><testsuite>
        <testcase name="good"/><testcase name="better"/>
        <testcase name="bad"><failure message="assert 1 == 2&#10;more"/></testcase>
        <testcase name="absent"><skipped message="needs a GPU"/></testcase>
        </testsuite></testsuites>"""
    )
    assert list(read_tests(report)) == [
        {"check": "bad", "failed": "assert 1 == 2"},
        {"passed": 2, "failed tests": 1, "skipped": 1},
        {"skipped because": "needs a GPU", "tests": 1},
    ]


def test_a_slow_call_is_timed_a_few_times_only() -> None:
    calls: list[float] = []
    timing = timed(lambda: calls.append(time.sleep(0.02) or 0.0), CPU, seconds=0.1)  # type: ignore[func-returns-value]
    assert 4 <= len(calls) <= 6
    assert timing.queued == timing.alone >= 20


class FakeEvent:
    """A CUDA event on a device that does what it is told at once, and sleeps when it is told to."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        """Everything is done already."""

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 1000 * (end.time - self.time)


def test_a_gpus_time_is_that_between_its_events_alone_and_behind_other_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: calls.append("busy"))

    def call() -> None:
        calls.append("call")
        time.sleep(0.002)

    timing = timed(call, torch.device("cuda"), before=lambda: calls.append("before"))
    assert min(timing.alone, timing.queued, timing.host) >= 2
    half = len(calls) * 3 // 7  # 3 words a call on an idle device, 4 on a busy one, as often
    assert calls[:half] == ["before", "synchronize", "call"] * (half // 3)
    assert calls[half:] == ["before", "synchronize", "busy", "call"] * (half // 3)


def test_the_waits_that_torch_reports_are_counted_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with counted_waits(torch.device("cuda")) as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("does not detect all synchronizing operations", stacklevel=1)
    assert list(found.values()) == [2]
    assert modes == ["warn", "default"]


def test_what_would_wait_on_a_gpu_is_counted_by_line() -> None:
    values = torch.tensor([1.0, 0.0, 2.0])
    with counted_waits(CPU) as found:
        values.add_(1)
        values.sum().item()
        values[values > 1]
        values.nonzero()
    assert list(found.values()) == [1, 1, 1]
    assert all(line.startswith("tests/test_benchmarks.py:") for line in found)


def test_the_gpu_benchmark_leaves_a_dated_page_and_figures(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--sections", "facts,nccl", "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,), (page,) = tmp_path.glob("*-gpu-*.json"), tmp_path.glob("*-gpu-*.md")
    content = json.loads(figures.read_text())
    assert content["sections"].keys() == {"facts", "nccl"}
    assert {"torch", "numpy"} <= {row.get("what") for row in content["sections"]["facts"]}
    assert {row["sum"] for row in content["sections"]["nccl"] if "type" in row} == {"works"}
    assert page.read_text().startswith(f"# {page.stem}\n")

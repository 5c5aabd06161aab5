"""The report: numbers worked by hand, what its tables and its pictures show, what it refuses."""

import csv
import json
import math
import os
import subprocess
import sys
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D

from sage.report import __main__ as report
from sage.report import advisor, curves, figures, formats, pictures, plots, runs, tables
from sage.report.groups import Group, Section, find_exact, gather
from sage.report.looks import FILLS, look_of
from sage.report.runs import Run
from sage.report.spread import BANDS, Band
from sage.report.tables import format_number
from sage.sweep import read

ROOT = Path(__file__).parent.parent
Lines = list[dict[str, Any]]
Capture = pytest.CaptureFixture[str]

# An epoch is two steps. Per step: data 1, forward 2, backward 4, optimizer 1: compute 8 ms.
SECONDS = {"data": 0.002, "forward": 0.004, "backward": 0.008, "optimizer": 0.002, "evaluate": 9.0}
EXACT_SECONDS = {**SECONDS, "reduce": 0.020, "communicate": 0.016}  # compression 2, communication 8: 18 ms
SAGE_SECONDS = {**SECONDS, "reduce": 0.010, "communicate": 0.004}  # compression 3, communication 2: 13 ms


def lines_of(densities: list[float], payload: float, seconds: dict[str, float], **step: float) -> Lines:
    """densities: one an epoch; payload: bytes a step; accuracy 0.5, 0.75, ...; step: more of a step line."""
    lines: Lines = []
    for epoch, density in enumerate(densities):
        for index in (2 * epoch, 2 * epoch + 1):
            lines.append({"kind": "step", "epoch": epoch, "step": index, "density": density, **step})
        score = {"name": "accuracy", "value": 1 - 0.5 / 2**epoch}
        line = {"kind": "epoch", "epoch": epoch, "step": 2 * epoch + 2, "score": score, "seconds": seconds}
        lines.append(
            {**line, "density": {"mean": density}, "bytes": {"payload": 2 * payload, "wire": 2 * payload}}
        )
    return lines


EXACT = lines_of([1.0, 1.0], 1e6, EXACT_SECONDS)
SAGE = lines_of([0.0102, 0.01], 2e4, SAGE_SECONDS, target_density=0.01, threshold=0.5)


def write_run(
    folder: Path, reducer: Any, lines: Lines, seed: int = 1, size: int = 2, done: bool = True, **task: Any
) -> Run:
    """Writes what a run leaves, and reads it. size: of the world; task: settings of it."""
    folder.mkdir(parents=True)
    reducer = {"name": reducer} if isinstance(reducer, str) else reducer
    config = {"seed": seed, "task": {"name": "digits", "batch_per_worker": 32} | task, "reducer": reducer}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"world_size": size}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if done:
        score = {"name": "accuracy", "higher_is_better": True, "last": 0.75, "best": 0.8125}
        summary = {"score": score, "density": {"target": None, "mean": 0.0101, "p99": 0.015}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return runs.read_run(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/a/exact", "exact", EXACT)
    write_run(tmp_path / "runs/sage", "sage", SAGE)
    return tmp_path / "runs"


def section_in(folder: Path) -> Section:
    (section,) = gather([runs.read_run(path) for path in runs.find_runs([folder])])
    return section


def section_of(*members: Run) -> Section:
    (section,) = gather(members)
    return section


def group_of(*members: Run) -> Group:
    (group,) = section_of(*members).groups
    return group


def text_in_80_columns(section: Section, target: float | None = None) -> str:
    return formats.to_terminal(tables.build_sheets(section, target), width=80)


WORKLOAD = "digits, world size 2"


def test_a_simulations_time_in_collectives_is_not_reported(folder: Path) -> None:
    (folder / "sage/environment.json").write_text('{"world_size": 2, "simulated": true}')
    apart = gather([runs.read_run(path) for path in runs.find_runs([folder])])
    sections = {section.workload: section for section in apart}
    exact, sage = sections[WORKLOAD], sections[f"{WORKLOAD}, simulated"]
    assert tables.time_row(sage.groups[0], None) == ["8.00", "3.00", *["-"] * 6]
    assert runs.phase_milliseconds(sage.groups[0].runs[0])["communication"] == 0
    assert runs.phase_milliseconds(exact.groups[0].runs[0])["communication"] == 8
    assert tables.target_row(sage.groups[0], 0.0)[2] == "-"
    note = "simulated: one worker's times"
    assert note in text_in_80_columns(sage)
    assert note not in text_in_80_columns(exact)


def test_the_rows_hold_the_numbers_worked_by_hand(folder: Path) -> None:
    exact, sage = section_in(folder).groups
    assert tables.results_row(sage) == ["1", "0.7500", "0.8125"]
    # (0.0102 + 0.01) / 2; 4 steps of 20 kB; 1 MB a step over 20 kB; 18 ms over 13 ms
    assert tables.bytes_row(sage, exact) == ["0.0101 / 0.01", "0.0150", "0.08000", "50.0x less"]
    assert tables.bytes_row(exact, exact) == ["1.00", "0.0150", "4.000", "1.00x"]
    assert tables.time_row(sage, exact) == ["8.00", "3.00", "2.00", "13.0", "1.38x", "-", "-", "-"]
    assert tables.time_row(exact, exact)[:5] == ["8.00", "2.00", "8.00", "18.0", "1.00x"]


def test_the_harness_own_cost_is_in_columns_of_its_own_and_slows_no_method(tmp_path: Path) -> None:
    # Of two steps: 4 ms agree, 6 ms log, and 50 ms beside the evaluation's 9 s: 26 + 10 + 14 unaccounted.
    seconds = {**SAGE_SECONDS, "agree": 0.004, "log": 0.006, "checkpoint": 1.0, "wall": 10.050}
    sage = group_of(write_run(tmp_path / "sage", "sage", lines_of([0.1] * 2, 1e4, seconds)))
    exact = group_of(write_run(tmp_path / "exact", "exact", lines_of([1.0], 1e6, EXACT_SECONDS)))
    assert tables.time_row(sage, exact) == ["8.00", "3.00", "2.00", "13.0", "1.38x", "2.00", "3.00", "7.00"]
    assert runs.training_seconds(sage.runs[0].epochs[0]) == pytest.approx(0.026, rel=1e-14)
    record = next(csv.DictReader(StringIO(formats.to_csv([Section("w", [sage])], None))))
    assert [float(record[f"{name}_ms"]) for name in ("communication", "agree", "log", "other")] == (
        pytest.approx([2, 2, 3, 7], rel=1e-11)  # 10 s of wall less 10 s: 2^-53 * 10 / 0.014
    )


def test_bytes_are_compared_per_step_whatever_the_number_of_steps(tmp_path: Path) -> None:
    exact = group_of(write_run(tmp_path / "exact", "exact", EXACT))
    longer = group_of(write_run(tmp_path / "longer", "x", lines_of([0.5] * 4, 4e6, SAGE_SECONDS)))
    assert tables.bytes_row(longer, exact)[2:] == ["32.00", "4.00x more"]


def test_a_lone_worker_sends_and_communicates_nothing(tmp_path: Path) -> None:
    lines = lines_of([1.0], 0.0, {**SECONDS, "reduce": 0.010})
    group = group_of(write_run(tmp_path / "run", "exact", lines, size=1))
    assert tables.bytes_row(group, group)[2:] == ["0.000", "-"]
    assert tables.time_row(group, group)[1:4] == ["5.00", "0.00", "13.0"]


# --- configurations and seeds ---------------------------------------------------------------------


def seeds_of_sage(folder: Path, *densities: float) -> list[Run]:
    """Of each density in the second epoch a run, with a seed of its own; the first epoch's is 0.01."""
    return [
        write_run(folder / str(seed), "sage", lines_of([0.01, density], 2e4 * seed, SAGE_SECONDS), seed)
        for seed, density in enumerate(densities, 1)
    ]


def test_runs_that_differ_in_the_seed_alone_are_one_row_with_mean_and_deviation(tmp_path: Path) -> None:
    group = group_of(*seeds_of_sage(tmp_path, 0.01, 0.03, 0.05))
    assert [run.config["seed"] for run in group.runs] == [1, 2, 3]
    # Means 0.01, 0.02, 0.03: their mean is 0.02, their sample deviation 0.01; 80, 160 and 240 kB sent.
    assert tables.bytes_row(group, None)[:3] == ["0.0200 ±0.010", "0.0150", "0.1600"]
    assert tables.results_row(group) == ["3", "0.7500 ±0.0", "0.8125 ±0.0"]


def test_an_unfinished_run_is_in_no_mean(tmp_path: Path) -> None:
    done = write_run(tmp_path / "done", "sage", SAGE)
    section = section_of(done, write_run(tmp_path / "cut", "sage", SAGE[:5], seed=2, done=False))
    assert [group.label for group in section.groups] == ["sage", "sage (unfinished)"]
    assert [len(group.runs) for group in section.groups] == [1, 1]


def test_a_repeated_run_is_a_row_of_its_own(tmp_path: Path) -> None:
    made = [write_run(tmp_path / f"{i}-{seed}", "sage", SAGE, seed) for i in (1, 2) for seed in (1, 2)]
    groups = section_of(*made).groups
    assert [[run.folder.name for run in group.runs] for group in groups] == [["1-1", "1-2"], ["2-1", "2-2"]]


def test_tasks_and_world_sizes_are_compared_apart(tmp_path: Path) -> None:
    made = [
        write_run(tmp_path / "0", "sage", SAGE),
        write_run(tmp_path / "1", "topk", SAGE, name="cnn", size=4),
        write_run(tmp_path / "2", "exact", EXACT),
    ]
    sections = gather(made)
    assert [section.workload for section in sections] == ["digits, world size 2", "cnn, world size 4"]
    assert [[group.label for group in section.groups] for section in sections] == [
        ["exact", "sage"],
        ["topk"],
    ]


def test_the_plain_all_reduce_comes_first_then_those_of_fewer_bits(tmp_path: Path) -> None:
    names = ["topk", {"name": "exact", "dtype": "float16"}, {"name": "exact", "dtype": "float32"}, "sage"]
    made = [write_run(tmp_path / str(i), name, SAGE) for i, name in enumerate(names)]
    labels = [group.label for group in section_of(*made).groups]
    assert labels == ["exact dtype=float32", "exact dtype=float16", "topk", "sage"]


def test_what_a_target_took_is_counted_up_to_the_epoch_that_reached_it(tmp_path: Path) -> None:
    lines = lines_of([0.1] * 3, 1e6, SAGE_SECONDS)  # accuracy 0.5, 0.75, 0.875 after 2 steps each
    run = write_run(tmp_path / "run", "sage", lines)
    # An epoch: compute 16 ms, reduce 10 ms; 2 MB.
    assert runs.training_seconds(run.epochs[0]) == pytest.approx(0.026, rel=1e-14)
    epochs, seconds, sent = tables.cost_to_reach(run, 0.75) or ()
    assert (epochs, sent) == (2, 4e6)
    assert seconds == pytest.approx(0.052, rel=1e-14)  # roundings of 2^-53 each
    assert tables.cost_to_reach(run, 0.76)[0] == 3
    assert tables.cost_to_reach(run, 0.9) is None
    late = write_run(tmp_path / "late", "sage", lines[:3] + lines_of([0.1], 1e6, SAGE_SECONDS)[2:], seed=2)
    assert tables.target_row(group_of(run, late), 0.75) == ["1 of 2", "2.00", "0.0520", "4.00"]
    other = write_run(tmp_path / "other", "sage", lines, seed=3)
    assert tables.target_row(group_of(run, other), 0.75)[:2] == ["2 of 2", "2.00 ±0.0"]


def test_a_lower_score_reaches_a_target_where_lower_is_better(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "sage", lines_of([0.1] * 2, 1.0, SAGE_SECONDS))
    run.summary["score.higher_is_better"] = False
    assert tables.cost_to_reach(run, 0.6)[0] == 1
    assert tables.cost_to_reach(run, 0.4) is None


def test_the_target_is_the_runs_own_where_all_have_the_same() -> None:
    def stopping_at(score: float | None) -> Run:
        return Run(Path(), {"stop_at_score": score}, "", [], [], {}, False, "", False)

    assert report.common_target([stopping_at(0.5), stopping_at(0.5)]) == 0.5
    assert report.common_target([stopping_at(0.5), stopping_at(None)]) is None


@pytest.mark.parametrize("other", [{"size": 4}, {"name": "cnn"}, {"batch_per_worker": 64}, {"done": False}])
def test_only_a_finished_exact_run_of_the_same_task_and_world_size_is_compared_with(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    sage = group_of(write_run(tmp_path / "sage", "sage", SAGE))
    apart = group_of(write_run(tmp_path / "apart", "exact", EXACT, **other))
    half = group_of(write_run(tmp_path / "half", {"name": "exact", "dtype": "bfloat16"}, EXACT))
    alike = group_of(write_run(tmp_path / "alike", "exact", EXACT, seed=2))
    assert find_exact(sage, [sage, apart, half]) is None
    assert find_exact(sage, [sage, apart, half, alike]) is alike
    assert tables.bytes_row(sage, None)[-1] == tables.time_row(sage, None)[-1] == "-"


def test_runs_that_overlap_say_so_and_their_plain_average_is_the_one_compared_with(tmp_path: Path) -> None:
    def overlapped(name: str, reducer: str, lines: Lines) -> Run:
        run = write_run(tmp_path / name, reducer, lines)
        run.config.update({"overlap.bucket_mb": 25.0, "overlap.find_unused_parameters": False})
        return run

    hidden = {**SAGE_SECONDS, "hidden": 0.012}
    members = [
        write_run(tmp_path / "sage", "sage", SAGE),
        write_run(tmp_path / "exact", "exact", EXACT),
        overlapped("sage beside", "sage", lines_of([0.01] * 2, 2e4, hidden)),
        overlapped("exact beside", "exact", lines_of([1.0] * 2, 1e6, {**EXACT_SECONDS, "reduce": 0.016})),
    ]
    section = section_of(*members)
    labels = ["exact overlap", "exact", "sage", "sage overlap"]
    assert [group.label for group in section.groups] == labels
    for group in section.groups:
        assert find_exact(group, section.groups) is section.groups[0]

    sheet = tables.time_sheet(section)
    assert sheet.columns[-1] == "hidden\nms"
    assert [row[-1] for row in sheet.rows] == ["-", "-", "-", "6.00"]  # 12 ms in two steps
    assert "hidden" not in tables.time_sheet(section_of(*members[:2])).columns[-1]

    advised = [group.label for group, _ in advisor.methods_of(section)]
    assert advised == ["sage"]


def test_of_lines_about_one_step_or_epoch_the_last_counts(tmp_path: Path) -> None:
    stale = lines_of([0.9, 0.9], 7e6, EXACT_SECONDS)[:5]  # the first epoch and two steps, then resumed
    resumed = write_run(tmp_path / "resumed", "sage", stale + SAGE)
    whole = write_run(tmp_path / "whole", "sage", SAGE)
    assert (resumed.steps, resumed.epochs) == (whole.steps, whole.epochs)


def test_configurations_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    thin, wide = {"name": "topk", "density": 0.001}, {"name": "topk", "density": 0.01}
    cases = [("sage", 7), (thin, 1), (wide, 1), (wide, 2), (wide, 2)]
    made = [write_run(tmp_path / str(i), reducer, SAGE, seed) for i, (reducer, seed) in enumerate(cases)]
    last = ["topk density=0.01 seed=1,2", "topk density=0.01 seed=2"]
    assert [group.label for group in section_of(*made).groups] == ["sage", "topk density=0.001", *last]


def test_labels_name_results_first_then_seeds_then_recording_then_folders() -> None:
    def run(folder: str, **settings: Any) -> Run:
        config = {"task.name": "digits", "reducer.name": "sage", "seed": 1, "log.every": 1} | settings
        return Run(Path(folder), config, "", [], [], {"score.last": 1.0}, False, "", False)

    def labels(*members: Run) -> list[str]:
        return [group.label for group in section_of(*members).groups]

    often = {"log.every": 5}
    assert labels(run("a", epochs=1), run("b", epochs=2, **often)) == ["sage epochs=1", "sage epochs=2"]
    assert labels(run("a"), run("b", seed=2, **often)) == ["sage seed=1", "sage seed=2"]
    assert labels(run("a"), run("b", **often)) == ["sage every=1", "sage every=5"]
    assert labels(run("a"), run("b")) == ["sage run=a", "sage run=b"]
    assert labels(run("x/a"), run("y/a")) == ["sage at=x/a", "sage at=y/a"]


def test_where_a_name_is_long_all_are_numbered_and_a_last_table_is_the_key(tmp_path: Path) -> None:
    settings = [{"name": "sage", "exchange": word * 12} for word in ("one", "two")]
    section = section_of(*(write_run(tmp_path / str(i), reducer, SAGE) for i, reducer in enumerate(settings)))
    assert [group.short_label for group in section.groups] == ["1 sage", "2 sage"]
    key = tables.build_sheets(section, None)[-1]
    assert key.rows == [["1 sage", f"sage exchange={'one' * 12}"], ["2 sage", f"sage exchange={'two' * 12}"]]
    assert "two" * 12 in text_in_80_columns(section)


def test_every_folder_with_metrics_is_found_once_at_any_depth(folder: Path) -> None:
    found = [(folder / "a/exact").resolve(), (folder / "sage").resolve()]
    assert runs.find_runs([folder, folder / "sage", folder / "a"]) == found


def test_the_tables_fit_80_columns_and_cut_nothing(tmp_path: Path) -> None:
    exact = write_run(tmp_path / "0", "exact", lines_of([1.0], 123.4e9, EXACT_SECONDS))
    made = [write_run(tmp_path / f"{n}", {"name": "powersgd", "matrix_rank": n}, SAGE) for n in (4, 8)]
    many = seeds_of_sage(tmp_path / "many", 0.0123, 0.02345)
    section = section_of(exact, *made, *many, write_run(tmp_path / "3", "threshold", SAGE[:2], done=False))
    text = text_in_80_columns(section, target=0.6)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "246,800" in text.split()  # MB: two steps
    for sheet in tables.build_sheets(section, 0.6)[:-1]:
        assert all(cell in text for row in sheet.rows for cell in row[1:])
    narrow = formats.to_terminal(tables.build_sheets(section, 0.6), width=60)
    assert max(map(len, narrow.splitlines())) <= 60
    for sheet in tables.build_sheets(section, 0.6)[:-1]:
        assert all(cell in narrow for row in sheet.rows for cell in row[1:])


def test_a_wide_table_continues_below_in_blocks_of_about_the_same_width() -> None:
    sheet = tables.Sheet("t", ["run", "a", "b", "c"], [["x", "1" * 9, "2" * 9, "3" * 9]], "")
    # beside a column of 3, a column of 9 needs 12 more
    assert formats.blocks_of(sheet, 40) == [[1, 2, 3]]
    assert formats.blocks_of(sheet, 27) == [[1, 2], [3]]
    assert formats.blocks_of(sheet, 5) == [[1], [2], [3]]  # a number is never folded
    wide = tables.Sheet("t", ["run", *"abcd"], [["x", *["1" * 9] * 4]], "")
    assert formats.blocks_of(wide, 40) == [[1, 2], [3, 4]]  # and not three and one


def test_an_unfinished_run_is_listed_with_how_far_it_came(tmp_path: Path) -> None:
    section = section_of(write_run(tmp_path / "0", "sage", SAGE[:5], done=False))
    (group,) = section.groups
    assert "sage (unfinished)" in text_in_80_columns(section)
    assert "at epoch 1, step 3" in text_in_80_columns(section)
    assert tables.results_row(group) == ["1", "0.5000", "-"]
    assert tables.bytes_row(group, None) == ["0.0102 / 0.01", "-", "0.04000", "-"]
    assert tables.time_row(group, None)[:5] == ["8.00", "3.00", "2.00", "13.0", "-"]
    nothing = section_of(write_run(tmp_path / "1", "sage", [], done=False))
    assert "at epoch -, step -" in text_in_80_columns(nothing)
    assert tables.results_row(nothing.groups[0]) == ["1", "-", "-"]
    assert tables.bytes_row(nothing.groups[0], None) == ["-", "-", "0.000", "-"]


def test_markdown_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    section = section_of(write_run(tmp_path / "e", "exact", EXACT), *seeds_of_sage(tmp_path, 0.01, 0.03))
    for sheet in tables.build_sheets(section, 0.75):
        cells = [row.strip("|").split("|") for row in formats.to_markdown(sheet).splitlines() if "|" in row]
        assert [[cell.strip() for cell in row] for row in cells[2:]] == sheet.rows
    exact, sage = csv.DictReader(StringIO(formats.to_csv([section], 0.75)))
    assert (exact["run"], sage["run"], sage["seeds"]) == ("exact", "sage", "1 2")
    assert float(sage["density.mean"]) == pytest.approx(0.015, rel=1e-14)
    assert float(sage["density.std"]) == pytest.approx(0.005 * 2**0.5, rel=1e-14)
    assert (sage["reached"], float(sage["bytes_to_0.75.mean"])) == ("2", 120e3)  # 80 and 160 kB
    assert exact["density.std"] == ""


def test_a_bar_in_a_setting_does_not_break_a_markdown_table() -> None:
    sheet = tables.Sheet("t", ["run", "x"], [["a|b", "1"]], "")
    assert formats.to_markdown(sheet).splitlines()[-1] == "| a\\|b | 1 |"


def test_texts_from_run_files_steer_no_terminal_no_page_and_no_spreadsheet(
    tmp_path: Path, capsys: Capture
) -> None:
    hostile = {"note": "\x1b[2J\u202e<script>", "formula": "=cmd|' /C calc'!A0", "price": "$\\frac{$"}
    write_run(tmp_path / "a", "exact", EXACT, **hostile)
    write_run(tmp_path / "b", "exact", EXACT, note="x", formula="-5", price="1")
    assert report.main([str(tmp_path)]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err
    markdown = (tmp_path / "report.md").read_text()
    assert "\x1b" not in markdown
    assert "<script>" not in markdown
    [header, first, second] = csv.reader((tmp_path / "report.csv").read_text().splitlines())
    cells = dict(zip(header, first, strict=True))
    assert cells["task.formula"] == "'=cmd|' /C calc'!A0"
    assert cells["task.note"] == r"\x1b[2J\u202e<script>"
    assert dict(zip(header, second, strict=True))["task.formula"] == "'-5"
    assert float(cells["last.mean"]) == 0.75  # numbers are numbers


# --- seed by seed --------------------------------------------------------------------------------


def scoring(folder: Path, reducer: Any, scores: dict[int, float]) -> list[Run]:
    """A run of each seed with a last score of its own."""
    made = [write_run(folder / f"{seed}", reducer, SAGE, seed) for seed in scores]
    for run, score in zip(made, scores.values(), strict=True):
        run.summary["score.last"] = score
    return made


def test_differences_are_taken_between_runs_of_the_same_seed(tmp_path: Path) -> None:
    exact = scoring(tmp_path / "e", "exact", {1: 0.90, 2: 0.80, 3: 0.70, 4: 0.10})
    topk = scoring(tmp_path / "t", "topk", {3: 0.69, 1: 0.87, 2: 0.78})  # -0.01, -0.03, -0.02
    sheet = tables.differences_sheet(section_of(*exact, *topk))
    # mean -0.02, deviation 0.01, half an interval 4.3027 * 0.01 / sqrt 3 = 0.02484
    assert sheet
    assert sheet.rows == [["topk", "3", "-0.0200", "-0.0448 to +0.00484"]]
    assert sheet.title == "Compared with exact, seed by seed"
    other = tables.differences_sheet(section_of(*exact, *topk), "topk")
    assert other
    assert other.rows == [["exact", "3", "+0.0200", "-0.00484 to +0.0448"]]


def test_without_a_common_seed_there_is_no_comparison(tmp_path: Path) -> None:
    made = [*scoring(tmp_path / "e", "exact", {1: 0.9}), *scoring(tmp_path / "t", "topk", {2: 0.8})]
    assert tables.differences_sheet(section_of(*made)) is None
    single = [*made, *scoring(tmp_path / "s", "sage", {1: 0.95})]
    sheet = tables.differences_sheet(section_of(*single))
    assert sheet
    assert sheet.rows == [["sage", "1", "+0.0500", "-"]]


def test_a_baseline_is_a_configuration_or_a_reducer_and_another_name_is_an_error(
    tmp_path: Path, capsys: Capture
) -> None:
    for density in (0.1, 0.2):
        write_run(tmp_path / f"runs/{density}", {"name": "topk", "density": density}, SAGE)
    write_run(tmp_path / "runs/sage", "sage", SAGE)
    section = section_in(tmp_path / "runs")
    for name, first in (("topk", "topk density=0.1"), ("topk density=0.2", "topk density=0.2")):
        sheet = tables.differences_sheet(section, name)
        assert sheet
        assert sheet.title == f"Compared with {first}, seed by seed"
        assert len(sheet.rows) == 2
    assert report.main([str(tmp_path), "--baseline", "topkk"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("report: --baseline topkk: expected a finished configuration or reducer: topk")


# --- LaTeX ---------------------------------------------------------------------------------------


def test_a_latex_table_holds_the_rows_and_no_text_of_a_run_is_a_command() -> None:
    rows = [[r"a_b \input{x} 50% $&#~^", "0.97 ±0.01", "-", "-0.5 to +0.1"]]
    lines = formats.to_latex(tables.Sheet("T_1", ["run", "x\nlast", "y", "z"], rows, "one\ntwo")).splitlines()
    assert lines[2] == r"  \caption{T\_1. one; two.}"
    assert lines[5] == r"    run & x last & y & z \\"
    name = r"a\_b \textbackslash{}input\{x\} 50\% \$\&\#\textasciitilde{}\textasciicircum{}"
    assert lines[7] == rf"    {name} & 0.97 $\pm$0.01 & -- & $-$0.5 to +0.1 \\"
    assert lines[3] == r"  \begin{tabular}{lrrr}"


# --- pictures -------------------------------------------------------------------------------------


def draw_one(section: Section, band: Band = "std") -> Figure:
    (page,) = pictures.pages(section, band)
    return figures.draw(page)


def test_every_axis_has_a_label_with_a_unit(folder: Path) -> None:
    panels = draw_one(section_in(folder)).axes
    assert [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in panels] == [
        ("Score over epochs", "training (epochs)", "accuracy (fraction)"),
        ("Score over bytes", "sent by one worker (MB)", "accuracy (fraction)"),
        ("Score over seconds", "training steps (s)", "accuracy (fraction)"),
        ("Density", "training (steps)", "density (fraction)"),
        ("Threshold", "training (steps)", "threshold (|gradient|)"),
        ("Time per step", "time per step (ms); agree and log: the harness's own", "run (reducer)"),
    ]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_the_curves_are_the_files_numbers(folder: Path) -> None:
    epochs, sent, seconds, densities, thresholds, _ = draw_one(section_in(folder)).axes
    assert [points(line) for line in epochs.get_lines()] == [[(1, 0.5), (2, 0.75)]] * 2
    assert [points(line) for line in sent.get_lines()] == [[(2, 0.5), (4, 0.75)], [(0.04, 0.5), (0.08, 0.75)]]
    ends = [points(line)[-1][0] for line in seconds.get_lines()]
    assert ends == pytest.approx([0.072, 0.052], rel=1e-14)  # 4 steps of 18 and 13 ms
    target, exact, sage = densities.get_lines()
    assert points(target) == [(step, 0.01) for step in range(4)]
    assert points(exact) == []  # 1 throughout would leave no room for the others
    assert points(sage) == [(0, 0.0102), (1, 0.0102), (2, 0.01), (3, 0.01)]
    assert [points(line) for line in thresholds.get_lines()] == [[], [(step, 0.5) for step in range(4)]]
    assert {axes.get_yscale() for axes in (densities, thresholds)} == {"log"}


@pytest.mark.parametrize(
    ("band", "half"),
    [("std", 0.01), ("ci95", 4.302652729749464 * 0.01 / 3**0.5)],  # t of 2 degrees of freedom, from a table
)
def test_a_band_is_what_the_table_says_of_the_spread(tmp_path: Path, band: Band, half: float) -> None:
    made = seeds_of_sage(tmp_path, 0.02, 0.04, 0.03)  # deviation 0.01
    made[2].steps.pop()  # the curve ends where the shortest run does
    group = group_of(*made)
    curve = curves.average_curve(group, lambda run: curves.over_steps(run, "density"), band)
    assert [step for step, *_ in curve] == [0, 1, 2]
    assert curve[2] == pytest.approx((2, 0.03, 0.03 - half, 0.03 + half), rel=1e-12)
    figure = draw_one(section_of(*made), band)
    assert BANDS[band] in " ".join(figure.legends[0].get_title().get_text().split())
    text = formats.to_terminal(tables.build_sheets(section_of(*made), None, band), 80)
    assert BANDS[band] in text
    # of the means 0.015, 0.025 and 0.02 the deviation is 0.005
    assert f"0.0200 ±{format_number(half / 2, 2)}" in text


def test_a_single_seed_has_no_band_and_no_caption(tmp_path: Path) -> None:
    made = seeds_of_sage(tmp_path, 0.02, 0.04, 0.03)
    figure = draw_one(section_of(*made))
    axes = figure.axes[3]
    assert len(axes.collections) == 1
    assert axes.get_lines()[0].get_label() == "sage (3 seeds)"
    alone = draw_one(section_of(made[0]))
    assert not alone.axes[3].collections
    assert alone.legends[0].get_title().get_text() == ""


@pytest.mark.parametrize(("payload", "scale"), [(5e4, "log"), (2e5, "linear"), (0.0, "linear")])
def test_bytes_have_a_log_axis_where_they_differ_by_more_than_twenty(
    tmp_path: Path, payload: float, scale: str
) -> None:
    exact = write_run(tmp_path / "exact", "exact", lines_of([1.0], 1.001e6, EXACT_SECONDS))
    other = write_run(tmp_path / "other", "topk", lines_of([0.1], payload, SAGE_SECONDS))
    assert draw_one(section_of(exact, other)).axes[1].get_xscale() == scale


def test_forty_configurations_are_five_pictures_of_eight(tmp_path: Path) -> None:
    settings = [{"name": "topk", "density": i / 100} for i in range(1, 41)]
    made = [write_run(tmp_path / str(i), reducer, SAGE) for i, reducer in enumerate(settings)]
    divided = pictures.pages(section_of(*made))
    assert [len(page.groups) for page in divided] == [8] * 5
    drawn = figures.draw(divided[1])
    assert len(drawn.axes[0].get_lines()) == 8
    assert drawn.get_suptitle() == "digits, world size 2, configurations 9 to 16 of 40"
    assert [len(page.groups) for page in pictures.pages(section_of(*made[:9]))] == [5, 4]


def test_of_very_many_configurations_there_are_twelve_pictures_whose_bars_have_names_apart() -> None:
    group = Group([Run(Path(), {"reducer.name": "topk"}, "", [], [], {}, False, "", False)], "topk", None)
    pages = pictures.pages(Section("", [group] * 300))
    assert [len(page.groups) for page in pages] == [25] * 12
    drawn = figures.draw(pages[0])
    drawn.canvas.draw()
    names = [label.get_window_extent() for label in drawn.axes[-1].get_yticklabels()]
    assert len(names) == 25
    assert not any(one.overlaps(other) for one, other in pairwise(names))


def test_a_bar_is_as_long_as_a_step_and_stacked_from_its_phases(folder: Path) -> None:
    axes = draw_one(section_in(folder)).axes[5]
    bars = [container.patches for container in axes.containers]
    widths = [[bar.get_width() for bar in phase] for phase in bars]
    # Milliseconds from seconds: a few roundings of 2^-53 each.
    expected = [[1, 1], [2, 2], [4, 4], [1, 1], [2, 3], [8, 2]]
    assert widths == [pytest.approx(pair, rel=1e-14) for pair in expected]
    assert [bar.get_x() for bar in bars[-1]] == pytest.approx([10, 11], rel=1e-14)
    assert [text.get_text() for text in axes.texts] == [" 18.0", " 13.0"]


def test_lines_and_bars_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    settings = [{"name": "topk", "density": i / 100} for i in range(pictures.MOST_PER_PICTURE)]
    made = [write_run(tmp_path / str(i), reducer, SAGE) for i, reducer in enumerate(settings)]
    figure = draw_one(section_of(*made))
    lines = figure.axes[0].get_lines()
    assert {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines} == {
        tuple(vars(look_of("topk")).values())
    }
    apart = {(line.get_fillstyle(), line.get_linewidth()) for line in lines}
    assert len(apart) == pictures.MOST_PER_PICTURE
    bars = [container.patches[0] for container in figure.axes[5].containers]
    assert len({(bar.get_hatch(), round(sum(bar.get_facecolor()[:3]), 1)) for bar in bars}) == 6
    assert len(set(FILLS.values())) == len(FILLS)


def test_nothing_is_clipped_and_no_legend_lies_on_data(tmp_path: Path) -> None:
    long = [{"name": "a_reducer_with_a_long_name", "exchange": "g" * length} for length in range(9, 17)]
    made = [write_run(tmp_path / str(i), reducer, SAGE, done=i > 2) for i, reducer in enumerate(long)]
    (figure := draw_one(section_of(*made))).draw_without_rendering()
    tight, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(tight.x0, tight.y0, width - tight.x1, height - tight.y1) >= 0
    legends = [legend.get_window_extent() for legend in (*figure.legends, figure.axes[5].get_legend())]
    assert not any(axes.get_window_extent().overlaps(box) for axes in figure.axes for box in legends)


def test_the_density_panel_shows_the_target_too_and_steps_are_whole_numbers(tmp_path: Path) -> None:
    lines = lines_of([0.05, 0.04], 2e4, SAGE_SECONDS, target_density=0.01)
    section = section_of(write_run(tmp_path / "far", "sage", lines))
    drawn = figures.draw(pictures.pages(section)[0])
    density = drawn.axes[list(curves.TITLES).index("density")]
    low, high = density.get_ylim()
    assert low < 0.01 < 0.05 < high
    ticks = [tick for axes in (drawn.axes[0], density) for tick in axes.get_xticks()]
    assert len(ticks) > 3
    assert all(tick == round(tick) for tick in ticks)
    # the page's axis is not narrowed to the densities, so that it holds all that is drawn
    assert "range" not in plots.curves_plot(section, "std")["layout"]["yaxis4"]


def test_a_density_of_zero_is_a_gap_and_a_panel_without_values_says_so(tmp_path: Path) -> None:
    lines = lines_of([0.0], 1.0, SAGE_SECONDS)
    made = [write_run(tmp_path / str(seed), "sage", lines, seed) for seed in (1, 2)]
    made.append(write_run(tmp_path / "nothing", "topk", [], done=False))
    (figure := draw_one(section_of(*made))).draw_without_rendering()  # a warning would be an error
    assert [math.isnan(density) for _, density in points(figure.axes[3].get_lines()[0])] == [True, True]
    assert [text.get_text() for text in figure.axes[4].texts] == ["none of the runs has one"]


def test_a_single_panel_is_one_picture_of_the_kind_that_its_name_says(folder: Path) -> None:
    heads = {"pdf": b"%PDF-", "svg": b"<?xml", "png": b"\x89PNG"}
    for kind, head in heads.items():
        output = folder.parent / f"paper/x.{kind}"
        for _ in range(2):  # the same bytes in every run
            before = output.read_bytes() if output.exists() else None
            assert report.main([str(folder), "--output", str(output), "--panel", "density"]) == 0
        assert output.read_bytes() == before
        assert output.read_bytes().startswith(head)
    (page,) = pictures.pages(section_in(folder))
    assert [axes.get_ylabel() for axes in figures.draw_single(page, "bytes").axes] == ["accuracy (fraction)"]


def test_pictures_are_named_for_the_task_and_the_panel(tmp_path: Path) -> None:
    write_run(tmp_path / "runs/0", "sage", SAGE)
    write_run(tmp_path / "runs/1", "sage", SAGE, name="own.task:Task", size=16)
    arguments = [str(tmp_path / "runs"), "--panel", "epochs", "--panel", "time"]
    assert report.main([*arguments, "--output", str(tmp_path / "x.svg")]) == 0
    names = [
        f"x-{task}-{panel}.svg"
        for task in ("digits-2workers", "own.task-Task-16workers")
        for panel in ("epochs", "time")
    ]
    assert sorted(path.name for path in tmp_path.glob("*.svg")) == names


def test_many_pictures_are_drawn_by_several_processes_and_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    panels = [word for name in curves.TITLES for word in ("--panel", name)]
    assert len(curves.TITLES) > pictures.MOST_IN_ONE_PROCESS
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert report.main([str(folder), *panels, "--output", str(folder.parent / "many/x.svg")]) == 0
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert report.main([str(folder), *panels, "--output", str(folder.parent / "one/x.svg")]) == 0
    many, one = (
        {path.name: path.read_bytes() for path in (folder.parent / where).glob("*.svg")}
        for where in ("many", "one")
    )
    assert many == one
    assert len(one) == len(curves.TITLES)


def test_a_picture_of_an_unknown_kind_is_refused(folder: Path, capsys: Capture) -> None:
    for name in ("x.jpg", "x"):
        with pytest.raises(SystemExit) as left:
            report.main([str(folder), "--output", name])
        assert left.value.code == 2
        assert f"--output {name}: expected a name that ends in .png, .pdf, .svg" in capsys.readouterr().err


# --- the command ----------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_files_whose_paths_are_last(folder: Path) -> None:
    command = [sys.executable, "-m", "sage.report", "runs/sage", "runs/a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder.parent, env=environment, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, markdown, table, latex, png = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if line.startswith((" exact", " sage"))]
    # exact first, whatever the order given; of the comparison with it sage alone is a row
    assert [row[0] for row in rows] == ["exact", "sage", "sage", *["exact", "sage"] * 2]
    assert [row[-1] for row in rows[:5]] == ["0.8125", "0.8125", "-", "1.00x", "less"]
    assert [row[5] for row in rows[5:]] == ["1.00x", "1.38x"]
    picture = "report-digits-2workers.png"
    assert [Path(path) for path in (markdown, table, latex, png)] == [
        folder.resolve() / name for name in ("report.md", "report.csv", "report.tex", picture)
    ]
    assert imread(png).shape[1] == 1430  # 13 inches of 110 pixels
    assert f"![digits, world size 2]({picture})" in Path(markdown).read_text()
    assert rf"\includegraphics[width=\linewidth]{{{picture}}}" in Path(latex).read_text()
    names = ["a", picture, "report.csv", "report.md", "report.tex", "sage"]
    assert sorted(path.name for path in folder.iterdir()) == names


def test_a_reader_who_leaves_early_breaks_nothing(folder: Path) -> None:
    command = f"set -o pipefail; {sys.executable} -m sage.report {folder} | true"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, text=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "report-digits-2workers.png").exists()


@pytest.mark.parametrize(
    ("given", "here", "output"),
    [
        (["runs/a"], "", "runs/a/report.png"),
        (["runs/a", "runs/sage"], "", "runs/report.png"),
        (["runs/a", "runs/sage"], "elsewhere", "elsewhere/report.png"),  # not into a folder above
    ],
)
def test_where_a_report_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], here: str, output: str
) -> None:
    (tmp_path / here).mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / here)
    assert report.default_output([tmp_path / path for path in given]) == tmp_path / output


SWEEP = "base: base.yaml\ngrid: {reducer.name: [exact, sage]}\nseeds: [1, 2]\n"


def test_a_sweeps_missing_points_are_named_and_of_a_point_the_newest_finished_run_counts(
    tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "four.yaml").write_text(SWEEP)
    home = tmp_path / "runs"
    folders = [home / point.folder for point in read(tmp_path / "four.yaml")]
    write_run(folders[0] / "old", "exact", EXACT[:3])
    write_run(folders[0] / "new", "exact", EXACT)
    write_run(folders[0] / "cut", "exact", EXACT[:1], done=False)
    for i, name in enumerate(("old", "new", "cut")):
        os.utime(folders[0] / name / "metrics.jsonl", (i, i))
    write_run(folders[1] / "run", "sage", SAGE)
    write_run(folders[2] / "run", "exact", EXACT[:2], seed=2, done=False)
    assert report.main(["--sweep", str(tmp_path / "four.yaml"), "--runs", str(home)]) == 0
    lines = capsys.readouterr().out.splitlines()
    base = tmp_path / "base.yaml"
    assert lines[-6:-4] == [
        f"missing: point 2 (unfinished, at epoch 0, step 1): {base} reducer.name=exact seed=2",
        f"missing: point 3 (not started): {base} reducer.name=sage seed=2",
    ]
    assert lines[-1] == str(home / "four" / "report-digits-2workers.png")
    sent = [line.split() for line in lines if line.startswith((" exact", " sage"))][3:5]
    assert sent[0][1:] == ["1.00", "0.0150", "4.000", "1.00x"]  # MB: of the new run's two epochs
    assert sent[1][-3:] == ["0.08000", "50.0x", "less"]
    assert "missing: point 3" in (home / "four" / "report.md").read_text()


def test_a_sweep_without_a_finished_run_is_an_error_of_one_line(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "four.yaml").write_text(SWEEP)
    assert report.main(["--sweep", str(tmp_path / "four.yaml"), "--runs", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"report: {tmp_path / 'four'}: no finished run")


@pytest.mark.parametrize("arguments", [[], ["runs", "--sweep", "x.yaml"]])
def test_runs_or_a_sweep_are_expected_and_not_both(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        report.main(arguments)
    assert left.value.code == 2
    assert "expected RUNs, or --sweep FILE" in capsys.readouterr().err


def test_it_answers_at_once_and_imports_what_draws_and_prints_when_it_does() -> None:
    code = (
        "import sys, sage.report.__main__; print({'torch', 'matplotlib', 'numpy', 'rich'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert (done.stdout, done.stderr) == ("set()\n", "")


def test_a_line_cut_off_at_the_end_is_ignored_with_a_note(folder: Path, capsys: Capture) -> None:
    metrics, output = folder / "sage/metrics.jsonl", folder / "x.png"
    whole = runs.read_run(metrics.parent)
    metrics.write_bytes(metrics.read_bytes() + json.dumps(SAGE[0]).encode()[:-20])
    cut = runs.read_run(metrics.parent)
    assert (cut.steps, cut.epochs) == (whole.steps, whole.epochs)
    assert report.main([str(folder), "--output", str(output)]) == 0
    note = f"{metrics.resolve()}: the last line was cut off and is ignored"
    paths = [str(output.with_suffix(kind)) for kind in (".md", ".csv", ".tex", ".png")]
    assert capsys.readouterr().out.splitlines()[-5:] == [note, *paths]


BAD_LINES = ['{"kind": "step", "epo', "", "[1]", '{"kind": "other", "epoch": 0, "step": 0}']
BAD_LINES += ['{"kind": "step", "epoch": 0, "step": "one"}', json.dumps({**SAGE[2], "bytes": {}})]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        *(("metrics.jsonl", f"{json.dumps(SAGE[0])}\n{bad}\n", "line 2: expected") for bad in BAD_LINES),
        ("config.yaml", "[1]", "expected a run's resolved configuration"),
        ("config.yaml", "{a: ", "not valid YAML"),
        ("config.yaml", None, "No such file"),
        ("environment.json", "{}", "expected a JSON object with world_size"),
        ("summary.json", "{", "expected a JSON object with score.last"),
    ],
)
def test_a_file_that_no_run_writes_is_an_error_of_one_line(
    folder: Path, capsys: Capture, name: str, content: str | None, expected: str
) -> None:
    path = folder / "sage" / name
    path.unlink() if content is None else path.write_text(content)
    assert report.main([str(folder)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert str(path.resolve()) in message
    assert expected in message


def test_a_folder_without_a_run_is_an_error_of_one_line(tmp_path: Path, capsys: Capture) -> None:
    for path, problem in ((tmp_path, "no metrics.jsonl in it"), (tmp_path / "no", "no such folder")):
        assert report.main([str(path)]) == 2
        expected = f"report: {path}: {problem}; expected a run's folder, or one that holds runs\n"
        assert capsys.readouterr().err == expected


def test_a_picture_that_cannot_be_written_is_an_error_of_one_line(folder: Path, capsys: Capture) -> None:
    file = folder / "sage/config.yaml"
    assert report.main([str(folder), "--output", str(file / "x.png")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert str(file) in message


def test_a_text_where_a_number_belongs_is_an_error_of_one_line(folder: Path, capsys: Capture) -> None:
    path = next(folder.rglob("metrics.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text(
        "\n".join([json.dumps({**json.loads(lines[0]), "density": {"mean": "x"}}), *lines[1:], ""])
    )
    assert report.main([str(folder)]) == 2
    assert capsys.readouterr().err == f"report: {path}: line 1: density.mean: expected a number, got 'x'\n"

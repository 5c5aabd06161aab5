"""The report: numbers worked by hand, what its tables and its picture show, what it refuses."""

import json
import math
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from matplotlib.image import imread
from matplotlib.lines import Line2D
from rich.console import Console

from sage import report

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
        lines.append({**line, "density": {"mean": density}, "bytes": {"payload": 2 * payload}})
    return lines


EXACT = lines_of([1.0, 1.0], 1e6, EXACT_SECONDS)
SAGE = lines_of([0.0102, 0.01], 2e4, SAGE_SECONDS, target_density=0.01, threshold=0.5)


def write_run(
    folder: Path, reducer: Any, lines: Lines, seed: int = 1, size: int = 2, done: bool = True, **task: Any
) -> report.Run:
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
    return report.read_run(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/a/exact", "exact", EXACT)
    write_run(tmp_path / "runs/sage", "sage", SAGE)
    return tmp_path / "runs"


def runs_in(folder: Path) -> list[report.Run]:
    return [report.read_run(path) for path in report.find_runs([folder])]


def text_in_80_columns(runs: list[report.Run]) -> str:
    file = StringIO()
    Console(width=80, markup=False, highlight=False, file=file).print(*report.build_tables(runs))
    return file.getvalue()


def test_a_simulations_time_in_collectives_is_not_told(folder: Path) -> None:
    (folder / "sage/environment.json").write_text('{"world_size": 2, "simulated": true}')
    exact, sage = runs_in(folder)
    assert sage.place == "digits, world size 2, simulated"
    assert report.time_row(sage, exact) == ["8.00", "3.00", "-", "-", "-"]
    assert report.phases(sage)["communication"] == 0
    assert report.phases(exact)["communication"] == 8
    assert report.exact_for(sage, [exact, sage]) is None
    told = "simulated: one worker's times"
    assert told in text_in_80_columns([exact, sage])
    assert told not in text_in_80_columns([exact])


def test_the_rows_hold_the_numbers_worked_by_hand(folder: Path) -> None:
    exact, sage = runs_in(folder)
    # (0.0102 + 0.01) / 2; 4 steps of 20 kB; 1 MB a step over 20 kB; 18 ms over 13 ms
    expected = "0.7500, 0.8125, 0.0101 / 0.01, 0.0150, 0.08000, 50.0x less"
    assert ", ".join(report.results_row(sage, exact)) == expected
    assert report.results_row(exact, exact)[2:] == ["1.00", "0.0150", "4.000", "1.00x"]
    assert report.time_row(sage, exact) == ["8.00", "3.00", "2.00", "13.0", "1.38x"]
    assert report.time_row(exact, exact) == ["8.00", "2.00", "8.00", "18.0", "1.00x"]


def test_bytes_are_compared_per_step_whatever_the_number_of_steps(tmp_path: Path) -> None:
    exact = write_run(tmp_path / "exact", "exact", EXACT)
    longer = write_run(tmp_path / "longer", "x", lines_of([0.5] * 4, 4e6, SAGE_SECONDS))
    assert report.results_row(longer, exact)[4:] == ["32.00", "4.00x more"]


def test_a_lone_worker_sends_and_communicates_nothing(tmp_path: Path) -> None:
    lines = lines_of([1.0], 0.0, {**SECONDS, "reduce": 0.010})
    run = write_run(tmp_path / "run", "exact", lines, size=1)
    assert report.results_row(run, run)[4:] == ["0.000", "-"]
    assert report.time_row(run, run)[1:4] == ["5.00", "0.00", "13.0"]


@pytest.mark.parametrize("other", [{"size": 4}, {"name": "cnn"}, {"batch_per_worker": 64}, {"done": False}])
def test_only_a_finished_exact_run_of_the_same_task_and_world_size_is_compared_with(
    tmp_path: Path, other: dict[str, Any]
) -> None:
    sage = write_run(tmp_path / "sage", "sage", SAGE)
    apart = write_run(tmp_path / "apart", "exact", EXACT, **other)
    alike = write_run(tmp_path / "alike", "exact", EXACT, seed=2)
    assert report.exact_for(sage, [sage, apart]) is None
    assert report.exact_for(sage, [sage, apart, alike]) is alike
    assert report.results_row(sage, None)[-1] == report.time_row(sage, None)[-1] == "-"


def test_of_lines_about_one_step_or_epoch_the_last_counts(tmp_path: Path) -> None:
    stale = lines_of([0.9, 0.9], 7e6, EXACT_SECONDS)[:5]  # the first epoch and two steps, then resumed
    resumed = write_run(tmp_path / "resumed", "sage", stale + SAGE)
    whole = write_run(tmp_path / "whole", "sage", SAGE)
    assert (resumed.steps, resumed.epochs) == (whole.steps, whole.epochs)


def test_runs_of_one_reducer_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    thin, wide = {"name": "topk", "density": 0.001}, {"name": "topk", "density": 0.01}
    cases = [("sage", 7), (thin, 1), (wide, 1), (wide, 2), (wide, 2)]
    runs = [write_run(tmp_path / str(i), reducer, SAGE, seed) for i, (reducer, seed) in enumerate(cases)]
    last = ["topk density=0.01 seed=2 run=3", "topk density=0.01 seed=2 run=4"]
    assert report.label_runs(runs) == ["sage", "topk density=0.001", "topk density=0.01 seed=1", *last]


def test_names_say_task_and_world_size_where_these_differ(tmp_path: Path) -> None:
    here = write_run(tmp_path / "0", "sage", SAGE)
    there = write_run(tmp_path / "1", "topk", SAGE, name="cnn", size=4)
    assert report.label_runs([here, there]) == ["sage (digits, world size 2)", "topk (cnn, world size 4)"]


def test_every_folder_with_metrics_is_found_once_at_any_depth(folder: Path) -> None:
    found = [(folder / "a/exact").resolve(), (folder / "sage").resolve()]
    assert report.find_runs([folder, folder / "sage", folder / "a"]) == found


def test_the_tables_fit_80_columns_and_cut_nothing(tmp_path: Path) -> None:
    exact = write_run(tmp_path / "0", "exact", lines_of([1.0], 123.4e9, EXACT_SECONDS))
    ranks = [write_run(tmp_path / f"{n}", {"name": "powersgd", "matrix_rank": n}, SAGE) for n in (4, 8)]
    runs = [exact, *ranks, write_run(tmp_path / "3", "threshold", SAGE[:2], done=False)]
    text = text_in_80_columns(runs)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "246,800" in text.split()  # MB: two steps
    for run in runs:
        assert all(cell in text for cell in report.results_row(run, exact) + report.time_row(run, exact))


def test_an_unfinished_run_is_listed_with_how_far_it_came(tmp_path: Path) -> None:
    run = write_run(tmp_path / "0", "sage", SAGE[:5], done=False)
    assert "sage (unfinished)" in text_in_80_columns([run])
    assert "at epoch 1, step 3" in text_in_80_columns([run])
    assert report.results_row(run, None) == ["0.5000", "-", "0.0102 / 0.01", "-", "0.04000", "-"]
    assert report.time_row(run, None) == ["8.00", "3.00", "2.00", "13.0", "-"]
    nothing = write_run(tmp_path / "1", "sage", [], done=False)
    assert "at epoch -, step -" in text_in_80_columns([nothing])
    assert report.results_row(nothing, None) == ["-", "-", "-", "-", "0.000", "-"]


def test_every_axis_has_a_label_with_a_unit(folder: Path) -> None:
    scores, densities, thresholds, times = report.draw(runs_in(folder)).axes
    assert [scores.get_xlabel(), scores.get_ylabel()] == ["training (epochs)", "accuracy (fraction)"]
    assert [densities.get_xlabel(), densities.get_ylabel()] == ["training (steps)", "density (fraction)"]
    assert [thresholds.get_xlabel(), thresholds.get_ylabel()] == [
        "training (steps)",
        "threshold (|gradient|)",
    ]
    assert [times.get_xlabel(), times.get_ylabel()] == ["time per step (ms)", "run (reducer)"]


def points(line: Line2D) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]


def test_the_curves_are_the_files_numbers(folder: Path) -> None:
    scores, densities, thresholds, _ = report.draw(runs_in(folder)).axes
    assert [points(line) for line in scores.get_lines()] == [[(1, 0.5), (2, 0.75)]] * 2
    target, exact, sage = densities.get_lines()
    assert points(target) == [(step, 0.01) for step in range(4)]
    assert points(exact) == []  # 1 throughout would leave no room for the others
    assert points(sage) == [(0, 0.0102), (1, 0.0102), (2, 0.01), (3, 0.01)]
    assert [points(line) for line in thresholds.get_lines()] == [[], [(step, 0.5) for step in range(4)]]
    assert {axes.get_yscale() for axes in (densities, thresholds)} == {"log"}


def test_a_bar_is_as_long_as_a_step_and_stacked_from_its_phases(folder: Path) -> None:
    axes = report.draw(runs_in(folder)).axes[3]
    bars = [container.patches for container in axes.containers]
    widths = [[bar.get_width() for bar in phase] for phase in bars]
    # Milliseconds from seconds: a few roundings of 2^-53 each.
    expected = [[1, 1], [2, 2], [4, 4], [1, 1], [2, 3], [8, 2]]
    assert widths == [pytest.approx(pair, rel=1e-14) for pair in expected]
    assert [bar.get_x() for bar in bars[-1]] == pytest.approx([10, 11], rel=1e-14)
    assert [text.get_text() for text in axes.texts] == [" 18.0", " 13.0"]


def test_lines_and_bars_can_be_told_apart_without_colour(tmp_path: Path) -> None:
    figure = report.draw([write_run(tmp_path / str(seed), "sage", SAGE, seed) for seed in range(20)])
    assert len({(x.get_linestyle(), x.get_marker()) for x in figure.axes[0].get_lines()}) == 20
    bars = [container.patches[0] for container in figure.axes[3].containers]
    assert len({(bar.get_hatch(), round(sum(bar.get_facecolor()[:3]), 1)) for bar in bars}) == 6


def test_nothing_is_clipped_and_no_legend_lies_on_data(tmp_path: Path) -> None:
    long = [{"name": "a_reducer_with_a_long_name", "exchange": "g" * length} for length in range(9, 18)]
    runs = [write_run(tmp_path / str(i), reducer, SAGE, done=i > 2) for i, reducer in enumerate(long)]
    (figure := report.draw(runs)).draw_without_rendering()
    tight, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(tight.x0, tight.y0, width - tight.x1, height - tight.y1) >= 0
    legends = [legend.get_window_extent() for legend in (*figure.legends, figure.axes[3].get_legend())]
    assert not any(axes.get_window_extent().overlaps(box) for axes in figure.axes for box in legends)


def test_a_density_of_zero_is_a_gap_and_a_panel_without_values_says_so(tmp_path: Path) -> None:
    lines = lines_of([0.0], 1.0, SAGE_SECONDS)
    runs = [write_run(tmp_path / "0", "sage", lines), write_run(tmp_path / "1", "topk", [], done=False)]
    (figure := report.draw(runs)).draw_without_rendering()  # a warning would be an error
    assert [math.isnan(density) for _, density in points(figure.axes[1].get_lines()[0])] == [True, True]
    assert [text.get_text() for text in figure.axes[2].texts] == ["none of the runs has one"]


def test_the_command_prints_tables_and_writes_a_whole_png_whose_path_is_last(folder: Path) -> None:
    command = [sys.executable, "-m", "sage.report", "runs/sage", "runs/a"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    output = subprocess.check_output(command, cwd=folder.parent, env=environment, text=True)
    *lines, png = output.splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if line.startswith((" exact", " sage"))]
    assert [row[0] for row in rows] == ["exact", "sage"] * 2  # exact first, whatever the order given
    assert [row[-1] for row in rows] == ["1.00x", "less", "1.00x", "1.38x"]
    assert png == str(folder.resolve() / "report.png")
    assert imread(png).shape[:2] == (1105, 1560)  # 12 x 8.5 inches of 130 pixels
    assert sorted(path.name for path in folder.iterdir()) == ["a", "report.png", "sage"]


def test_it_starts_without_torch() -> None:
    code = "import sys, sage.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_line_cut_off_at_the_end_is_ignored_with_a_note(folder: Path, capsys: Capture) -> None:
    metrics, output = folder / "sage/metrics.jsonl", folder / "x.png"
    whole = report.read_run(metrics.parent)
    metrics.write_bytes(metrics.read_bytes() + json.dumps(SAGE[0]).encode()[:-20])
    cut = report.read_run(metrics.parent)
    assert (cut.steps, cut.epochs) == (whole.steps, whole.epochs)
    assert report.main([str(folder), "--output", str(output)]) == 0
    note = f"{metrics.resolve()}: the last line was cut off, and is ignored"
    assert capsys.readouterr().out.splitlines()[-2:] == [note, str(output)]


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
    assert report.main([str(folder), "--output", str(folder / "no/x.png")]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert str(folder / "no") in message

"""Compares runs by the files in their folders: tables on the terminal, in Markdown and CSV, and pictures.

Imports matplotlib only when it draws: --help and a wrong argument are answered at once.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from sage import files
from sage.config import ConfigError
from sage.console import complain, show
from sage.report.formats import to_csv, to_markdown, to_terminal
from sage.report.groups import Section, gather
from sage.report.runs import ReportError, Run, find_runs, read_run
from sage.report.tables import Sheet, build_sheets
from sage.sweep import Point, read

HELP = """\
Compare runs by the files in their folders alone. Each configuration is a row, with mean and standard
deviation over its seeds. The report is printed, and written to FILE.md, FILE.csv and FILE.png (more pictures:
FILE-2.png, ...).

  python -m sage.report runs/digits                     a folder of runs, or several, or single runs
  python -m sage.report --sweep configs/sweeps/X.yaml   the points of a sweep; says which are missing
"""


def find_finished(points: Sequence[Point], runs: Path) -> tuple[list[Path], list[str]]:
    """Find the newest finished run of each point; write a line for each point that has none."""
    found, missing = [], []
    for point in points:
        metrics = sorted((runs / point.folder).glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
        folders = [path.parent for path in metrics]
        done = [folder for folder in folders if (folder / "summary.json").exists()]
        if done:
            found.append(done[-1])
        else:
            state = f"unfinished, {read_run(folders[-1]).progress}" if folders else "not started"
            missing.append(f"missing: point {point.index} ({state}): {point}")
    return found, missing


def find_folders(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """Find the runs to report; write a line for each point of a sweep that has no finished run."""
    if not options.sweep:
        return find_runs(options.runs), []
    folders, missing = find_finished(read(options.sweep), options.runs_folder)
    if not folders:
        raise ReportError(
            f"{sweep_folder(options.runs_folder, options.sweep)}: no finished run of {options.sweep} in it"
        )
    return folders, missing


def sweep_folder(home: Path, sweep: Path) -> Path:
    """The folder that holds the runs of a sweep's points."""
    return home / sweep.stem


def default_output(runs: Sequence[Path]) -> Path:
    """report.png in the only folder given, or in the common parent of several.

    Where that parent is not the current folder or below it, report.png is in the current folder.
    """
    if len(runs) == 1:
        return runs[0] / "report.png"
    here = Path.cwd()
    parent = Path(os.path.commonpath([path.resolve() for path in runs]))
    return (parent if parent.is_relative_to(here) else here) / "report.png"


def common_target(runs: Sequence[Run]) -> float | None:
    """The score at which every run was to stop; None where they differ."""
    targets = {run.config.get("stop_at_score") for run in runs}
    return targets.pop() if len(targets) == 1 else None


def write_report(
    output: Path,
    sections: Sequence[Section],
    sheets: Sequence[Sheet],
    notes: Sequence[str],
    target: float | None,
) -> list[Path]:
    """Write the report's files; returns their paths, the first picture last."""
    from sage.report.figures import draw, to_png

    figures = [figure for section in sections for figure in draw(section)]
    pictures = [output, *(output.with_stem(f"{output.stem}-{i}") for i in range(2, len(figures) + 1))]
    for path, figure in zip(pictures, figures, strict=True):
        files.write_bytes(path, to_png(figure))
    text = [
        *map(to_markdown, sheets),
        *(f"- {note}" for note in notes),
        *(f"![]({path.name})" for path in pictures),
    ]
    files.write_text(output.with_suffix(".md"), "\n".join(text) + "\n")
    files.write_text(output.with_suffix(".csv"), to_csv(sections, target))
    return [output.with_suffix(".md"), output.with_suffix(".csv"), *reversed(pictures)]


def terminal_width() -> int:
    """The columns of the terminal, 80 or more; 100 where there is none."""
    return max(80, shutil.get_terminal_size().columns) if sys.stdout.isatty() else 100


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m sage.report", description=HELP, formatter_class=formatter
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="*", type=Path, help="a run, or a folder of runs")
    add("--sweep", metavar="FILE", type=Path, help="report the points of this sweep instead")
    add(
        "--runs",
        metavar="DIR",
        type=Path,
        dest="runs_folder",
        default=Path("runs"),
        help="with --sweep: the folder of all runs (default: runs)",
    )
    add(
        "--target",
        metavar="SCORE",
        type=float,
        help="also report what it took to reach this score (default: the runs' stop_at_score)",
    )
    where = "in their common parent where that is inside the current folder, else in the current folder"
    default = f"report.png in RUN; for several, {where}"
    add("--output", metavar="FILE", type=Path, help=f"the first PNG to write (default: {default})")
    options = parser.parse_args(arguments)
    if bool(options.runs) == bool(options.sweep):
        parser.error("expected RUNs, or --sweep FILE")
    return options


def report(options: argparse.Namespace) -> str:
    """Write the report's files; returns what to print: the tables, notes and the files' paths."""
    folders, notes = find_folders(options)
    runs = [read_run(folder) for folder in folders]
    cut_off = [run.folder / "metrics.jsonl" for run in runs if run.cut_off]
    notes += [f"{path}: the last line was cut off and is ignored" for path in cut_off]
    notes += [f"{run.folder / 'metrics.jsonl'}: {run.gap}: totals are too small" for run in runs if run.gap]

    target = common_target(runs) if options.target is None else options.target
    sections = gather(runs)
    sheets = [sheet for section in sections for sheet in build_sheets(section, target)]
    given = [sweep_folder(options.runs_folder, options.sweep)] if options.sweep else options.runs
    output = options.output or default_output(given)
    paths = write_report(output, sections, sheets, notes, target)
    return to_terminal(sheets, terminal_width()) + "\n".join([*notes, *map(str, paths)])


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return show(report(options))
    except (ReportError, ConfigError, OSError) as error:
        return complain(str(error), program="report")


if __name__ == "__main__":
    sys.exit(main())

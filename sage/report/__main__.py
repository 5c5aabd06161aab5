"""Compares runs by the files in their folders: tables on the terminal, in Markdown and CSV, and pictures.

Imports matplotlib only when it draws: --help and a wrong argument are answered at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sage.config import ConfigError
from sage.console import complain, show, terminal_width
from sage.network import LATENCY_SECONDS, Link, parse_seconds, parse_speed
from sage.report.advice import Network, advice_sheets, advise
from sage.report.curves import TITLES
from sage.report.formats import to_terminal
from sage.report.groups import Section, find_baseline, gather
from sage.report.output import Chapter, Content, Output, write_report
from sage.report.pictures import KINDS
from sage.report.published import published_sheet
from sage.report.runs import ReportError, Run, find_runs, read_run
from sage.report.spread import BANDS
from sage.report.tables import build_sheets
from sage.report.webpage import check_packages, write_page
from sage.sweep import Point, read

HELP = """\
Compare runs by the files in their folders alone. Each configuration is a row,
with mean and spread over its seeds. The report is printed, and written to
report.md, .csv and .tex, with pictures whose names say the task.

  python -m sage.report runs/digits     a folder of runs, or several, or runs
  python -m sage.report --sweep FILE    a sweep's points; says which are missing
  python -m sage.report runs/digits --panel epochs --output paper/curves.pdf
  python -m sage.report runs/digits --link 1gbit --workers 16
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


def check_baseline(name: str, sections: Sequence[Section]) -> None:
    """Raise ReportError where no finished configuration has this name or reducer."""
    groups = [group for section in sections for group in section.groups if group.done]
    if not any(find_baseline(group, [group], name) for group in groups):
        known = ", ".join(dict.fromkeys(group.short_label for group in groups))
        raise ReportError(f"--baseline {name}: expected a finished configuration or reducer: {known}")


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
    add(
        "--band",
        choices=list(BANDS),
        default="std",
        help="the spread in tables and pictures: standard deviation (the default), or a 95%% interval of the "
        "mean",
    )
    add(
        "--baseline",
        metavar="NAME",
        help="the configuration or reducer that the others are compared with seed by seed (default: exact)",
    )
    add(
        "--panel",
        metavar="NAME",
        action="append",
        choices=list(TITLES),
        help=f"a picture of this panel alone, of a column's size; may be repeated: {', '.join(TITLES)}",
    )
    where = "in their common parent where that is inside the current folder, else in the current folder"
    add(
        "--output",
        metavar="FILE",
        type=Path,
        help="the pictures' name and kind, .png, .pdf or .svg "
        f"(default: report.png in RUN; for several, {where})",
    )
    add(
        "--html",
        metavar="FILE",
        type=Path,
        help="also one page that needs no network: tables that sort and filter, plots with hover, what "
        "differs between two runs",
    )
    _add_network(parser)
    options = parser.parse_args(arguments)
    if bool(options.runs) == bool(options.sweep):
        parser.error("expected RUNs, or --sweep FILE")
    if options.output and options.output.suffix not in KINDS:
        parser.error(f"--output {options.output}: expected a name that ends in {', '.join(KINDS)}")
    if options.html and options.html.suffix != ".html":
        parser.error(f"--html {options.html}: expected a name that ends in .html")
    if options.link is None and (options.latency, options.workers, options.compute_ms) != (None, None, None):
        parser.error("--latency, --workers and --compute-ms belong to a network: expected --link SPEED, too")
    return options


def _add_network(parser: argparse.ArgumentParser) -> None:
    """Add the options of a prediction."""
    group = parser.add_argument_group("would it pay on another network? (predictions from the runs)")
    add = group.add_argument
    add("--link", metavar="SPEED", type=_quantity(parse_speed), help="its speed, as in 1gbit")
    add(
        "--latency",
        metavar="TIME",
        type=_quantity(parse_seconds),
        help="of a message between two workers (default: 50us)",
    )
    add("--workers", metavar="W", type=_count, help="how many workers (default: as many as the runs had)")
    add(
        "--compute-ms",
        metavar="T",
        type=_positive,
        help="milliseconds that a step's data, forward, backward and optimizer take (default: as measured)",
    )


def _quantity(parse: Callable[[str], float]) -> Callable[[str], float]:
    """A function that reads an option, with an error that says what was expected."""

    def read_option(text: str) -> float:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read_option


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"expected an integer of 2 or more, got {text!r}")
    return int(text)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def network_of(options: argparse.Namespace) -> Network | None:
    """The network that is asked about; None where none is."""
    if options.link is None:
        return None
    compute = None if options.compute_ms is None else options.compute_ms / 1000
    latency = LATENCY_SECONDS if options.latency is None else options.latency
    return Network(Link(options.link, latency), options.workers, compute)


def compose(options: argparse.Namespace) -> Content:
    """Read the runs, and find what there is to say of them."""
    folders, notes = find_folders(options)
    runs = [read_run(folder) for folder in folders]
    cut_off = [run.folder / "metrics.jsonl" for run in runs if run.cut_off]
    notes += [f"{path}: the last line was cut off and is ignored" for path in cut_off]
    notes += [f"{run.folder / 'metrics.jsonl'}: {run.gap}: totals are too small" for run in runs if run.gap]

    target = common_target(runs) if options.target is None else options.target
    sections = gather(runs)
    if options.baseline is not None:
        check_baseline(options.baseline, sections)
    advice = advise(sections, network) if (network := network_of(options)) else {}
    chapters = []
    for section in sections:
        sheets = build_sheets(section, target, options.band, options.baseline)
        sheets += [sheet] if (sheet := published_sheet(section)) else []
        one = advice.get(section.workload)
        chapters.append(Chapter(section, sheets + (advice_sheets(one, target) if one else []), one))
    return Content(chapters, notes, target, options.band)


def report(options: argparse.Namespace) -> str:
    """Write the report's files; returns what to print: the tables, notes and the files' paths."""
    if options.html:
        check_packages()
    content = compose(options)
    given = [sweep_folder(options.runs_folder, options.sweep)] if options.sweep else options.runs
    output = Output(options.output or default_output(given), options.output is not None, options.panel or [])
    paths = write_report(output, content)
    paths += [write_page(options.html, content)] if options.html else []
    tables = to_terminal(content.sheets, terminal_width(otherwise=100))
    return tables + "\n".join([*content.notes, *map(str, paths)])


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        return show(report(options))
    except (ReportError, ConfigError, OSError) as error:
        return complain(str(error), program="report")


if __name__ == "__main__":
    sys.exit(main())

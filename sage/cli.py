"""The command line of run.py."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from sage import files, sweep
from sage.config import ConfigError
from sage.console import complain, show
from sage.runfolder import weights
from sage.runfolder.resume import NEWEST, run_of
from sage.runfolder.weights import SavedWeights
from sage.workers.points import PointRunner

HELP = """\
Train a task with a gradient compressor, as a YAML file describes it.

  python run.py configs/digits.yaml                  one worker
  python run.py configs/digits.yaml --workers 2      two worker processes here
  torchrun --nproc-per-node 2 run.py configs/digits.yaml   the same, torchrun's
  python run.py configs/digits.yaml --simulate 16    16 that take turns in one
  python run.py configs/digits.yaml reducer.name=topk epochs=3  two new values
  python run.py configs/digits.yaml --resume         resume its newest run
  python run.py --evaluate runs/digits/RUN           what its model scores
  python run.py --sweep configs/sweeps/reducers_digits.yaml          every point
  python run.py --sweep configs/sweeps/reducers_digits.yaml --jobs 4  4 at once

CONFIG: configs/ has a YAML file for each experiment. key.path=value changes one
of its values, in the syntax of YAML. A changed name (reducer.name=exact)
chooses another component, which takes over the keys that it knows from the
file's section. --print-config shows every setting with what it is for.

Results: a run has a folder of its own, RUNS/<config name>/<run id>/, with
config.yaml, environment.json, metrics.jsonl, checkpoints/ and, once it is done,
summary.json. `python -m sage.report RUNS` makes tables and pictures of them.

Sweeps: a sweep's file has a base (a configuration), a grid (key.path: [values])
and seeds. Each combination is a point; its runs are in RUNS/<sweep>/<point>/.
Without --list and --index all points are run, except those that are done
already or that another process is running. --jobs N runs N of them side by
side.

Stopping: Ctrl-C, SIGTERM and SIGUSR1 let a run finish its step and write a
checkpoint; a second Ctrl-C ends it at once. --resume continues from the
checkpoint, with the same bits as without the stop.

Exit codes: 0 done, or stopped by SIGTERM or SIGUSR1 with a checkpoint; 1
failed; 2 bad input, nothing was started; 130 stopped by Ctrl-C. A sweep that a
signal stops ends with 128 + the signal's number.
"""

NEED_SWEEP = {"list_points": "--list", "index": "--index", "jobs": "--jobs"}
"""Options that only a sweep has, as argparse and as the user names them."""
NEED_INDEX = {"print_config": "--print-config", "dry_run": "--dry-run"}
"""Options about one run: in a sweep, about one of its points."""
NOT_TO_EVALUATE = {"sweep": "--sweep", "resume": "--resume", "job": "--job"} | NEED_SWEEP | NEED_INDEX
"""Options that --evaluate does not go together with."""

MAX_WORKERS = 4096
"""The most workers of one machine. Its memory limits processes further."""
MAX_THREADS = 1024
"""The most threads of a worker; no machine has more cores."""


@dataclass(frozen=True)
class Arguments:
    """The command line of run.py."""

    config: Path
    """The configuration's file; with sweep, the sweep's file."""
    overrides: list[str]
    sweep: bool
    list_points: bool
    index: int | None
    """The one point of the sweep to run; None: all of them."""
    workers: int | None
    simulate: int | None
    threads: int | None
    jobs: int | None
    """How many points of the sweep run side by side; None: one."""
    data: Path | None
    runs: Path
    resume: str | None
    """The folder of a run or a checkpoint, or resume.NEWEST; None: start a new run."""
    job: Path | None
    evaluate: SavedWeights | None
    """The weights to score, instead of training."""
    print_config: bool
    dry_run: bool

    @property
    def runs_whole_sweep(self) -> bool:
        """Whether this is about all points of a sweep, not about one run."""
        return self.sweep and self.index is None


def parse(arguments: list[str]) -> Arguments:
    """The arguments of run.py. Like argparse, prints help or one line about a mistake, and exits."""
    parser = _build_parser()
    try:
        return _to_arguments(vars(parser.parse_intermixed_args(arguments)))
    except _UsageError as error:
        parser.error(str(error))


# --- the parser -----------------------------------------------------------------------------------


def _build_parser() -> "_Parser":
    parser = _Parser(
        prog="run.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python run.py CONFIG [key.path=value ...] [options]\n"
        "       python run.py --sweep FILE [key.path=value ...] [--list | --index I]\n"
        "       python run.py --evaluate PATH [options]",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG key.path=value",
        help="a YAML file (see configs/), and changes to its values",
    )
    _add_worker_options(parser.add_argument_group("workers"))
    _add_sweep_options(parser.add_argument_group("sweeps"))
    _add_folder_options(parser.add_argument_group("files and folders"))
    _add_looking_options(parser.add_argument_group("look, but do not train"))
    return parser


def _add_worker_options(group: "argparse._ArgumentGroup") -> None:
    how = group.add_mutually_exclusive_group()
    how.add_argument(
        "--workers", type=_up_to(MAX_WORKERS), metavar="N", help="start N processes on this machine"
    )
    how.add_argument(
        "--simulate",
        type=_up_to(MAX_WORKERS),
        metavar="W",
        help="let W workers take turns in one process",
    )
    group.add_argument(
        "--threads",
        type=_up_to(MAX_THREADS),
        metavar="N",
        help="threads of each worker (default: this machine's cores divided by its workers)",
    )


def _add_sweep_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--sweep", type=Path, metavar="FILE", help="run the points of a sweep (see configs/sweeps/)"
    )
    which = group.add_mutually_exclusive_group()
    which.add_argument(
        "--list", action="store_true", dest="list_points", help="list the sweep's points, then stop"
    )
    which.add_argument("--index", type=_not_negative, metavar="I", help="run only the sweep's point I")
    group.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="run N points side by side on this machine (default: 1), each with its share of the cores and "
        "GPUs; their output goes to output.log in each point's folder",
    )


def _add_folder_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--data", type=Path, metavar="DIR", help="the prepared data sets (default: $SAGE_DATA, else ./data)"
    )
    group.add_argument(
        "--runs", type=Path, metavar="DIR", default=Path("runs"), help="where runs are kept (default: runs)"
    )
    group.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="resume the newest run of CONFIG, or PATH: the folder of a run or of one of its checkpoints; "
        "with PATH, CONFIG may be left out",
    )
    group.add_argument(
        "--job", type=Path, metavar="LINK", help="make LINK a link to the run's folder, as pararun does"
    )


def _add_looking_options(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--evaluate",
        type=Path,
        metavar="PATH",
        help="score what a run has trained: PATH is the folder of a run that is done, of one of its "
        "checkpoints, or its final.pt or best.pt; CONFIG is the run's own",
    )
    group.add_argument("--print-config", action="store_true", help="print every setting with its value")
    group.add_argument(
        "--dry-run", action="store_true", help="build everything and describe the run: steps, bytes, memory"
    )


class _UsageError(ValueError):
    """Options that do not belong together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(complain(f"{message} (--help explains)"))


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer in [1, inf), got {text!r}")
    return int(text)


def _up_to(most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not 1 <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected an integer in [1, {most}], got {text[:60]!r}")
        return int(text)

    return number


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer in [0, inf), got {text!r}")
    return int(text)


# --- options that belong together -----------------------------------------------------------------


def _to_arguments(parsed: dict[str, Any]) -> Arguments:
    """The parsed options as Arguments. Raises _UsageError where they do not belong together."""
    if parsed["evaluate"] is not None:
        return _to_evaluate(parsed)
    words, sweep_file = parsed.pop("words"), parsed.pop("sweep")
    if sweep_file is None:
        _refuse_all(parsed, NEED_SWEEP, "expected together with --sweep FILE")
    elif parsed["index"] is None:
        _refuse_all(parsed, NEED_INDEX, "with --sweep expected an --index too")
        _refuse_path_for_all_points(parsed["resume"])
    if parsed["jobs"] and (parsed["index"] is not None or parsed["list_points"]):
        raise _UsageError("--jobs: with --sweep expected no --index and no --list")
    if parsed["resume"]:
        _check_resume_path(parsed["resume"])
    if sweep_file is None:
        config, overrides = _split_words(words, parsed["resume"])
    else:
        config, overrides = sweep_file, _check_overrides(words)
    return Arguments(config=config, overrides=overrides, sweep=sweep_file is not None, **parsed)


def _to_evaluate(parsed: dict[str, Any]) -> Arguments:
    """The parsed options with --evaluate. Raises _UsageError where they do not belong together, or where its
    path names no weights."""
    path = parsed.pop("evaluate")
    _refuse_all(parsed, NOT_TO_EVALUATE, "expected without --evaluate")
    if words := parsed.pop("words"):
        raise _UsageError(
            f"{words[0]}: with --evaluate expected no CONFIG and no change: the run has its own"
        )
    try:
        found = weights.find(path)
    except ValueError as error:
        raise _UsageError(f"--evaluate {path}: {error}") from None
    config = found.run / "config.yaml"
    return Arguments(config=config, overrides=[], evaluate=found, **{**parsed, "sweep": False})


def _refuse_all(parsed: dict[str, Any], names: dict[str, str], expected: str) -> None:
    """Raise _UsageError where one of these options is given."""
    for name, option in names.items():
        if parsed[name] is not None and parsed[name] is not False:  # --index 0 is given
            raise _UsageError(f"{option}: {expected}")


def _refuse_path_for_all_points(resume: str | None) -> None:
    """Raise _UsageError where --resume names one run, for all points of a sweep."""
    if resume:
        expected = f"with --sweep and no --index expected no path: each point has its own{_hint(resume)}"
        raise _UsageError(f"--resume {resume}: {expected}")


def _check_resume_path(resume: str) -> None:
    """Raise _UsageError where --resume PATH is not a folder."""
    if not Path(resume).is_dir():
        expected = f"expected a run's folder, or one of its checkpoints{_hint(resume)}"
        raise _UsageError(f"--resume {resume}: {expected}")


def _hint(resume: str) -> str:
    """What to do where --resume has taken the next word for its PATH."""
    swallowed = "=" in resume or resume.endswith(".yaml")
    return "; CONFIG and key.path=value go before it" if swallowed else ""


def _split_words(words: list[str], resume: str | None) -> tuple[Path, list[str]]:
    """CONFIG and its overrides; with --resume PATH the run's own configuration where CONFIG is left out."""
    if resume and (not words or "=" in words[0]):
        return run_of(Path(resume).resolve()) / "config.yaml", words
    if not words:
        raise _UsageError("CONFIG is missing: expected a YAML file")
    return Path(words[0]), words[1:]


def _check_overrides(words: list[str]) -> list[str]:
    """A sweep's words, which are overrides only. Raises _UsageError where one is not."""
    for word in words:
        if "=" not in word:
            raise _UsageError(f"{word}: expected key.path=value; a sweep's file names its own configuration")
    return words


# --- the points of a sweep ------------------------------------------------------------------------


def choose_point(options: Arguments) -> sweep.Point:
    """The point to run: the sweep's by --index, or the configuration on its own.

    Raises ConfigError, also where another process runs the point.
    """
    if options.index is None:
        return sweep.single_point(options.config, options.overrides)
    point = sweep.pick(sweep.read(options.config, options.overrides), options.index)
    who = sweep.holder(options.runs / point.folder, [sweep.RUN_LOCK])
    if who and not options.print_config and not options.dry_run:
        raise ConfigError(f"--index {options.index}: {who} runs this point already")
    return point


def run_sweep(
    options: Arguments,
    load_settings: sweep.LoadSettings,
    check: Callable[[Any], object],
    command: Sequence[str],
) -> int:
    """List a sweep's points, or run those that are not done, each by `python COMMAND --index I`.

    Before the first one starts, check(settings) raises ValueError where one of them cannot run. Returns the
    exit code.
    """
    points = sweep.read(options.config, options.overrides)
    resolved = sweep.resolve(options.config, points, load_settings)

    def is_done(point: sweep.Point) -> bool:
        folder = options.runs / point.folder
        return sweep.finished_run(folder, resolved[point.index], load_settings) is not None

    done = [is_done(point) for point in points]
    if options.list_points:
        return show(sweep.listing(points, done, options.runs))
    files.check_writable(options.runs)
    for point in points:
        if not done[point.index]:
            check(resolved[point.index])
    num_jobs = options.jobs or 1
    runner = PointRunner(
        points,
        options.runs,
        is_done,
        _without_jobs(command),
        min(num_jobs, max(1, done.count(False))),
        to_logs=num_jobs > 1,
        divides_cpus=options.threads is None,
    )
    return runner.run()


def _without_jobs(command: Sequence[str]) -> list[str]:
    """A command line without --jobs N or --jobs=N."""
    return [
        word
        for before, word in zip(["", *command], command, strict=False)
        if "--jobs" not in (before, word) and not word.startswith("--jobs=")
    ]

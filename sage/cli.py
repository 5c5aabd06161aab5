"""The command line of run.py."""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

from sage import files, sweep
from sage.console import complain, show
from sage.runfolder.resume import NEWEST, run_of
from sage.workers.signals import WATCH

HELP = """\
Train a task with a gradient compressor, as a YAML file says.

  python run.py configs/digits.yaml                          one worker
  python run.py configs/digits.yaml --workers 2              two processes on this machine
  torchrun --nproc-per-node 2 run.py configs/digits.yaml     the same, by torchrun
  python run.py configs/digits.yaml --simulate 16            16 workers that take turns in one process
  python run.py configs/digits.yaml reducer.name=topk epochs=3
  python run.py configs/digits.yaml --resume                 go on with the newest run of it
  python run.py --sweep configs/sweeps/reducers_digits.yaml --workers 2

key.path=value changes one value of the file, in YAML's syntax. An override of a name (reducer.name=exact)
chooses another component: of the file's section it keeps the keys that the new one knows.
A run leaves its folder, RUNS/<config name>/<run id>/, with config.yaml, environment.json, metrics.jsonl,
checkpoints/ and summary.json; `python -m sage.report RUNS` turns run folders into tables and pictures.
A sweep's file has a base (a configuration), a grid (key.path: [values]) and seeds. Without --list and --index
all its points run in turn; a point that is done is skipped. Its runs lie in RUNS/<sweep>/<point>/.
A run can be stopped anywhere and gone on with (--resume), with the same bits as without the stop. Ctrl-C,
SIGTERM and SIGUSR1 let it finish its step and write a checkpoint; a second Ctrl-C ends it at once. A sweep
that a signal ends has the exit code 128 + its number.
Exit codes: 0 done, or ended by SIGTERM or SIGUSR1 with a checkpoint; 1 failed; 2 bad input (nothing was
started); 130 Ctrl-C.
"""

NEED_SWEEP = {"list_points": "--list", "index": "--index"}
"""Options that only a sweep has, as argparse and as the user names them."""
NEED_INDEX = {"print_config": "--print-config", "dry_run": "--dry-run"}
"""Options about one run: in a sweep, about one of its points."""


@dataclass(frozen=True)
class Arguments:
    config: Path
    """Of a run; of a sweep its file."""
    overrides: list[str]
    sweep: bool
    list_points: bool
    index: int | None
    workers: int | None
    simulate: int | None
    threads: int | None
    data: Path | None
    runs: Path
    resume: str | None
    """A run's or a checkpoint's folder, or resume.NEWEST; None: begin."""
    job: Path | None
    print_config: bool
    dry_run: bool

    @property
    def many(self) -> bool:
        """Whether this is about all points of a sweep, not about one run."""
        return self.sweep and self.index is None


def parse(arguments: list[str]) -> Arguments:
    """The arguments of run.py. Prints help, or one line about what is wrong, and exits, as argparse does."""
    parser = _Parser(
        prog="run.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python run.py CONFIG [key.path=value ...] [options]\n"
        "       python run.py --sweep FILE [key.path=value ...] [--list | --index I] [options]",
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="CONFIG key.path=value",
        help="a YAML file (see configs/), and changes to it",
    )
    many = parser.add_mutually_exclusive_group().add_argument
    many("--workers", type=_count, metavar="N", help="start N processes on this machine")
    many("--simulate", type=_count, metavar="W", help="train W workers in turn in this process, on one model")
    add("--sweep", type=Path, metavar="FILE", help="run the points of a sweep (see configs/sweeps/)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--list", action="store_true", dest="list_points", help="list the sweep's points and stop"
    )
    which.add_argument("--index", type=_index, metavar="I", help="run the sweep's point I alone")
    add("--threads", type=_count, metavar="N", help="threads a worker (default: cores / workers here)")
    add("--data", type=Path, metavar="DIR", help="prepared data sets (default: $SAGE_DATA, else ./data)")
    add("--runs", type=Path, metavar="DIR", default=Path("runs"), help="where runs go (default: runs)")
    add(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="PATH",
        help="go on with the newest run of CONFIG, or with PATH: a run's folder, or one of its checkpoints; "
        "then CONFIG may be left out",
    )
    add("--job", type=Path, metavar="LINK", help="leave a link to the run's folder there; pararun does")
    add("--print-config", action="store_true", help="print the resolved configuration and stop")
    add("--dry-run", action="store_true", help="build everything, train nothing, say what a run would be")
    try:
        return _to_arguments(vars(parser.parse_intermixed_args(arguments)))
    except _UsageError as error:
        parser.error(str(error))


def _to_arguments(parsed: dict[str, Any]) -> Arguments:
    """The parsed options as Arguments. Raises _UsageError where they do not belong together."""
    words, sweep_file = parsed.pop("words"), parsed.pop("sweep")
    if sweep_file is None:
        _refuse_all(parsed, NEED_SWEEP, "expected together with --sweep FILE")
    elif parsed["index"] is None:
        _refuse_all(parsed, NEED_INDEX, "with --sweep expected an --index too")
        _refuse_path_for_all_points(parsed["resume"])
    if parsed["resume"]:
        _check_resume_path(parsed["resume"])
    if sweep_file is None:
        config, overrides = _split_words(words, parsed["resume"])
    else:
        config, overrides = sweep_file, _check_overrides(words)
    return Arguments(config=config, overrides=overrides, sweep=sweep_file is not None, **parsed)


def _refuse_all(parsed: dict[str, Any], names: dict[str, str], expected: str) -> None:
    """Raise _UsageError where one of these options is given."""
    for name, option in names.items():
        if parsed[name] is not None and parsed[name] is not False:  # --index 0 is given
            raise _UsageError(f"{option}: {expected}")


def _refuse_path_for_all_points(resume: str | None) -> None:
    """Raise _UsageError where --resume names one run, for all points of a sweep."""
    if resume:
        raise _UsageError(
            f"--resume {resume}: with --sweep and no --index expected no path: each point has its own"
        )


def _check_resume_path(resume: str) -> None:
    """Raise _UsageError where --resume PATH is not a folder, as where it has swallowed another word."""
    if Path(resume).is_dir():
        return
    swallowed = "=" in resume or resume.endswith(".yaml")
    hint = "; CONFIG and key.path=value go before it" if swallowed else ""
    raise _UsageError(f"--resume {resume}: expected a run's folder, or one of its checkpoints{hint}")


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


def choose_point(options: Arguments) -> sweep.Point:
    """The one run that is asked for. Raises ConfigError."""
    if options.index is None:
        return sweep.alone(options.config, options.overrides)
    return sweep.pick(sweep.read(options.config, options.overrides), options.index)


# --- all points -----------------------------------------------------------------------------------


def run_sweep(
    options: Arguments, settle: sweep.Resolve, check: Callable[[Any], object], command: Sequence[str]
) -> int:
    """List a sweep's points, or run in turn those that are not done, each by `python COMMAND --index I`.

    Before the first one starts, these are checked: check(settings) raises ValueError where one cannot run. A
    point that fails does not keep the next from running; a signal ends them all. Returns the exit code.
    """
    points = sweep.read(options.config, options.overrides)
    resolved = sweep.resolve(options.config, points, settle)
    done = [
        sweep.finished_run(options.runs / point.place, settings, settle) is not None
        for point, settings in zip(points, resolved, strict=True)
    ]
    if options.list_points:
        return show(sweep.listing(points, done))
    files.check_writable(options.runs)
    for settings, is_done in zip(resolved, done, strict=True):
        if not is_done:
            check(settings)
    failed = []
    for point in points:
        state = " is done" if done[point.index] else ""
        print(f"point {point.index} of {len(points)}: {point}{state}", flush=True)
        if done[point.index]:
            continue
        code, stopped = _run([*command, "--index", str(point.index)])
        if stopped:
            return code
        if code != 0:
            failed.append(str(point.index))
    if failed:
        print(f"run.py: {len(failed)} of {len(points)} points failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(command: list[str]) -> tuple[int, bool]:
    """Run `python COMMAND`: its exit code, and whether a signal to this process ended it.

    The child has a session of its own, so that Ctrl-C reaches it once: handed on from here.
    """
    children: list[subprocess.Popen[bytes]] = []

    def send(number: Signals) -> None:
        for child in children:
            child.send_signal(number)

    with WATCH.handed_on(send):
        with WATCH.held():
            children.append(subprocess.Popen([sys.executable, *command], start_new_session=True))
        code = children[0].wait()
    return (code, False) if WATCH.received is None else (128 + WATCH.received, True)


class _UsageError(ValueError):
    """Options that do not belong together."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(complain(f"{message} (--help explains)"))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer in [1, inf), got {text!r}")
    return int(text)


def _index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer in [0, inf), got {text!r}")
    return int(text)

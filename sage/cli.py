"""The command line of run.py."""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

HELP = """\
Train a task with a gradient compressor, as a YAML file says.

  python run.py configs/digits.yaml                          one worker
  python run.py configs/digits.yaml --workers 2              two processes on this machine
  torchrun --nproc-per-node 2 run.py configs/digits.yaml     the same, by torchrun
  python run.py configs/digits.yaml --simulate 16            16 workers that take turns in one process
  python run.py configs/digits.yaml reducer.name=topk epochs=3

key.path=value changes one value of the file, in YAML's syntax. An override of a name (reducer.name=exact)
chooses another component: of the file's section it keeps the keys that the new one knows.
A run leaves its folder, RUNS/<config name>/<run id>/, with config.yaml, environment.json, metrics.jsonl,
checkpoints/ and summary.json; `python -m sage.report RUNS` turns run folders into a table and a picture.
Exit codes: 0 done, 1 failed, 2 bad input (nothing was started).
"""


@dataclass(frozen=True)
class Arguments:
    config: Path
    overrides: list[str]
    workers: int | None
    simulate: int | None
    threads: int | None
    data: Path | None
    runs: Path
    print_config: bool
    dry_run: bool


def parse(arguments: list[str]) -> Arguments:
    """The arguments of run.py. Prints help, or one line about what is wrong, and exits, as argparse does."""
    parser = _Parser(
        prog="run.py",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python run.py CONFIG [key.path=value ...] [options]",
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
    add("--threads", type=_count, metavar="N", help="threads a worker (default: cores / workers here)")
    add("--data", type=Path, metavar="DIR", help="prepared data sets (default: $SAGE_DATA, else ./data)")
    add("--runs", type=Path, metavar="DIR", default=Path("runs"), help="where runs go (default: runs)")
    add("--print-config", action="store_true", help="print the resolved configuration and stop")
    add("--dry-run", action="store_true", help="build everything, train nothing, say what a run would be")
    parsed = vars(parser.parse_intermixed_args(arguments))
    config, *overrides = parsed.pop("words") or [None]
    if config is None:
        parser.error("CONFIG is missing: expected a YAML file")
    return Arguments(config=Path(config), overrides=overrides, **parsed)


def show(text: str, speaks: bool) -> int:
    """An answer on stdout, from the one process that speaks, and the exit code."""
    if speaks:
        print(text.rstrip("\n"))
    return 0


def complain(message: str) -> int:
    """Bad input: the message's lines on stderr, and the exit code."""
    for line in message.splitlines():
        print(f"run.py: {line}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, without the usage."""
        self.exit(complain(f"{message} (--help explains)"))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer in [1, inf), got {text!r}")
    return int(text)

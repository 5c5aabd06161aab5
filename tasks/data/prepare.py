"""The command behind prepare_dataset.sh: download or take an archive, verify, convert once.

Imports a data set's code when it is asked for: --help answers at once.
"""

import argparse
import sys
from pathlib import Path
from pkgutil import resolve_name

PREPARE = {
    "cifar10": "tasks.data.cifar:CIFAR10.prepare",
    "cifar100": "tasks.data.cifar:CIFAR100.prepare",
    "ptb": "tasks.data.ptb:prepare",
    "wikitext2": "tasks.data.wikitext2:prepare",
    "ml-100k": "tasks.data.movielens:ML_100K.prepare",
    "ml-1m": "tasks.data.movielens:ML_1M.prepare",
    "ml-20m": "tasks.data.movielens:ML_20M.prepare",
}
"""Where each data set's function is: from the data folder and an archive or None to what there is to say."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="prepare_dataset.sh",
        description="Download a data set, verify it, convert it once; a complete result stays as it is.",
    )
    parser.add_argument("name", choices=PREPARE, metavar="NAME", help="one of %(choices)s")
    source = "an archive or folder fetched by hand"
    parser.add_argument("--from", dest="archive", type=Path, metavar="PATH", help=source)
    parser.add_argument(
        "--data", type=Path, default=Path("data"), metavar="DIR", help="where to (default: data)"
    )
    arguments = parser.parse_args()
    try:
        print(resolve_name(PREPARE[arguments.name])(arguments.data, arguments.archive))
    except (
        ValueError,
        OSError,
        RuntimeError,
    ) as error:  # RuntimeError: torchvision's, when no mirror answers
        print(f"prepare_dataset.sh: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

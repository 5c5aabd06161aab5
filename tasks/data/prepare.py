"""The command behind prepare_dataset.sh: download or take an archive, verify, convert once."""

import argparse
import sys
from pathlib import Path

from tasks.data import movielens, ptb, wikitext2
from tasks.data.cifar import CIFAR10, CIFAR100

PREPARE = {
    "cifar10": CIFAR10.prepare,
    "cifar100": CIFAR100.prepare,
    "ptb": ptb.prepare,
    "wikitext2": wikitext2.prepare,
    **{name: ratings.prepare for name, ratings in movielens.SETS.items()},
}


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
        print(PREPARE[arguments.name](arguments.data, arguments.archive))
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

"""What the command lines of all benchmarks have in common."""

import argparse
import re
import textwrap
from pathlib import Path


class DocstringFormatter(argparse.HelpFormatter):
    """Shows a module's docstring in the terminal's width; paragraphs, items and commands stay apart."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(fold(paragraph, width) for paragraph in text.strip().split("\n\n"))


def fold(paragraph: str, width: int) -> str:
    """A paragraph in lines of a width; each of its lines that begins with "- " begins an item. One that is
    indented is a command, whose bracketed options are not torn apart."""
    if paragraph.startswith(" "):
        words = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\0"), paragraph).split()
        lines = textwrap.wrap(" ".join(words), width, initial_indent="    ", subsequent_indent=" " * 8)
        return "\n".join(lines).replace("\0", " ")
    items = re.split(r"\n(?=- )", paragraph)
    return "\n".join(
        textwrap.fill(" ".join(item.split()), width, subsequent_indent="  " if item[:2] == "- " else "")
        for item in items
    )


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows a module's docstring, and which has the option --json."""
    parser = argparse.ArgumentParser(description=description, formatter_class=DocstringFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a JSON file")
    return parser

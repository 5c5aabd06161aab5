"""What each setting is for: as comments in a printed configuration, and as the page docs/settings.md.

Both are made of the settings' classes. Imports no torch.
"""

import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from pydantic.fields import FieldInfo

from sage.config import Named, Settings, Tables, expected, one_line

COLUMNS = 110
"""The longest line of a comment where no terminal is narrower."""


def to_commented_yaml(settings: Settings, width: int = COLUMNS) -> str:
    """The resolved configuration with each field's docstring above it; loading it gives equal settings.

    width: of the longest line of a comment.
    """
    return "\n".join(_commented(settings, "", width)) + "\n"


def _commented(settings: Settings, indent: str, width: int) -> Iterator[str]:
    values = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        yield from _comment(field, indent, width)
        value = getattr(settings, name)
        if isinstance(value, Settings) and values[name]:
            yield f"{indent}{name}:"
            yield from _commented(value, indent + "  ", width)
        else:
            yield f"{indent}{name}: {one_line(values[name])}"


def _comment(field: FieldInfo, indent: str, width: int) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(
        field.description or "",
        width,
        initial_indent=prefix,
        subsequent_indent=prefix,
        break_long_words=False,
        break_on_hyphens=False,
    )


# --- the page -------------------------------------------------------------------------------------

HEAD = """\
# Settings

Every key of a configuration, with what it takes, its default and what it is for. `python run.py CONFIG
--print-config` shows them with a configuration's values; `python run.py CONFIG key.path=value` changes one.

This page is made by `python -m docs` from the classes of the settings: change a docstring there, not here.
"""


def settings_page(
    run: type[Settings], tables: Tables, sweep: type[Settings], summaries: Mapping[str, Mapping[str, str]]
) -> str:
    """The page in Markdown. run: the settings of a run. tables: the components that its sections choose from.
    sweep: those of a sweep's file. summaries: a line about each component, by section and name."""
    parts = [HEAD, "## A run\n", _table(run, skipped=tables)]
    for section, table in tables.items():
        parts.append(
            f"## `{section}`\n\nWhich one: `{section}.name`, one of {', '.join(map(_code, table))}.\n"
        )
        for name in table:
            summary = summaries.get(section, {}).get(name, "")
            parts += [f"### {section}: {name}\n", *([summary + "\n"] if summary else []), _table(table[name])]
    parts += ["## A sweep's file\n", _table(sweep)]
    return "\n".join(parts)


def _table(model: type[Settings], skipped: Collection[str] = ("name",)) -> str:
    rows = list(_rows(model, "", skipped))
    if not rows:
        return "It has no settings.\n"
    head = ["| key | takes | default | |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) + "\n"


def _rows(model: type[Settings], prefix: str, skipped: Collection[str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if name in skipped:
            continue
        if isinstance(default, Settings) and not isinstance(default, Named):
            yield from _rows(type(default), f"{prefix}{name}.", ())
            continue
        shown = "required" if field.is_required() else _code(one_line(default))
        cells = [_code(prefix + name), expected(field), shown, " ".join((field.description or "").split())]
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _code(value: Any) -> str:
    return f"`{value}`"

"""The results as a dated JSON file and as a page in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.checks import Row, Section, Value
from sage.files import write_json, write_text


def write_results(
    folder: Path,
    name: str,
    facts: Mapping[str, Any],
    sections: Sequence[Section],
    rows: Mapping[str, list[Row]],
) -> Path:
    """Write FOLDER/NAME.json and FOLDER/NAME.md; returns the path of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", {**facts, "sections": rows})
    page = folder / f"{name}.md"
    write_text(page, make_page(name, facts, sections, rows))
    return page


def make_page(
    name: str, facts: Mapping[str, Any], sections: Sequence[Section], rows: Mapping[str, list[Row]]
) -> str:
    versions = ", ".join(f"{key} {value}" for key, value in facts["versions"].items() if value)
    parts = [
        f"# {name}",
        f"{facts['processor']}. {versions}; commit {facts['commit']}, {facts['wall_seconds']:.0f} s.",
    ]
    for section in sections:
        if section.name in rows:
            parts += [f"## {section.name}", section.meaning, *_tables(rows[section.name])]
    return "\n\n".join(parts) + "\n"


def _tables(rows: Sequence[Row]) -> list[str]:
    """A table for each kind of row, by its columns; what failed and what was left out as lists."""
    kinds: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if not row.keys() & {"failed", "left out"}:
            kinds.setdefault(tuple(row), []).append(row)
    texts = [_table(columns, those) for columns, those in kinds.items()]
    for word in ("failed", "left out"):
        lines = [f"- {row['check']}: {row[word]}" for row in rows if word in row]
        if lines:
            texts.append("\n".join([f"{word.capitalize()}:", "", *lines]))
    return texts


def _table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [
        columns,
        ["---"] * len(columns),
        *([format_value(row[name]) for name in columns] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_value(value: Value) -> str:
    """A number with three digits that count; yes and no; nothing for what there is not."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if value and not 1e-3 <= abs(value) < 1e6:
            return f"{value:.2e}"
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")

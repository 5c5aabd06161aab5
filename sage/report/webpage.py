"""The report as one page that needs no server and no network: tables that sort, plots with hover.

The tables are sorted and filtered by DataTables, which the package itables carries, and the plots are
plotly's own export; both scripts are in the page. Everything from a run's files is escaped, and the
page's own policy lets a browser load nothing.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sage import files
from sage.console import printable
from sage.network import parse_speed
from sage.report.formats import differing_settings
from sage.report.groups import Section
from sage.report.output import Chapter, Content
from sage.report.plots import Plot, advice_plot, curves_plot, times_plot
from sage.report.runs import Flat, ReportError, Run
from sage.report.spread import Band
from sage.report.tables import Sheet

PACKAGES = ("itables", "plotly")
ROWS_OF_A_PAGE = 25
"""A longer table is shown in parts."""
LARGEST = 1e300
"""What is sorted after every number."""
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' data:; style-src 'unsafe-inline'; img-src data: blob:"
)
"""What a browser may load: what is in the page, and nothing else."""
STYLE = """\
body { font-family: sans-serif; margin: 1.5em; max-width: 1500px; }
table { font-size: 0.9em; }
th { text-align: left; white-space: pre-line; }
p.note { white-space: pre-line; color: #555; font-size: 0.85em; }
select { max-width: 45%; }
.sheet { overflow-x: auto; margin-bottom: 2em; }
"""
TABLES = {
    "layout": {"topStart": {"buttons": ["searchBuilder", "colvis"]}, "topEnd": "search", "bottomStart": None},
    "order": [],
    "pageLength": ROWS_OF_A_PAGE,
    "autoWidth": False,
    "language": {
        "searchBuilder": {"button": {"0": "Filter", "_": "Filter (%d)"}},
        "buttons": {"colvis": "Columns"},
    },
}
"""How DataTables shows a table: https://datatables.net/reference/option."""
TABLES_SCRIPT = """\
<script type="module">
import { ITable } from "data:text/javascript;base64,%s";
for (const table of document.querySelectorAll("table.sorted")) new ITable(table, %s);
</script>
"""
DIFFERENCE_SCRIPT = """\
<script>
const {keys, values} = JSON.parse(document.getElementById("settings").textContent);
const chosen = ["first", "second"].map(name => document.getElementById(name));
function compare() {
  const [a, b] = chosen.map(select => values[select.value]);
  const rows = keys.map((key, i) => [key, a[i], b[i]]).filter(row => row[1] !== row[2]).map(cells => {
    const row = document.createElement("tr");
    for (const cell of cells) row.insertCell().textContent = cell;
    return row;
  });
  document.querySelector("#difference tbody").replaceChildren(...rows);
}
for (const select of chosen) select.onchange = compare;
compare();
</script>
"""


def check_packages() -> None:
    """Raise ReportError where a package that makes the page is missing."""
    for name in PACKAGES:
        if find_spec(name) is None:
            raise ReportError(f"--html: the package {name} is missing: pip install {name}")


def write_page(path: Path, content: Content) -> Path:
    """Write the page; returns its path."""
    import itables.options

    bundle = Path(itables.options.dt_bundle)
    title = escaped(", ".join(chapter.section.workload for chapter in content.chapters))
    script = base64.b64encode(bundle.read_bytes()).decode("ascii")
    head = [
        f'<meta charset="utf-8">\n<title>{title}</title>',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        f"<style>\n{bundle.with_suffix('.css').read_text()}\n{STYLE}</style>",
        f"<script>{plotly_script()}</script>",
    ]
    body = [
        *(f"<p>{escaped(note)}</p>" for note in content.notes),
        *(part for chapter in content.chapters for part in chapter_parts(chapter, content.band)),
        difference(content.sections),
        TABLES_SCRIPT % (script, json.dumps(TABLES)),
    ]
    page = [
        '<!doctype html>\n<html lang="en">\n<head>',
        *head,
        "</head>\n<body>",
        *body,
        "</body>\n</html>\n",
    ]
    files.write_text(path, "\n".join(page))
    return path


def chapter_parts(chapter: Chapter, band: Band) -> Iterator[str]:
    """What the page says of a section: plots, then tables."""
    section = chapter.section
    plots = [curves_plot(section, band), times_plot(section)]
    plots += [advice_plot(chapter.advice)] if chapter.advice else []
    yield f"<h1>{escaped(section.workload)}</h1>"
    yield from map(plot_in_html, plots)
    keys = differing_settings([group.runs[0].config for group in section.groups])
    configs = {group.short_label: group.runs[0].config for group in section.groups}
    for sheet in chapter.sheets:
        yield f"<h2>{escaped(sheet.title)}</h2>"
        yield table(sheet, keys, configs)
        yield f'<p class="note">{escaped(sheet.note)}</p>'


def plot_in_html(plot: Plot) -> str:
    """plotly's own export, without its script."""
    from plotly.io import to_html

    digest = hashlib.sha256(repr(plot).encode()).hexdigest()
    config = {"displaylogo": False}
    given = {"full_html": False, "include_plotlyjs": False, "validate": False, "config": config}
    return str(to_html(plot, div_id=f"plot-{digest[:16]}", **given))


def plotly_script() -> str:
    """All of plotly.js."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def escaped(text: str) -> str:
    """A text from a run's files as HTML, in which it starts no element and ends no attribute."""
    return html.escape(printable(text))


# --- tables -----------------------------------------------------------------------------------------


def table(sheet: Sheet, keys: Sequence[str], configs: Mapping[str, Flat]) -> str:
    """A table that sorts by numbers. Those settings that differ are columns too, hidden at first: by them it
    is filtered.

    keys: of the settings; configs: by a row's label.
    """
    heads = [f"<th>{escaped(name.strip())}</th>" for name in sheet.columns]
    heads += [f'<th data-visible="false">{escaped(key)}</th>' for key in keys]
    rows = []
    for label, *numbers in sheet.rows:
        config = configs.get(label.split("\n")[0], {})
        cells = [f"<td>{escaped(label)}</td>", *map(_number_cell, numbers)]
        cells += [f"<td>{escaped(as_text(config.get(key)))}</td>" for key in keys]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    kind = f'class="sorted display compact" data-paging="{str(len(rows) > ROWS_OF_A_PAGE).lower()}"'
    content = f"<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>"
    return f'<div class="sheet"><table {kind}>{content}</table></div>'


def _number_cell(cell: str) -> str:
    value = sort_value(cell)
    return f'<td data-order="{"" if value is None else f"{value:.17g}"}">{escaped(cell)}</td>'


def sort_value(cell: str) -> float | None:
    """The number that a cell is sorted by: its first one, and of "50x less" a fiftieth; None where it has
    none."""
    if cell in ("never", "always"):
        return 0.0 if cell == "never" else LARGEST
    found = re.match(r"[+-]?[\d,]*\.?\d+(e[+-]?\d+)?", cell)
    if not found:
        return None
    value = float(found[0].replace(",", ""))
    if cell.endswith("bit/s"):
        return parse_speed(cell)
    return 1 / value if cell.endswith("less") and value else value


def as_text(value: Any) -> str:
    """A setting's value; empty where there is none."""
    return "" if value is None else str(value)


# --- two runs ---------------------------------------------------------------------------------------


def difference(sections: Sequence[Section]) -> str:
    """A table of the settings in which two runs differ, which the reader chooses."""
    runs = [(name, run) for section in sections for name, run in named_runs(section)]
    keys = sorted(set().union(*(run.config for _, run in runs)))
    values = [[as_text(run.config[key]) if key in run.config else None for key in keys] for _, run in runs]
    names = [name for name, _ in runs]
    head = "<thead><tr><th>setting</th><th>of the first</th><th>of the second</th></tr></thead>"
    data = json.dumps({"keys": keys, "values": values}).replace("<", "\\u003c")
    return "\n".join(
        [
            "<h1>What differs between two runs</h1>",
            _choice("first", names, 0),
            _choice("second", names, 1),
            f'<table id="difference">{head}<tbody></tbody></table>',
            f'<script type="application/json" id="settings">{data}</script>',
            DIFFERENCE_SCRIPT,
        ]
    )


def _choice(name: str, texts: Sequence[str], chosen: int) -> str:
    """A list of which one text is chosen; its value is the text's index."""
    marks = {chosen: " selected"}
    options = (
        f'<option value="{index}"{marks.get(index, "")}>{escaped(text)}</option>'
        for index, text in enumerate(texts)
    )
    return f'<select id="{name}">{"".join(options)}</select>'


def named_runs(section: Section) -> Iterator[tuple[str, Run]]:
    """Each run, with its workload, configuration and seed."""
    for group in section.groups:
        for run in group.runs:
            number = "" if group.number is None else f"{group.number} "
            yield f"{section.workload}: {number}{group.label}, seed {run.config.get('seed')}", run

"""The report's page: it says what the other reports say, runs nothing of a run's files, works in a browser.

Chromium is looked for; what needs it is skipped where there is none. It gets the page with a probe in it,
which clicks, and writes what it then sees.
"""

import html
import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from sage.network import Link
from sage.report import __main__ as report
from sage.report import figures, plots, tables, webpage
from sage.report.advice import Network, advise, over_speeds
from sage.report.curves import TITLES, CurvePoint, average_curve, over_steps
from sage.report.groups import gather
from sage.report.looks import FILLINGS, FILLS, LOOKS, SPARE, styles_of
from tests.test_report import EXACT, SAGE, section_of, seeds_of_sage, write_run

Capture = pytest.CaptureFixture[str]
SETTINGS = ("topk", "sage", "powersgd")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_run(tmp_path / "runs/exact", "exact", EXACT, optimizer="plain")
    write_run(tmp_path / "runs/topk", {"name": "topk", "density": 0.5}, SAGE)
    seeds_of_sage(tmp_path / "runs/sage", 0.02, 0.04, 0.03)
    return tmp_path / "runs"


def write_page_of(folder: Path) -> Path:
    return webpage.write_page(
        folder.parent / "report.html", report.compose(report.parse_arguments([str(folder)]))
    )


class Elements(HTMLParser):
    """The elements of a page, and the text of its cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        self._in_cell = tag == "td"
        self.cells += [""] if self._in_cell else []

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


# --- what it says ---------------------------------------------------------------------------------


def test_the_page_has_every_cell_of_every_table_and_settings_to_filter_by(folder: Path) -> None:
    content = write_page_of(folder).read_text()
    runs = [report.read_run(path) for path in report.find_runs([folder])]
    (section,) = gather(runs)
    cells = Counter(Elements(content).cells)
    sheets = tables.build_sheets(section, None)
    assert not Counter(cell for sheet in sheets for row in sheet.rows for cell in row) - cells
    for key in ("reducer.density", "task.optimizer"):
        assert content.count(f'<th data-visible="false">{key}</th>') == len(sheets)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        *(("0.9700 ±0.0012", 0.97), ("1,234", 1234), ("-0.0150", -0.015), ("+0.0448 to +0.1", 0.0448)),
        *(("50.0x less", 0.02), ("4.00x more", 4), ("1.38x", 1.38), ("0.0101 / 0.01", 0.0101), ("2 of 3", 2)),
        *(
            ("1.50 Gbit/s", 1.5e9),
            ("12.0 Mbit/s", 12e6),
            ("always", webpage.LARGEST),
            ("never", 0),
            ("-", None),
        ),
        *(("1.0e-05", 1e-5), ("", None), ("text", None)),
    ],
)
def test_a_column_is_sorted_by_its_numbers(cell: str, value: float | None) -> None:
    found = webpage.sort_value(cell)
    assert found == (value if value is None else pytest.approx(value, rel=1e-15))


def test_the_lines_are_those_of_the_pictures_in_the_same_looks(tmp_path: Path) -> None:
    exact = write_run(tmp_path / "e", "exact", EXACT)
    section = section_of(exact, *seeds_of_sage(tmp_path, 0.02, 0.04, 0.03))
    traces = plots.curves_plot(section, "std")["data"]
    band, density = (one for one in traces if one["xaxis"] == "x4" and one["legendgroup"] == "1")
    curve = average_curve(section.groups[1], lambda run: over_steps(run, "density"), "std")
    assert [density["x"], density["y"]] == [[0, 1, 2, 3], pytest.approx([0.01, 0.01, 0.03, 0.03], rel=1e-12)]
    assert band["y"] == pytest.approx([*(p.high for p in curve), *(p.low for p in reversed(curve))], rel=1e-5)
    (scores,) = (one for one in traces if one["xaxis"] == "x" and one["legendgroup"] == "0")
    assert (scores["x"], scores["y"], scores["name"]) == ([1, 2], [0.5, 0.75], "exact")
    assert scores["line"] == {"color": LOOKS["exact"].colour, "dash": "solid", "width": 1.5}
    assert scores["marker"]["symbol"] == "circle"
    assert [one["name"] for one in traces if one["showlegend"]] == ["exact", "sage (3 seeds)"]


def test_every_look_and_filling_and_phase_has_a_form_of_its_own_in_plotly() -> None:
    looks = [*LOOKS.values(), *SPARE]
    forms = {(look.colour, plots.SYMBOLS[look.marker], plots.DASHES[look.dash]) for look in looks}
    assert len(forms) == len(looks)
    assert len(set(plots.SYMBOLS.values())) == len(plots.SYMBOLS)
    assert len({plots.FILLINGS[filling] for filling in FILLINGS}) == len(FILLINGS)
    fills = {(colour, plots.PATTERNS[hatch[:1]]) for colour, hatch in FILLS.values()}
    assert len(fills) == len(FILLS)
    twelve = [json.dumps(plots.line_style(style)) for style in styles_of(["topk"] * 12)]
    assert len(set(twelve)) == 12


def test_the_page_has_every_panel_of_the_pictures() -> None:
    assert [*plots.PANELS, "time"] == [*figures.PANELS] == [*TITLES]


def test_bars_are_the_phases_of_a_step(folder: Path) -> None:
    (section,) = gather([report.read_run(path) for path in report.find_runs([folder])])
    bars = {one["name"]: one["x"] for one in plots.times_plot(section)["data"]}
    # exact, topk, sage: compute 8 ms of four phases, compression 2 or 3, communication 8 or 2
    assert {name: bars[name] for name in ("forward", "compression", "communication")} == {
        "forward": [2, 2, 2],
        "compression": [2, 3, 3],
        "communication": [8, 2, 2],
    }


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    curve = [CurvePoint(x, x, x, x) for x in range(1001)]
    assert [point.x for point in plots.thinned(curve, 5)] == [0, 250, 500, 750, 1000]
    assert plots.thinned(curve, 1001) == curve


def test_the_network_plot_has_the_pictures_lines(tmp_path: Path) -> None:
    lines = [
        line | {"bytes": {**line["bytes"], "padding": 0}} if line["kind"] == "epoch" else line
        for line in SAGE
    ]
    made = [write_run(tmp_path / name, name, given) for name, given in (("exact", EXACT), ("topk", lines))]
    for run in made:
        run.summary["parameters"] = 1000
    (one,) = advise(gather(made), Network(Link(1e9))).values()
    speeds, expected = over_speeds(one)
    drawn = [trace for trace in plots.advice_plot(one)["data"] if trace["xaxis"] == "x" and "name" in trace]
    assert [trace["name"] for trace in drawn] == [line.label for line in expected]
    for trace, line in zip(drawn, expected, strict=True):
        assert trace["x"] == pytest.approx(speeds, rel=1e-5)
        assert trace["y"] == pytest.approx(line.ratios, rel=1e-5)


def differences(content: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="settings">(.*?)</script>', content)
    assert found
    return json.loads(found[1])


def test_the_settings_of_every_run_are_there_to_be_compared(folder: Path) -> None:
    content = write_page_of(folder).read_text()
    given = differences(content)
    settings = [dict(zip(given["keys"], values, strict=True)) for values in given["values"]]
    assert [one["reducer.name"] for one in settings] == ["exact", "sage", "sage", "sage", "topk"]
    assert [one["reducer.density"] for one in settings] == [None, None, None, None, "0.5"]
    names = [html.unescape(name) for name in re.findall(r"<option value=[^>]*>([^<]*)</option>", content)]
    assert names[1] == "digits, world size 2: sage, seed 1"
    assert len(names) == 2 * len(settings)


# --- safety ---------------------------------------------------------------------------------------

HOSTILE = "</script></style><script>window.stolen=1</script><img src=x onerror=stolen=1>\"'"


def test_texts_of_run_files_are_no_elements(tmp_path: Path) -> None:
    for home, text in (("plain", "x" * len(HOSTILE)), ("hostile", HOSTILE)):
        reducers = ("exact", f"{text}a", {"name": "topk", f"{text}b": f"{text}c"})
        for index, reducer in enumerate(reducers):
            lines = [
                line | {"score": {"name": text, "value": 0.5}} if "score" in line else line for line in SAGE
            ]
            folder = tmp_path / home / "runs" / str(index)
            write_run(folder, reducer, lines, **{f"{text}d": f"{text}{index}", "name": f"{text}e"})
    plain, hostile = (
        Elements(write_page_of(tmp_path / home / "runs").read_text()) for home in ("plain", "hostile")
    )
    assert plain.tags == hostile.tags
    assert plain.tags["img"] == 0
    assert [name for name, _ in plain.attributes] == [name for name, _ in hostile.attributes]
    assert any(HOSTILE in cell for cell in hostile.cells)


def test_the_page_loads_nothing(folder: Path) -> None:
    written = write_page_of(folder)
    elements = Elements(written.read_text())
    loading = {name for name, _ in elements.attributes} & {"src", "href", "action", "srcset", "data"}
    assert not loading
    assert elements.tags["link"] == 0
    assert "default-src 'none'" in webpage.POLICY
    assert not re.search(r"https?:", webpage.POLICY)
    assert ("content", webpage.POLICY) in elements.attributes
    assert written.stat().st_size < 7e6


@pytest.mark.parametrize("missing", webpage.PACKAGES)
def test_a_missing_package_is_an_error_of_one_line(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(webpage, "find_spec", lambda name: None if name == missing else object())
    written = folder.parent / "x.html"
    assert report.main([str(folder), "--html", str(written)]) == 2
    told = capsys.readouterr().err
    assert told == f"report: --html: the package {missing} is missing: pip install {missing}\n"
    assert not written.exists()


def test_the_command_writes_the_page_beside_the_other_files(folder: Path, capsys: Capture) -> None:
    written = folder.parent / "one/two.html"
    assert report.main([str(folder), "--html", str(written)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(written)
    assert written.read_bytes() == write_page_of(folder).read_bytes()


def test_another_ending_is_refused(folder: Path, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as left:
        report.main([str(folder), "--html", "x.pdf"])
    assert left.value.code == 2
    assert "--html x.pdf: expected a name that ends in .html" in capsys.readouterr().err


# --- in a browser ---------------------------------------------------------------------------------

COLLECTOR = """\
<script>
const problems = [];
window.addEventListener("error", event => problems.push(String(event.message)));
window.addEventListener("unhandledrejection", event => problems.push(String(event.reason)));
document.addEventListener("securitypolicyviolation", event => problems.push("policy: " + event.blockedURI));
for (const kind of ["error", "warn"]) console[kind] = (...words) => problems.push(words.join(" "));
</script>
"""
PROBE = """\
<script>
function firstCells() {
  return [...document.querySelectorAll("table.sorted")[0].querySelectorAll("tbody tr")].map(
    row => row.cells[0].textContent);
}
function shown(plot) {
  return plot._fullData.filter(trace => trace.type === "scatter").map(trace => trace.visible === true);
}
function click(element, ...kinds) {
  const place = element.getBoundingClientRect();
  for (const kind of kinds) element.dispatchEvent(new MouseEvent(
    kind, {bubbles: true, view: window, clientX: place.x + 1, clientY: place.y + 1}));
}
const pause = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
async function probe() {
  const seen = {};
  for (let i = 0; i < 200 && !document.querySelector("table.sorted.dataTable"); i++) await pause(0.1);
  await pause(1);
  seen.rows = firstCells();
  const heads = [...document.querySelectorAll("table.sorted")[0].querySelectorAll("thead th")];
  seen.heads = heads.map(head => head.textContent.trim());
  const score = heads.find(head => head.textContent.includes("last"));
  click(score, "mousedown", "mouseup", "click");
  await pause(0.5);
  seen.ascending = firstCells();
  click(score, "mousedown", "mouseup", "click");
  await pause(0.5);
  seen.descending = firstCells();
  const search = document.querySelector(".dt-search input");
  search.value = "0.5";
  search.dispatchEvent(new Event("input", {bubbles: true}));
  await pause(1);
  seen.found = firstCells();
  const plot = document.querySelector(".js-plotly-plot");
  seen.before = shown(plot);
  click(plot.querySelectorAll(".legendtoggle")[1], "mousedown", "mouseup");
  await pause(1.5);
  seen.after = shown(plot);
  seen.groups = plot._fullData.map(trace => trace.legendgroup);
  document.getElementById("second").value = "4";
  document.getElementById("second").dispatchEvent(new Event("change"));
  seen.difference = [...document.querySelectorAll("#difference tbody tr")].map(
    row => [...row.cells].map(cell => cell.textContent));
  seen.stolen = "stolen" in window;
  seen.problems = problems;
  const report = document.createElement("pre");
  report.id = "probe";
  report.textContent = JSON.stringify(seen);
  document.body.append(report);
}
probe().catch(error => problems.push(String(error)));
</script>
"""


def find_browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def seen_in_browser(written: Path) -> dict[str, Any]:
    """What the probe saw in the page."""
    browser = find_browser()
    assert browser
    text = written.read_text()
    probed = written.with_name("probed.html")
    probed.write_text(text.replace("<head>", f"<head>\n{COLLECTOR}", 1).replace("</body>", f"{PROBE}</body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,2000",
    ]
    options += [f"--user-data-dir={written.parent / 'browser'}", "--virtual-time-budget=60000", "--dump-dom"]
    done = subprocess.run([browser, *options, probed.as_uri()], capture_output=True, text=True, timeout=180)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(
    find_browser() is None, reason="needs Chromium: chromium, chromium-browser or google-chrome"
)
def test_in_chromium_tables_sort_and_filter_a_run_hides_and_two_runs_are_compared(folder: Path) -> None:
    for name, last in (("exact", 0.75), ("topk", 0.9), ("sage/1", 0.6), ("sage/2", 0.6), ("sage/3", 0.6)):
        path = folder / name / "summary.json"
        summary = json.loads(path.read_text())
        path.write_text(json.dumps(summary | {"score": summary["score"] | {"last": last}}))
    write_run(folder / "hostile", HOSTILE, SAGE)
    seen = seen_in_browser(write_page_of(folder))
    assert seen["problems"] == []
    assert not seen["stolen"]
    hostile = next(row for row in seen["rows"] if "script" in row)
    assert seen["rows"] == ["1 exact", hostile, "3 sage", "4 topk"]
    assert seen["heads"] == ["run", "seeds", "accuracy\nlast", "accuracy\nbest"]
    # last: 0.6, 0.75 twice, and 0.9
    assert seen["ascending"] == ["3 sage", "1 exact", hostile, "4 topk"]
    assert [seen["descending"][0], seen["descending"][-1]] == ["4 topk", "3 sage"]
    assert seen["found"] == ["4 topk"]  # by reducer.density, which no column shows
    hidden = [was and group == "1" for was, group in zip(seen["before"], seen["groups"], strict=True)]
    assert sum(hidden) == 5  # a line in every panel
    assert seen["after"] == [
        was and not is_hidden for was, is_hidden in zip(seen["before"], hidden, strict=True)
    ]
    assert seen["difference"] == [
        ["reducer.name", "exact", "sage"],
        ["seed", "1", "3"],
        ["task.optimizer", "plain", ""],
    ]

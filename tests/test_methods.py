"""docs/methods.md: every reducer has a section, its bytes are the ledger's, its figures are on record."""

import re
from pathlib import Path

import pytest

from reducers import REDUCERS
from sage import yamlfile
from sage.exchange.comm import LocalComm
from tests.cases import CASES, SHAPES, Case, N, Step, run_case

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/methods.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))
FIRST_CASES = {case.reducer: case for case in reversed(CASES)}


def test_every_reducer_has_a_section_with_all_that_is_to_be_said() -> None:
    assert set(SECTIONS) == set(REDUCERS)
    for name, section in SECTIONS.items():
        entries = re.findall(r"^- (Formula|Bytes|Use it|Published|Ours)\b", section, re.MULTILINE)
        assert entries == ["Formula", "Bytes", "Use it", "Published", "Ours"], name


def terms(case: Case, steps: list[Step]) -> dict[str, int]:
    """The page's terms, by hand for SHAPES: sizes 216, 8, 220, 11 and 1; matrices (8, 27) and (20, 11)."""
    assert SHAPES == ((8, 3, 3, 3), (8,), (20, 11), (11,), (1,))
    known = {"n": N, "L": 5, "M": 2, "V": 8 + 11 + 1, "F": 2 * (8 + 27 + 20 + 11), "B": 57}
    known |= {"Q": 2 + 2 + 3, "W": 3, "T": 2}  # buckets of 128; five blocks of 256 for three workers
    known |= {"k": 22, "K": 10 + 1 + 11 + 1 + 1}  # of a density of 0.05
    if case.reducer == "accordion":
        known["K"] = 21 + 22 + 20  # matrices at 0.1, vectors whole
    if case.reducer in ("threshold", "sage", "gaussian_k", "redsync", "sidco"):
        known["s"] = max(int((step.before.abs() >= step.metrics["threshold"]).sum()) for step in steps)
    if case.counts is not None:
        known["s"] = max(case.counts([tuple(steps)]))
    known["U"] = int(steps[0].mean.count_nonzero())
    known["P"] = 3 + 1 + 3 + 1 + 1  # the matrices have more than a third of the elements each
    if case.message is not None:
        known["F"] = max(map(case.message, steps)) // 4 - known["M"] - known["V"]
    return known


@pytest.mark.parametrize("name", FIRST_CASES)
def test_the_formula_for_bytes_is_the_ledger_of_a_step(name: str) -> None:
    case = FIRST_CASES[name]
    steps = [steps[0] for steps in LocalComm.run(3, lambda comm: run_case(case, comm, 1))]
    found = re.search(r"^- Bytes: `([\w +*()]+)`", SECTIONS[name], re.MULTILINE)
    assert found
    expected = eval(found[1], {"__builtins__": {}}, terms(case, steps))
    assert [step.counted["payload_bytes"] for step in steps] == [expected] * 3


NOT_MEASURED = {"block_int", "onebit", "qsgd", "terngrad", "natural"}


def test_a_method_without_figures_says_so() -> None:
    for name, section in SECTIONS.items():
        assert ("- Ours: not measured yet." in section) == (name in NOT_MEASURED), name


def test_our_figures_are_those_of_the_results() -> None:
    results = (ROOT / "benchmarks/results/README.md").read_text()
    table = results[results.index("the digits under every reducer") :]
    for name in set(REDUCERS) - {"exact"} - NOT_MEASURED:
        row = re.search(rf"^\| {name}\b[^|]*\| ([^|]+) \|.*\| ([\d.]+) × less \|$", table, re.MULTILINE)
        ours = SECTIONS[name][SECTIONS[name].index("- Ours") :]
        if "none on record here" in ours:
            assert not row, name
            continue
        assert row, name
        assert row[1] in ours, name
        assert f"{row[2]} times less sent" in ours, name


def test_published_figures_are_on_record() -> None:
    rows = [row for table in yamlfile.read(ROOT / "sage/report/published.yaml") for row in table["rows"]]
    known = {value for row in rows for value in (row.get("value"), row.get("density"))}
    for name, section in SECTIONS.items():
        line = section[section.index("- Published") : section.index("- Ours")]
        figures = {float(number) for number in re.findall(r"0\.\d+|9\d\.\d", line)}
        assert figures <= known | {0.001, 0.00473}, name  # target densities and a threshold

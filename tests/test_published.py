"""Published figures: each belongs to a point of a sweep; the rank table's bytes follow from our payloads."""

from pathlib import Path

import pytest

import reducers
from benchmarks.reduce import LAYOUTS
from run import LOAD_SETTINGS
from sage.config import flatten
from sage.interfaces import lay_out
from sage.report.groups import gather
from sage.report.published import published_sheet, read_tables
from sage.sweep import read
from tests.test_report import SAGE_SECONDS, lines_of, write_run

SWEEPS = Path(__file__).parent.parent / "configs/sweeps"


def test_every_published_figure_belongs_to_a_point_of_a_sweep() -> None:
    found = set()
    for name in ("accuracy", "density", "ablation", "powersgd_ranks"):
        for point in read(SWEEPS / f"{name}.yaml"):
            if "seed=1" in point.overrides:
                config = flatten(LOAD_SETTINGS(point.config, point.overrides).model_dump(mode="json"))
                found |= {id(row) for table in read_tables() if (row := table.find(config))}
    missing = [row for table in read_tables() for row in table.rows if id(row) not in found]
    assert missing == []


@pytest.mark.parametrize("reducer", ["exact", "powersgd"])
def test_the_rank_tables_bytes_follow_from_our_payloads(reducer: str) -> None:
    layout = lay_out((str(index), shape) for index, shape in enumerate(LAYOUTS["resnet18"]()))
    rows = [row for table in read_tables() for row in table.rows if row.mebibytes is not None]
    chosen = [row for row in rows if row.config["reducer.name"] == reducer]
    assert len(chosen) == {"exact": 1, "powersgd": 3}[reducer]
    for row in chosen:
        settings = {"rank": row.config["reducer.rank"]} if reducer == "powersgd" else {}
        built = reducers.build_reducer(reducer, layout, worker=0, **settings)
        ours = row.steps * built.expected_payload_bytes(16) / 2**20
        assert round(ours) == row.mebibytes  # published in whole numbers


@pytest.mark.parametrize(
    ("reducer", "settings", "mebibytes"),
    [("exact", {}, 1023.0), ("powersgd", {"rank": 2}, 7.5), ("powersgd", {"rank": 4}, 14.2)],
)
def test_an_epoch_of_24_steps_of_16_workers_sends_what_was_published_to_a_tenth(
    reducer: str, settings: dict[str, int], mebibytes: float
) -> None:
    layout = lay_out((str(index), shape) for index, shape in enumerate(LAYOUTS["resnet18"]()))
    built = reducers.build_reducer(reducer, layout, worker=0, **settings)
    assert round(24 * built.expected_payload_bytes(16) / 2**20, 1) == mebibytes


def test_ours_stands_beside_the_published_figure(tmp_path: Path) -> None:
    lines = lines_of([0.0012, 0.0012], 2e4, SAGE_SECONDS)  # the last score: 0.75
    settings = {"name": "sage", "density": 0.001, "threshold": 0.00473, "terms": "all"}
    run = write_run(tmp_path / "a", settings, lines, name="cifar10", model="resnet18")
    run.config["epochs"] = 200
    other = write_run(tmp_path / "b", "own:Class", lines, name="cifar10", model="resnet18")
    (section,) = gather([run, other])
    sheet = published_sheet(section)
    assert sheet is not None
    assert sheet.rows == [["sage", "0.7500", "0.944", "-0.194", "0.00120", "0.00142", "-", "-"]]
    assert "Yoon and Oh 2023" in sheet.note
    run.config["epochs"] = 100
    assert published_sheet(section) is None


def test_a_payload_is_compared_over_as_many_steps_as_published(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", {"name": "powersgd", "rank": 4}, lines_of([1.0], 619_000, SAGE_SECONDS))
    run.config.update({"task.name": "cifar10", "task.model": "resnet18"})
    sheet = published_sheet(gather([run])[0])
    assert sheet is not None
    # 24 * 619,000 / 2^20
    assert [row[-2:] for row in sheet.rows] == [["14.2", "14"]]


def test_the_readmes_scores_are_those_on_record() -> None:
    names = ("exact", "topk", "threshold", "sage")
    found = 0
    for line in (SWEEPS.parent.parent / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 8 or not cells[0].startswith("`"):
            continue
        base = SWEEPS.parent / f"{cells[0].strip('`')}.yaml"
        for name, shown in zip(names, cells[2:6], strict=True):
            config = flatten(LOAD_SETTINGS(base, [f"reducer.name={name}"]).model_dump(mode="json"))
            rows = [row for table in read_tables() if (row := table.find(config)) and row.value is not None]
            assert [f"{row.value:g}" for row in rows] == [shown], (base.stem, name)
            found += 1
    assert found == 16

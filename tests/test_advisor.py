"""The advisor: predictions worked by hand, and what the model says of measured exchanges."""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest

from benchmarks.network_model import read_comparisons
from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.network import LATENCY_SECONDS, Call, Link, readable_speed, wire_bytes
from sage.report import __main__ as report
from sage.report import advice, advisor
from sage.report.advice import Network, advise
from sage.report.advisor import BASELINES, GATHERS, REDUCES, Method, Traffic, Workload
from sage.report.groups import gather
from sage.report.runs import ReportError, Run
from tests.cases import CASES, run_case
from tests.test_report import EXACT_SECONDS, SAGE_SECONDS, lines_of, write_run

ROOT = Path(__file__).parent.parent
FRAMES = 1538 / 1448
N = 250_000
Capture = pytest.CaptureFixture[str]


def method(**changes: Any) -> Method:
    given = {
        "label": "x",
        "reducer": "topk",
        "compression_seconds": 0.003,
        "traffic": Traffic(0.0, 1000.0, 0.0),
        "num_reduces": 0,
        "num_gathers": 1,
        "world_size": 4,
        "density": 0.01,
        "union_density": None,
    }
    return Method(**(given | changes))


WORKLOAD = Workload(compute_seconds=0.008, backward_seconds=0.004, num_elements=N, exact_seconds=0.002)
FLAT32, FLAT16, OVERLAPPED32, OVERLAPPED16 = BASELINES


# --- steps ----------------------------------------------------------------------------------------


def test_a_step_is_compute_compression_and_collectives() -> None:
    link = Link(8e6, 0.0)  # a microsecond a byte on the wire
    # 3 messages of 1 kB: 3 ms on the wire
    seconds = advisor.step_seconds(method(), WORKLOAD, link, 4)
    assert seconds == pytest.approx(0.011 + 0.003 * FRAMES, rel=1e-12)
    # 4 n = 1 MB, of which 6 messages of a quarter
    exact = advisor.exact_step_seconds(FLAT32, WORKLOAD, link, 4)
    assert exact == pytest.approx(0.010 + 1.5 * FRAMES, rel=1e-12)
    half = advisor.exact_step_seconds(FLAT16, WORKLOAD, link, 4)
    assert half == pytest.approx(0.010 + 0.75 * FRAMES, rel=1e-12)
    # a single bucket of less than 1 MiB cannot overlap
    assert advisor.exact_step_seconds(OVERLAPPED16, WORKLOAD, link, 4) == pytest.approx(half, rel=1e-12)


def test_a_break_even_is_where_the_bytes_saved_take_as_long_as_the_compression() -> None:
    # 2 W - 2 messages and W - 1 have no latency; 1.5 MB - 3 kB on the wire against 1 ms more
    speed = advisor.break_even_speed(method(), WORKLOAD, FLAT32, 0.0, 4)
    assert speed == pytest.approx(8 * FRAMES * (1.5e6 - 3e3) / 0.001, rel=1e-9)
    half = advisor.break_even_speed(method(), WORKLOAD, FLAT16, 0.0, 4)
    assert half == pytest.approx(8 * FRAMES * (0.75e6 - 3e3) / 0.001, rel=1e-9)
    # exact makes 6 messages, this one 3: 0.3 ms of the 1 ms are made up for
    latency = advisor.break_even_speed(method(), WORKLOAD, FLAT32, 1e-4, 4)
    assert latency == pytest.approx(8 * FRAMES * (1.5e6 - 3e3) / 0.0007, rel=1e-9)


def test_a_method_may_pay_at_no_speed_or_at_every_speed() -> None:
    much = method(traffic=Traffic(0.0, 2e6, 0.0))
    assert advisor.break_even_speed(much, WORKLOAD, FLAT32, 0.0, 4) == 0
    quick = method(compression_seconds=0.001)
    assert advisor.break_even_speed(quick, WORKLOAD, FLAT32, 0.0, 4) == inf


# --- growth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "maximum"), [(1, 0.0), (2, 0.56419), (4, 1.02938), (16, 1.76599), (1000, 3.24144)]
)
def test_the_expected_maximum_is_about_that_of_the_tables(count: int, maximum: float) -> None:
    """Harter 1961, "Expected values of normal order statistics"; Blom's formula is good to 5 % at two."""
    assert advisor.expected_maximum(count) == pytest.approx(maximum, rel=0.05)


def test_padding_grows_as_the_maximum_of_more_workers_does() -> None:
    padded = method(traffic=Traffic(0.0, 1000.0, 200.0))  # the largest is 1000, the mean 800
    (call,) = padded.calls(4)
    assert call == Call("all_gather", pytest.approx(1000, rel=1e-12))
    growth = advisor.expected_maximum(16) / advisor.expected_maximum(4)
    assert padded.calls(16)[0].payload_bytes == pytest.approx(800 * (1 + 0.25 * growth), rel=1e-12)
    assert method().calls(1024)[0].payload_bytes == 1000


@pytest.mark.parametrize(
    ("measured", "expected"),
    [(0.04, 0.16), (0.02, 0.04), (0.01, 0.01)],  # disjoint: 16 times; a root of it; all the same
)
def test_a_union_grows_by_the_power_that_was_measured(measured: float, expected: float) -> None:
    union = method(union_density=measured, num_reduces=1, traffic=Traffic(400.0, 100.0, 0.0))
    assert advisor.union_at(16, union) == pytest.approx(expected, rel=1e-12)
    assert union.calls(16)[0] == Call("all_reduce", pytest.approx(400 * expected / measured, rel=1e-12))
    everything = method(union_density=0.4, density=0.1)
    assert advisor.union_at(1024, everything) == 1


def test_of_disjoint_selections_the_union_stays_and_each_worker_has_its_share() -> None:
    disjoint = method(union_density=0.04, num_reduces=1, traffic=Traffic(400.0, 100.0, 0.0), is_disjoint=True)
    reduced, gathered, *_ = disjoint.calls(4 * disjoint.world_size)
    assert reduced == Call("all_reduce", 400)
    assert gathered.kind == "all_gather"
    assert sum(call.payload_bytes for call in disjoint.calls(4 * disjoint.world_size)) == 400 + 100 / 4


# --- from runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.reducer != "accordion"], ids=str)
def test_the_tables_know_what_kind_of_collective_a_reducer_makes(case: Any) -> None:
    """By the bytes on the wire of four workers, which differ for the two kinds."""
    assert set(REDUCERS) - {"accordion"} == set(REDUCES) | set(GATHERS)
    kind = "all_reduce" if case.reducer in REDUCES else "all_gather"
    for steps in LocalComm.run(4, lambda comm: run_case(case, comm, 2)):
        for counted in (step.counted for step in steps):
            expected = wire_bytes([Call(kind, counted["payload_bytes"])], 4)  # type: ignore[arg-type]
            if case.reducer == "block_int":  # its bytes count the second round again
                expected /= 1 + 1 / 4
            sent, is_mixed = counted["wire_bytes"], case.sends_union
            assert sent < expected if is_mixed else sent == expected


def measured_run(folder: Path, reducer: Any, payload: float, wire: float, size: int = 4, **more: Any) -> Run:
    """A run of two epochs of two steps each, with so many bytes a step."""
    lines = lines_of([0.01, 0.01], payload, SAGE_SECONDS, **more)
    for line in lines:
        if line["kind"] == "epoch":
            line["bytes"] = {
                "payload": 2 * payload,
                "wire": 2 * wire,
                "padding": 2 * more.get("padding", 0.0),
            }
    run = write_run(folder, reducer, lines, size=size)
    run.summary["parameters"] = N
    return run


def exact_run(folder: Path, size: int = 4) -> Run:
    run = write_run(folder, "exact", lines_of([1.0, 1.0], 4.0 * N, EXACT_SECONDS), size=size)
    run.summary["parameters"] = N
    return run


def only_method(*runs: Run) -> Method:
    (section,) = gather(runs)
    ((_, found),) = advisor.methods_of(section)
    return found


def test_a_methods_bytes_are_divided_by_what_is_known_of_it(tmp_path: Path) -> None:
    gathered = only_method(measured_run(tmp_path / "a", "topk", 1000, 3000))
    assert (gathered.traffic, gathered.num_gathers) == (Traffic(0, 1000, 0), 1)
    assert gathered.compression_seconds == pytest.approx(0.003, rel=1e-12)
    reduced = only_method(measured_run(tmp_path / "b", "powersgd", 1000, 1500))
    assert (reduced.traffic, reduced.num_reduces) == (Traffic(1000, 0, 0), 2)
    inner = {"name": "accordion", "inner": "powersgd"}
    wrapped = only_method(measured_run(tmp_path / "w", inner, 1000, 1000, size=2))
    assert (wrapped.traffic, wrapped.reducer) == (Traffic(1000, 0, 0), "accordion")
    # a user's own: 600 reduced and 400 gathered send 1.5 * 600 + 3 * 400
    own = only_method(measured_run(tmp_path / "c", "own:Class", 1000, 2100))
    assert own.traffic == pytest.approx(Traffic(600, 400, 0), rel=1e-12)
    # of two workers both kinds send alike
    assert only_method(measured_run(tmp_path / "d", "own:Class", 1000, 1000, size=2)).traffic == (0, 1000, 0)


def test_what_a_union_reduces_are_its_values(tmp_path: Path) -> None:
    reducer = {"name": "sage", "exchange": "union"}
    found = only_method(measured_run(tmp_path / "a", reducer, 50_000, 99_000, union_density=0.02))
    assert found.traffic == pytest.approx(Traffic(4 * 0.02 * N, 50_000 - 4 * 0.02 * N, 0), rel=1e-12)
    assert (found.num_reduces, found.num_gathers, found.union_density) == (1, 2, 0.02)


def test_compute_is_that_of_exact_for_all_or_as_given(tmp_path: Path) -> None:
    runs = [exact_run(tmp_path / "e"), measured_run(tmp_path / "t", "topk", 1000, 3000)]
    for run in runs[1:]:
        for line in run.epochs:
            line["seconds.forward"] = 99.0
    (section,) = gather(runs)
    workload = advisor.workload_of(section)
    assert workload is not None
    # data 1, forward 2, backward 4, optimizer 1 ms; compression 2
    assert vars(workload) == pytest.approx(vars(WORKLOAD), rel=1e-12)
    faster = advisor.workload_of(section, 0.002)
    assert faster is not None
    assert (faster.compute_seconds, faster.backward_seconds) == pytest.approx((0.002, 0.001), rel=1e-12)


def test_runs_that_tell_nothing_of_a_network_are_an_error(tmp_path: Path) -> None:
    single = gather([exact_run(tmp_path / "e", 1), measured_run(tmp_path / "t", "topk", 0, 0, size=1)])
    with pytest.raises(ReportError, match="a compressor with two workers or more"):
        advise(single, Network(Link(1e9)))


# --- what is said ---------------------------------------------------------------------------------


def test_the_tables_hold_the_numbers_worked_by_hand(tmp_path: Path) -> None:
    runs = [exact_run(tmp_path / "e"), measured_run(tmp_path / "t", "topk", 1000, 3000)]
    (one,) = advise(gather(runs), Network(Link(8e6, 0.0))).values()
    steps, pays, score = advice.advice_sheets(one, 0.75)
    exact, half, topk = 10 + 1500 * FRAMES, 10 + 750 * FRAMES, 11 + 3 * FRAMES
    shown = {row[0]: row[1:] for row in steps.rows}
    assert shown["exact float32"] == [
        "1.50",
        "1,603",
        "1.00x",
        f"{half / exact:.3f}x",
        "1.00x",
        f"{half / exact:.3f}x",
    ]
    assert shown["topk"][:3] == ["0.00300", f"{topk:.1f}", f"{exact / topk:.0f}x"]
    speeds = [8 * FRAMES * saved / 0.001 / 1e9 for saved in (1.5e6 - 3e3, 0.75e6 - 3e3)]
    assert pays.rows == [["topk", *[f"{speed:.3g} Gbit/s" for speed in speeds] * 2]]
    # both reached 0.75 after two epochs of two steps
    assert score.rows[-1] == ["topk", "1 of 1", "4.00", f"{4 * topk / 1000:.4f}", "0.0120"]
    assert score.rows[0][:4] == ["exact float32", "1 of 1", "4.00", f"{4 * exact / 1000:.2f}"]


def test_bytes_to_a_score_are_those_sent_until_it_was_reached(tmp_path: Path) -> None:
    run = measured_run(tmp_path / "t", "topk", 1000, 3000)
    run.epochs[0]["bytes.wire"], run.epochs[1]["bytes.wire"] = 3000, 9000  # of two steps each
    (one,) = advise(gather([exact_run(tmp_path / "e"), run]), Network(Link(8e6, 0.0))).values()
    # the accuracy is 0.5 after the first epoch; on as many workers as there were, the same bytes
    assert advice.score_sheet(one, 0.5).rows[-1][-1] == "0.00300"


def test_the_command_predicts_and_draws(tmp_path: Path, capsys: Capture) -> None:
    for run in (exact_run(tmp_path / "runs/e"), measured_run(tmp_path / "runs/t", "topk", 1000, 3000)):
        summary = json.loads((run.folder / "summary.json").read_text()) | {"parameters": N}
        (run.folder / "summary.json").write_text(json.dumps(summary))
    arguments = [str(tmp_path / "runs"), "--link", "1gbit", "--workers", "16", "--compute-ms", "45"]
    assert report.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "On 1.00 Gbit/s, 50 µs a message: digits, 16 workers" in shown
    assert "compute 45.0 ms" in shown
    assert "Pays below" in (tmp_path / "runs/report.md").read_text()
    assert (tmp_path / "runs/report-digits-4workers-network.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_marks_where_a_method_breaks_even(tmp_path: Path) -> None:
    runs = [exact_run(tmp_path / "e"), measured_run(tmp_path / "t", "topk", 1000, 3000)]
    (one,) = advise(gather(runs), Network(Link(1e9, 0.0))).values()
    drawn = advice.draw_advice(one)
    over_speeds, over_workers = drawn.axes
    assert (over_speeds.get_xscale(), over_speeds.get_xlim()[0] < 1e7 < 4e11 < over_speeds.get_xlim()[1]) == (
        "log",
        True,
    )
    (mark,) = [line for line in over_speeds.get_lines() if line.get_marker() == "x"]
    speed = advisor.break_even_speed(one.methods[0][1], one.workload, OVERLAPPED16, 0.0, 4)
    assert (float(mark.get_xdata()[0]), mark.get_ydata()[0]) == (speed, 1)
    assert f"topk ({readable_speed(speed)})" in [text.get_text() for text in drawn.legends[0].get_texts()]
    assert [int(x) for x in over_workers.get_lines()[1].get_xdata()] == [2**power for power in range(1, 11)]


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--link", "fast", "expected a number and a unit, as in 100mbit"),
        ("--latency", "5", "expected a number and a unit, as in 50us"),
        ("--latency", "0ms", "expected --link SPEED, too"),
        ("--workers", "1", "expected an integer of 2 or more"),
        ("--workers", "16", "expected --link SPEED, too"),
        ("--compute-ms", "0", "expected a number above 0"),
        ("--compute-ms", "45", "expected --link SPEED, too"),
        ("--compute-ms", "nan", "expected a number above 0"),
    ],
)
def test_a_bad_quantity_is_refused_with_what_was_expected(
    option: str, value: str, expected: str, capsys: Capture
) -> None:
    with pytest.raises(SystemExit) as left:
        report.main(["runs", option, value])
    assert left.value.code == 2
    assert expected in " ".join(capsys.readouterr().err.split())


# --- against measurements -------------------------------------------------------------------------


def recorded(name: str) -> list[dict[str, Any]]:
    content = json.loads((ROOT / "benchmarks/results" / name).read_text())
    rows: list[dict[str, Any]] = content if isinstance(content, list) else content["rows"]
    return rows


@pytest.mark.parametrize("layout", ["resnet18", "lstm"])
@pytest.mark.parametrize("link", ["-100mbit", ""])
def test_the_model_is_near_what_was_measured_where_bytes_take_the_time(layout: str, link: str) -> None:
    rows = recorded(f"2026-11-22-network-{layout}{link}.json")
    dense = [row for row in rows if row["reducer"] == "exact"]
    errors = [compared.error for compared in advisor.compare_with_measured(dense)]
    assert len(errors) == 2
    # tens to hundreds of megabytes: what is left are TCP's starts and acknowledgements
    assert all(-0.1 < error < 0.02 for error in errors)
    path = ROOT / f"benchmarks/results/2026-11-22-network-{layout}{link}.json"
    assert len(read_comparisons(path, LATENCY_SECONDS)) == len(rows)

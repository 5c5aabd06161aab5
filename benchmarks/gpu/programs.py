"""Whole programs on the device: the tests that need it, and runs of run.py. Nothing here is a timing."""

import hashlib
import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.published import step_lines
from sage.runfolder.provenance import ROOT

SHORT = ["epochs=1", "log.every=1", "log.tensorboard=false"]
SIMULATED, PROCESSES = ["--simulate", "2"], ["--workers", "2"]
DIGITS = ["configs/digits.yaml", *SHORT]
LSTM = ["configs/python_docs.yaml", *SHORT, "task.train_tokens=20000", *SIMULATED]
RATINGS = ["configs/synthetic_ratings.yaml", *SHORT, *SIMULATED]
REHEARSED = "[sage] or [powersgd] or float32 or topk-lstm"
"""Tests that are tried on a machine without a GPU, a few of each kind."""
POLL_SECONDS = 0.05
LEAST_SECONDS = 10.0
"""A run that has less time than this is left out."""
STOP_AFTER = 8
"""Step lines after which a run is stopped."""


# --- tests ----------------------------------------------------------------------------------------


def run_tests(setup: Setup) -> Iterator[Row]:
    """tests/test_gpu.py and the kernels' tests of their forms for a GPU. On a machine without one a few of
    the first are tried on the CPU."""
    report = setup.folder / "tests.xml"
    files = ["tests/test_gpu.py", *([] if setup.small else ["tests/test_kernels.py"])]
    chosen = ["--rehearse", "-k", REHEARSED] if setup.small else ["-k", "gpu"]
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu or not cluster", *files, *chosen]
    command += [f"--junitxml={report}", "-p", "no:cacheprovider"]
    code, output = _call(command, time.monotonic() + setup.patience * TESTS.seconds - 5)
    if not report.exists():
        raise RuntimeError(f"pytest: {code or 'no report'}, after {output.strip()[-200:]!r}")
    yield from read_tests(report)


def read_tests(report: Path) -> Iterator[Row]:
    """Counts of pytest's outcomes, a row for each test that failed, and the reasons of those that were
    skipped."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        bad = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped")
        outcomes["failed" if bad is not None else "skipped" if skipped is not None else "passed"] += 1
        if bad is not None:
            message = (bad.get("message") or "").strip().splitlines() or [""]
            yield {"check": str(case.get("name")), "failed": message[0][:300]}
        if skipped is not None:
            reasons[str(skipped.get("message"))] += 1
    yield {"passed": outcomes["passed"], "failed tests": outcomes["failed"], "skipped": outcomes["skipped"]}
    for reason, count in reasons.items():
        yield {"skipped because": reason, "tests": count}


def test_checks(setup: Setup) -> list[Check]:
    return [Check("tests/test_gpu.py", partial(run_tests, setup), seconds=TESTS.seconds)]


# --- runs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run of run.py."""

    name: str
    arguments: Sequence[str]
    equals: str | None = None
    """The run that must have given the same weights, bit for bit."""
    is_stopped: bool = False
    """Stopped by SIGTERM after some steps, and resumed."""


def runs_of(setup: Setup) -> list[Run]:
    sage = [*DIGITS, "reducer.name=sage"]
    found = [
        Run("sage, simulated", [*sage, *SIMULATED]),
        Run("sage, simulated again", [*sage, *SIMULATED], equals="sage, simulated"),
        Run("sage, two processes over gloo", [*sage, *PROCESSES], equals="sage, simulated"),
        Run("sage, stopped and resumed", [*sage, *SIMULATED], equals="sage, simulated", is_stopped=True),
    ]
    return [found[0], *found[2:]] if setup.small else found + _more_runs()


def _more_runs() -> list[Run]:
    """The other reducers, and the other families of tasks."""
    found = []
    for reducer in ("topk", "global_topk", "powersgd", "random_k", "sign_norm"):
        words, first = [*DIGITS, f"reducer.name={reducer}"], f"{reducer}, simulated"
        found.append(Run(first, [*words, *SIMULATED]))
        # Over gloo an all-reduce may add in another order than the threads do.
        equals = None if reducer in ("powersgd", "random_k") else first
        found.append(Run(f"{reducer}, two processes over gloo", [*words, *PROCESSES], equals=equals))
    for name, words in (("lstm", LSTM), ("ratings", RATINGS)):
        found += [Run(name, words), Run(f"{name}, again", words, equals=name)]
    return [*found, Run("lstm, stopped and resumed", LSTM, equals="lstm", is_stopped=True)]


def run_all(setup: Setup) -> Iterator[Row]:
    """All runs, several at a time, and whether those that must have the same weights do."""
    runs, ends_at = runs_of(setup), time.monotonic() + setup.patience * RUNS.seconds - 5
    with ThreadPoolExecutor(2 if setup.small else 8) as pool:
        rows = dict(
            zip((run.name for run in runs), pool.map(partial(_run, setup, ends_at), runs), strict=True)
        )
    for run in runs:
        if run.equals is not None and "weights" in rows[run.name]:
            if rows[run.name]["weights"] != rows[run.equals].get("weights"):
                yield {"check": run.name, "failed": f"other weights than of the run {run.equals}"}
            rows[run.name]["the same bits as"] = run.equals
    yield from rows.values()


def _run(setup: Setup, ends_at: float, run: Run) -> Row:
    if time.monotonic() > ends_at - LEAST_SECONDS:
        return {"check": run.name, "left out": "no time was left for it"}
    folder = setup.folder / run.name.replace(" ", "-").replace(",", "")
    command = [sys.executable, "run.py", *run.arguments, "--runs", str(folder), "--threads", "1"]
    stopped_after = _stop(command, folder) if run.is_stopped else None
    problem, output = _call([*command, *(["--resume"] if run.is_stopped else [])], ends_at)
    summaries = list(folder.rglob("summary.json"))
    if problem or not summaries:
        return {"check": run.name, "failed": f"{problem or 'no summary'}, after {output.strip()[-200:]!r}"}
    summary = json.loads(summaries[0].read_text())
    return {
        "run": run.name,
        summary["score"]["name"]: summary["score"]["last"],
        "density": summary["density"]["mean"],
        "weights": _digest(summaries[0].parent / "checkpoints" / "final.pt"),
        "the same bits as": None,
        "stopped after steps": stopped_after,
    }


def _call(command: Sequence[str], ends_at: float) -> tuple[str, str]:
    """Run a program until it ends, or until a time; returns what went wrong, or "", and its output."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            output, _ = process.communicate(timeout=max(0.0, ends_at - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # run.py ends its workers, pytest writes its report
            output, _ = process.communicate()
            return "took too long", output
    return f"exit code {process.returncode}" if process.returncode else "", output


def _stop(command: Sequence[str], folder: Path) -> int:
    """Start a run and stop it by SIGTERM after some steps; returns how many of its lines there were."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and _count_lines(folder) < STOP_AFTER:
            time.sleep(POLL_SECONDS)
        process.send_signal(signal.SIGTERM)
    return _count_lines(folder)


def _count_lines(folder: Path) -> int:
    return sum(len(step_lines(parent)) for parent in folder.glob("*"))


def _digest(file: Path) -> str:
    """The first digits of a hash of all weights' bits."""
    state = torch.load(file, weights_only=True, map_location="cpu")
    bits = b"".join(
        value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for value in state.values()
    )
    return hashlib.sha256(bits).hexdigest()[:12]


def run_checks(setup: Setup) -> list[Check]:
    return [Check("runs", partial(run_all, setup), seconds=RUNS.seconds)]


TESTS = Section("tests", "Those that need a GPU, and those of the kernels' forms for it.", 120, test_checks)
RUNS = Section(
    "runs",
    "Runs of run.py with two workers: in one process in turn, or as two processes that share the GPU over "
    "gloo; again, and stopped and resumed. weights: a hash of the final weights' bits.",
    75,
    run_checks,
)

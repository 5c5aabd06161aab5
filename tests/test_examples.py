"""The example runs as its first lines say, and learns; build_reducer takes what a configuration takes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from reducers import build_reducer
from reducers.sage import Sage
from sage.interfaces import lay_out

ROOT = Path(__file__).parent.parent
LAYOUT = lay_out([("weight", (30, 10)), ("bias", (10,))])


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]])
def test_the_loop_of_ones_own_learns(launcher: list[str]) -> None:
    command = [sys.executable, *launcher, "-m", "examples.own_loop"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    told = re.findall(r"step \d+  loss ([\d.]+)  density ([\d.]+)", done.stdout)
    assert len(told) == 5  # once each, by rank 0
    # Before it learns, the loss of 4 classes is about log 4 = 1.39.
    assert float(told[-1][0]) < 0.7
    assert all(0 < float(density) < 0.25 for _, density in told)  # 0.05 is the target


def test_a_reducer_is_built_from_keywords() -> None:
    reducer = build_reducer("sage", LAYOUT, worker=1, seed=3, density=0.2, exchange="union")
    assert isinstance(reducer, Sage)
    assert (reducer.n, reducer.target_density, reducer.exchange) == (310, 0.2, "union")
    alike, other = (build_reducer("sage", LAYOUT, worker=rank, seed=3) for rank in (1, 2))
    states = [one.state_dict()["law"]["generator"] for one in (reducer, alike, other)]
    assert states[0] == states[1] != states[2]


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("sge", {}, "reducer.name: expected one of .*; did you mean sage?"),
        ("sage", {"densty": 0.1}, "reducer.densty: unknown key; did you mean density?"),
        ("sage", {"density": 2}, r"reducer.density: expected a number in \(0, 1\], got 2"),
    ],
)
def test_a_bad_keyword_is_named(name: str, settings: dict[str, float], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build_reducer(name, LAYOUT, worker=0, **settings)


def test_a_rank_of_factors_is_a_setting_and_no_workers_rank() -> None:
    powersgd = build_reducer("powersgd", LAYOUT, worker=1, rank=2, min_compression_rate=0)
    assert powersgd.expected_payload_bytes(2) == 4 * (2 * (30 + 10) + 10)  # two factors and a vector

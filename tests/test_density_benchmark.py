"""What benchmarks.density and benchmarks.link count."""

import numpy as np
import pytest
import torch

from benchmarks.density import make_entry
from benchmarks.link import Row, shares_within
from sage.exchange.feedback import NoFeedback, NoFeedbackSettings
from sage.interfaces import Progress
from tests.cases import LAYOUT, N, gradient


def test_a_row_of_the_density_benchmark_is_what_a_sort_gives() -> None:
    forgetting = NoFeedback(NoFeedbackSettings(), torch.zeros(N))
    entries = {
        name: make_entry(name, 0.05, "none", LAYOUT, [gradient(0, 0), gradient(1, 0)], forgetting)
        for name in ("global_topk", "sage, 10 x fitted")
    }
    kept, unions, k = [], [], int(0.05 * N)
    for step in range(3):
        gradients = [gradient(rank, step) for rank in range(2)]
        for entry in entries.values():
            entry.take_step(gradients, Progress(0.0, step, 0.1, 3))
        squares = [np.sort(grad.numpy().astype(np.float64) ** 2)[::-1] for grad in gradients]
        kept.append(np.mean([own[:k].sum() / own.sum() for own in squares]))
        unions.append(len(torch.cat([grad.abs().topk(k).indices for grad in gradients]).unique()) / N)
    row = entries["global_topk"].row("toy", N, [])
    assert row.densities == [float(f"{k / N:.4g}")] * 3
    assert (row.counts, row.padding) == (1.0, 1.0)
    assert row.bias == pytest.approx(k / N / 0.05 - 1, rel=1e-12)
    assert row.union == pytest.approx(np.mean(unions), rel=1e-12)
    # Norms are of float32 with N = 545 squares: (N + 2) 2^-24 = 3.3e-5 at most, each.
    assert row.energy == pytest.approx(np.mean(kept), abs=1e-4)
    assert entries["sage, 10 x fitted"].row("toy", N, []).densities[0] < 0.1 * k / N  # too high a threshold


def test_the_first_steps_of_a_run_and_of_each_rate_are_not_counted() -> None:
    # What a row says of times is the step before's: the steps 0 to 24 of each rate take too long.
    rows = [Row("1gbit", 0.0, 0.1, 0.1, 0.0, 1.0, 10.0, 2.0, 0.0)]
    for index in range(60):
        rows.append(Row("1gbit", 0.0, 0.1, 0.1, 0.0, 3.0 if index % 30 < 25 else 1.0, 10.0, 2.0, 0.0))
    whole, settled = shares_within(rows, 0.2, 30)
    assert whole == 10 / 40
    assert settled == 10 / 20

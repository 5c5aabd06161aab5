"""The scan: every form of it gives the bits of numpy's whole-vector operations."""

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers.kernels import scan as kernel
from reducers.kernels.scan import CHUNK, FORMS, scan, scan_whole
from sage.exchange.comm import LocalComm
from tests.cases import CASES, Case, run_case

every_form = pytest.mark.parametrize("form", FORMS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def odd_pair(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What is to be sent and a gradient (n,): with NaN and infinities that may cancel."""
    rng = torch.Generator().manual_seed(n)
    send, grad = (torch.randn(n, generator=rng, dtype=dtype) for _ in range(2))
    send[:: max(1, n // 11)] = float("nan")
    send[1 :: max(1, n // 7)] = float("inf")
    grad[1 :: max(1, n // 3)] = float("-inf")
    return send, grad


@every_form
@every_dtype
@pytest.mark.parametrize("n", [0, 1, 7, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
@pytest.mark.parametrize("with_grad", [True, False])
@pytest.mark.parametrize("selects_nan", [True, False])
def test_a_form_adds_and_lists_what_numpy_does(
    form: str, n: int, dtype: torch.dtype, with_grad: bool, selects_nan: bool
) -> None:
    send, grad = odd_pair(n, dtype)
    given = grad if with_grad else None
    with np.errstate(invalid="ignore"):
        total = send.numpy() + grad.numpy() if with_grad else send.numpy()
    for bound in (0.0, 0.5, 2.0, 1e30, float("inf"), float("nan")):
        limit = torch.tensor(bound, dtype=dtype)
        reached = np.abs(total) >= limit.numpy()
        if selects_nan:
            reached |= np.isnan(total) | np.isnan(bound)
        own = send.clone()
        found = FORMS[form](own, given, limit, selects_nan)
        assert found.dtype == torch.int64
        assert found.tolist() == np.flatnonzero(reached).tolist()
        assert own.numpy().tobytes() == total.tobytes()
        assert grad.numpy().tobytes() == odd_pair(n, dtype)[1].numpy().tobytes()


def test_the_scan_adds_and_finds_what_reaches_the_bound() -> None:
    send = torch.tensor([1.0, -2.0, 0.5, float("nan"), -0.75, 3.0])
    grad = torch.tensor([0.0, 1.0, 0.5, 1.0, -0.25, -3.0])
    found = scan(send, grad, torch.tensor(1.0))
    assert found.tolist() == [0, 1, 2, 4]
    assert send.nan_to_num(9).tolist() == [1.0, -1.0, 1.0, 9.0, -1.0, 0.0]
    assert grad.tolist() == [0.0, 1.0, 0.5, 1.0, -0.25, -3.0]


@pytest.mark.parametrize("case", [case for case in CASES if case.reducer in ("sage", "threshold")], ids=str)
def test_training_has_the_same_bits_with_either_form(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = LocalComm.run(2, lambda comm: run_case(case, comm, 20))
    monkeypatch.setattr(kernel, "form_for", lambda device: scan_whole)  # as on a GPU
    whole = LocalComm.run(2, lambda comm: run_case(case, comm, 20))
    for a, b in zip(chunks[0] + chunks[1], whole[0] + whole[1], strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.after, b.after)
        assert a.metrics == b.metrics

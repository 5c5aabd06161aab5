"""The kernels: every form of them gives the bits of numpy's whole-vector operations.

Triton's forms run in its interpreter where there is no GPU.
"""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reducers import kernels
from reducers.kernels import Division, Found, plain
from sage.exchange.comm import LocalComm
from tests.cases import CASES, Case, run_case

ROOT = Path(__file__).parent.parent
BLOCK = 4096  # elements of a chunk on the CPU, and of a program on a GPU
SIZES = [0, 1, 9, BLOCK, 2 * BLOCK + 5]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
silent = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


@pytest.fixture(params=["plain", "cpu", "gpu"])
def form(request: pytest.FixtureRequest) -> ModuleType:
    """A module of kernels."""
    return import_module(f"reducers.kernels.{request.param}")


@pytest.fixture
def device(form: ModuleType) -> torch.device:
    return torch.device("cuda" if form.__name__.endswith("gpu") and torch.cuda.is_available() else "cpu")


def odd_pair(n: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """What is to be sent and a gradient (n,): with NaN, infinities that may cancel, zeros of both signs,
    numbers below the normal ones, sums that overflow, and clusters."""
    rng = np.random.default_rng(n)
    numbers = torch.empty(0, dtype=dtype).numpy().dtype
    send, grad = (rng.standard_normal(n).astype(numbers) for _ in range(2))
    for pair, (a, b) in enumerate(
        [(np.nan, 1), (np.inf, -np.inf), (0.0, -0.0), (-0.0, -0.0), (1e-42, 0), (3e38, 3e38), (2, 0)]
    ):
        send[pair :: max(1, n // (pair + 3))], grad[pair :: max(1, n // (pair + 3))] = a, b
    send[n // 2 : n // 2 + 70] = 5
    return send, grad


def cut(n: int) -> Division:
    """n elements in parts: none, a block, one, the others, none."""
    return Division([0, 0, min(n, BLOCK), min(n, BLOCK + 1), n, n])


def same(a: Tensor, b: np.ndarray) -> bool:
    """Equal bit for bit, but for the sign and payload of NaN."""
    ours = a.cpu().numpy()
    return bool(
        np.array_equal(np.isnan(ours), np.isnan(b))
        and (ours[~np.isnan(b)].tobytes() == b[~np.isnan(b)].tobytes())
    )


@silent
@every_dtype
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("given", ["kept", "zeroed", "none"])
@pytest.mark.parametrize("selects_nan", [True, False])
def test_a_scan_adds_and_lists_what_numpy_does(
    form: ModuleType, device: torch.device, n: int, dtype: torch.dtype, given: str, selects_nan: bool
) -> None:
    send, grad = odd_pair(n, dtype)
    with np.errstate(all="ignore"):
        total = send + grad if given != "none" else send.copy()
    division = cut(n)
    for start in (0.0, 0.5, 5.0, np.inf, np.nan):
        bounds = (start + np.arange(division.num_parts) % 2).astype(send.dtype)
        bound = np.repeat(bounds, division.edges.diff().numpy())
        reached = ~(np.abs(total) < bound) if selects_nan else np.abs(total) >= bound
        own, added = (torch.from_numpy(x.copy()).to(device) for x in (send, grad))
        found, magnitudes, counts = form.scan(
            own,
            None if given == "none" else added,
            torch.from_numpy(bounds).to(device),
            division,
            selects_nan,
            given == "zeroed",
        )
        assert found.dtype == counts.dtype == torch.int64
        assert found.tolist() == np.flatnonzero(reached).tolist()
        edges = itertools.pairwise(division.edges.tolist())
        assert counts.tolist() == [reached[first:last].sum() for first, last in edges]
        assert same(magnitudes, np.abs(total[reached]))
        assert same(own, total)
        assert same(added, np.zeros_like(grad) if given == "zeroed" else grad)


@silent
@every_dtype
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("room", [0, 5, 10**6])
@pytest.mark.parametrize("form", ["plain", "gpu"], indirect=True)  # the CPU counts its candidates
def test_a_scan_into_slots_lists_what_fits(
    form: ModuleType, device: torch.device, n: int, dtype: torch.dtype, room: int
) -> None:
    send, grad = (torch.from_numpy(x).to(device) for x in odd_pair(n, dtype))
    division = cut(n)
    sizes = [min(room, size) for size in division.edges.diff().tolist()]
    rooms = Division([0, *itertools.accumulate(sizes)])
    bounds = torch.full((division.num_parts,), 2.0, dtype=dtype, device=device)
    slots, counts = form.scan_into(send, grad, bounds, division, rooms, True)
    assert grad.count_nonzero() == 0
    reached = ~(np.abs(send.cpu().numpy()) < 2)
    expected = []
    for (first, last), count, size in zip(
        itertools.pairwise(division.edges.tolist()), counts.tolist(), sizes, strict=True
    ):
        found = (first + np.flatnonzero(reached[first:last])).tolist()
        assert count == len(found)
        expected += (found + [-1] * size)[:size]
    assert slots.tolist() == expected


@every_dtype
def test_the_largest_are_kept_and_the_first_of_equal_ones(
    form: ModuleType, device: torch.device, dtype: torch.dtype
) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(0, 9, size=3)
        magnitudes = rng.choice([0.0, 1.0, 2.0, np.inf, np.nan], size=sizes.sum())
        indices = np.sort(rng.choice(1000, size=sizes.sum(), replace=False))
        ks, thresholds, expected = [], [], []
        for part, size in enumerate(sizes):
            own = slice(sizes[:part].sum(), sizes[:part].sum() + size)
            order = np.argsort(-np.nan_to_num(magnitudes[own], nan=1e300, posinf=1e200), kind="stable")
            ks.append(int(rng.integers(0, size + 1)))
            kept = order[: ks[-1]]
            thresholds.append(magnitudes[own][kept[-1]] if ks[-1] else np.nan)
            expected += indices[own][np.sort(kept)].tolist()
        found = Found(
            torch.from_numpy(indices).to(device),
            torch.from_numpy(magnitudes).to(device, dtype),
            torch.from_numpy(sizes).to(device),
        )
        kept = form.keep_largest(
            found,
            torch.tensor(thresholds, dtype=dtype, device=device),
            torch.tensor(ks, device=device),
        )
        assert kept.tolist() == expected


@every_dtype
@pytest.mark.parametrize("k", [0, 1, 1023, 1024, 2000])
def test_what_is_taken_leaves_zero(
    form: ModuleType, device: torch.device, dtype: torch.dtype, k: int
) -> None:
    send = odd_pair(3000, dtype)[0]
    indices = np.random.default_rng(k).permutation(3000)[:k]
    own = torch.from_numpy(send.copy()).to(device)
    values = torch.full((k,), 7, dtype=dtype, device=device)
    form.take(own, torch.from_numpy(indices).to(device), values)
    left = send.copy()
    left[indices] = 0
    assert same(values, send[indices])
    assert same(own, left)


@silent
@every_dtype
@pytest.mark.parametrize("world_size", [1, 3, 7])
@pytest.mark.parametrize("indices_dtype", [torch.int32, torch.int64])
def test_messages_are_added_in_rank_order(
    form: ModuleType, device: torch.device, dtype: torch.dtype, world_size: int, indices_dtype: torch.dtype
) -> None:
    mean, expected = torch.zeros(3000, dtype=dtype, device=device), odd_pair(3000, dtype)[0] * 0
    expected[:] = 0
    for rank in range(world_size):
        k = [2000, 0, 1][rank % 3]
        indices, values = np.random.default_rng(rank).permutation(3000)[:k], odd_pair(k, dtype)[1]
        places = torch.from_numpy(indices).to(device, indices_dtype)
        form.add_share(mean, places, torch.from_numpy(values).to(device), world_size)
        expected[indices] += values / values.dtype.type(world_size)
    assert same(mean, expected)


@pytest.mark.parametrize("form", ["plain", "cpu"], indirect=True)
@pytest.mark.parametrize("wrong", [-1, 5])
def test_an_index_outside_of_the_gradient_is_an_error(form: ModuleType, wrong: int) -> None:
    indices, values = torch.tensor([2, wrong]), torch.ones(2)
    with pytest.raises(IndexError):
        form.take(torch.ones(5), indices, values)
    with pytest.raises(IndexError):
        form.add_share(torch.ones(5), indices, values, 1)


def test_a_gpus_kernels_are_started_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, current = import_module("reducers.kernels.gpu"), list[Tensor]()
    started: list[tuple[str, bool]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    class Noted:
        """A kernel that notes whether the current device is that of one of its tensors."""

        def __init__(self, name: str, kernel: Any) -> None:
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid: Any) -> Any:
            def start(*given: Any) -> None:
                started.append((self.name, any(x is current[-1] for x in given)))
                self.kernel[grid](*given)

            return start

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    names = ["_mark_kernel", "_place_kernel", "_take_kernel", "_add_share_kernel"]
    for name in names:
        monkeypatch.setattr(gpu, name, Noted(name, getattr(gpu, name)))
    send, values = torch.ones(9), torch.ones(9)
    found = gpu.scan(send, None, torch.ones(1), Division([0, 9]), False, False)
    gpu.take(send, found.indices, values)
    gpu.add_share(send, found.indices, values, 2)
    assert started == [(name, True) for name in names]


GATHERING = [case for case in CASES if case.reducer in ("sage", "threshold", "topk", "global_topk")]


@pytest.mark.parametrize("case", GATHERING, ids=str)
def test_training_has_the_same_bits_with_either_form(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = LocalComm.run(2, lambda comm: run_case(case, comm, 20))
    monkeypatch.setattr(kernels, "form_for", lambda device: plain)
    whole = LocalComm.run(2, lambda comm: run_case(case, comm, 20))
    for a, b in zip(compiled[0] + compiled[1], whole[0] + whole[1], strict=True):
        assert torch.equal(a.mean, b.mean)
        assert torch.equal(a.after, b.after)
        assert a.metrics == b.metrics


def test_what_answers_at_once_does_not_wait_for_numba() -> None:
    command = [sys.executable, "-X", "importtime", "run.py", "configs/digits.yaml", "reducer.name=sage"]
    shown = subprocess.run(
        [*command, "--print-config"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "reducers.sparse" in imported
    assert not {"numba", "triton"} & imported


def test_where_no_folder_can_be_written_the_cpus_forms_are_compiled_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numba, cpu = import_module("numba"), import_module("reducers.kernels.cpu")
    really = numba.njit

    def njit(*functions: Any, cache: bool = False, **given: Any) -> Any:
        if cache:
            raise RuntimeError("no locator available")  # as numba does
        return really(*functions, **given)

    monkeypatch.setattr(numba, "njit", njit)
    assert cpu.compiled(lambda x: x + 1)(2) == 3

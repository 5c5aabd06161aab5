"""The contracts every reducer keeps, over the one table of cases."""

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sage.exchange.comm import LocalComm
from tests.cases import CASES, LAYOUT, Case, Law, N, Step, gradient, layout_of, run_case, run_steps

every_case = pytest.mark.parametrize("case", CASES, ids=str)


def every_case_that_promises(law: Law) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [case for case in CASES if law not in case.unpromised], ids=str)


WORLD_SIZES = (1, 2, 3, 4)
every_world_size = pytest.mark.parametrize("world_size", WORLD_SIZES)
EPSILON = 2.0**-24
"""The relative error of one float32 operation."""


def in_threads(case: Case, world_size: int, num_steps: int = 6) -> list[list[Step]]:
    """[rank][step]"""
    return LocalComm.run(world_size, lambda comm: run_case(case, comm, num_steps))


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN and the sign of zero included."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def assert_is_mean(mean: Tensor, parts: list[Tensor], slack: float = 0.0) -> None:
    """mean is the average of parts up to float32 rounding, and an absolute slack.

    A division, or a multiplication by 1/W, which is rounded itself, and W - 1 additions, each of relative
    error EPSILON: at most (W + 1) EPSILON sum|x_i| / W to first order; the second order is below 1 % of it.
    """
    exact = torch.stack(parts).double().mean(0)
    count = (len(parts) + 1) / len(parts)
    bound = 1.01 * count * EPSILON * torch.stack(parts).double().abs().sum(0) + slack
    assert ((mean.double() - exact).abs() <= bound).all()


def slack_of(case: Case, sends: list[Tensor]) -> float:
    """The row's rounding, times the largest magnitude that any worker was given."""
    return case.rounding * max(send.abs().max().item() for send in sends)


@every_case
@every_world_size
def test_replicas_agree_bit_for_bit(case: Case, world_size: int) -> None:
    workers = in_threads(case, world_size)
    for steps in zip(*workers, strict=True):
        assert all(same_bits(step.mean, steps[0].mean) for step in steps)
        assert len({step.density for step in steps}) == 1


@every_case
def test_two_runs_give_the_same_bits(case: Case) -> None:
    for first, second in zip(in_threads(case, 3), in_threads(case, 3), strict=True):
        for a, b in zip(first, second, strict=True):
            assert same_bits(a.mean, b.mean)
            assert same_bits(a.after, b.after)
            assert a.metrics == b.metrics


@every_case
def test_six_steps_are_three_and_a_reload_and_three(case: Case) -> None:
    def resumed(comm: LocalComm) -> list[Step]:
        reducer, memory = case.build(rank=comm.rank), torch.zeros(N)
        first = run_steps(reducer, comm, range(3), memory)
        file = io.BytesIO()
        torch.save({"reducer": reducer.state_dict(), "memory": memory}, file)
        run_steps(reducer, comm, range(7, 9), memory)  # the saved state must not follow the living one
        file.seek(0)
        state = torch.load(file, weights_only=True)
        reloaded = case.build(rank=comm.rank + 10)  # other seeds: what repeats must come from the state
        reloaded.load_state_dict(state["reducer"])
        return first + run_steps(reloaded, comm, range(3, 6), state["memory"])

    for straight, broken in zip(in_threads(case, 2), LocalComm.run(2, resumed), strict=True):
        for a, b in zip(straight, broken, strict=True):
            assert same_bits(a.mean, b.mean)
            assert same_bits(a.after, b.after)
        assert not same_bits(straight[2].mean, straight[5].mean)


@every_case_that_promises("conservation")
@every_world_size
def test_what_left_send_arrives_in_mean(case: Case, world_size: int) -> None:
    workers = in_threads(case, world_size)
    for steps in zip(*workers, strict=True):
        slack = slack_of(case, [step.before for step in steps])
        assert_is_mean(steps[0].mean, [step.before - step.after for step in steps], slack)
        assert any(step.mean.count_nonzero() for step in steps)


@every_case
def test_one_worker_needs_no_collective_and_gets_what_it_sent(case: Case) -> None:
    (steps,) = in_threads(case, 1)
    for step in steps:
        if "conservation" not in case.unpromised:
            off = (step.mean - (step.before - step.after)).abs().max().item()
            assert off <= slack_of(case, [step.before])
        assert not any(step.counted.values())


@pytest.mark.parametrize("case", [case for case in CASES if case.exact_with is not None], ids=str)
@every_world_size
def test_everything_selected_is_exact(case: Case, world_size: int) -> None:
    def first_step(comm: LocalComm) -> Step:
        reducer = case.build(rank=comm.rank, changes=case.exact_with)
        return run_steps(reducer, comm, range(1), torch.zeros(N))[0]

    steps = LocalComm.run(world_size, first_step)
    sends = [gradient(rank, 0) for rank in range(world_size)]
    slack = slack_of(case, sends)
    assert_is_mean(steps[0].mean, sends, slack)
    assert all(step.density == 1 for step in steps)
    if "conservation" not in case.unpromised:
        # Of a low-rank method's residuals only the mean is zero: the factors span the mean's columns.
        rests = [step.after for step in steps] if case.rounding == 0 else []
        assert all(rest.count_nonzero() == 0 for rest in rests)
        assert torch.stack([step.after for step in steps]).mean(0).abs().max() <= slack


class SpyComm(LocalComm):
    """Notes the bytes of every tensor that a collective really gets."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.handed: list[int] = []

    def _all_reduce(self, x: Tensor, op: str) -> None:
        self.handed.append(x.nbytes)
        super()._all_reduce(x, op)

    def _all_gather(self, x: Tensor) -> Tensor:
        self.handed.append(x.nbytes)
        return super()._all_gather(x)

    def _all_to_all(self, x: Tensor) -> Tensor:
        self.handed.append(x.nbytes)
        return super()._all_to_all(x)

    def _broadcast(self, x: Tensor, source: int) -> None:
        self.handed.append(x.nbytes)
        super()._broadcast(x, source)


def counts_of(case: Case, history: list[tuple[Step, ...]]) -> list[int]:
    """How many elements each worker should have selected in the last of these steps, from what it wanted to
    send."""
    if case.counts is not None:
        return case.counts(history)
    assert case.count is not None
    return [case.count(step.before, step.metrics) for step in history[-1]]


def expected_ledger(case: Case, history: list[tuple[Step, ...]], rank: int) -> dict[str, float]:
    """The row's collectives; or 4 for the sizes and the longest ragged message; or the broadcast that there
    may be, 4 where sizes are sent, then 8 kmax (gather) or 4 kmax + 4 |union|; padding up to the longest; the
    ring's bytes."""
    steps, number = history[-1], len(history) - 1
    world_size = len(steps)
    ring_reduce, ring_gather = 2 * (world_size - 1) / world_size, world_size - 1
    if case.collectives is not None:
        collectives = case.collectives_at.get(number, case.collectives)
        collectives = collectives(world_size) if callable(collectives) else collectives
        factors = {"all_reduce": ring_reduce, "all_gather": ring_gather}
        factors |= dict.fromkeys(("all_to_all", "broadcast"), ring_reduce / 2)
        return {
            "num_collectives": len(collectives),
            "payload_bytes": sum(handed for _, handed in collectives),
            "padding_bytes": 0,
            "wire_bytes": sum(factors[kind] * handed for kind, handed in collectives),
        }
    if case.message is not None:
        lengths = [case.message(step) for step in steps]
        payload = 4 + max(lengths)
        padding, wire = max(lengths) - lengths[rank], payload * ring_gather
        return {"num_collectives": 2, "payload_bytes": payload, "padding_bytes": padding, "wire_bytes": wire}
    counts = counts_of(case, history)
    longest, sizes = max(counts), 4 * case.sends_sizes
    num_gathers = 1 + case.sends_sizes
    if not case.sends_union:
        payload = sizes + 8 * longest
        padding = 8 * (longest - counts[rank])
        wire = payload * ring_gather
        return {
            "num_collectives": num_gathers,
            "payload_bytes": payload,
            "padding_bytes": padding,
            "wire_bytes": wire,
        }
    union = int(steps[0].mean.count_nonzero())
    gathered, reduced = sizes + 4 * longest, 4 * union
    told = case.decision(world_size) if case.decision else 0
    return {
        "num_collectives": num_gathers + 1 + (told > 0),
        "payload_bytes": told + gathered + reduced,
        "padding_bytes": 4 * (longest - counts[rank]),
        "wire_bytes": told * ring_reduce / 2 + gathered * ring_gather + reduced * ring_reduce,
    }


@every_case
@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
def test_the_ledger_is_the_closed_formula_and_the_tensors_bytes(case: Case, world_size: int) -> None:
    def spied(comm: LocalComm) -> tuple[list[Step], list[int]]:
        assert isinstance(comm, SpyComm)
        return run_case(case, comm, 6), comm.handed

    workers = SpyComm.run(world_size, spied)
    history = list(zip(*(steps for steps, _ in workers), strict=True))
    for number, steps in enumerate(history):
        for rank, step in enumerate(steps):
            expected = expected_ledger(case, history[: number + 1], rank)
            assert step.counted == pytest.approx(expected, rel=1e-15)
    for steps, handed in workers:
        assert sum(handed) == sum(step.counted["payload_bytes"] for step in steps)
        assert len(handed) == sum(step.counted["num_collectives"] for step in steps)


@every_case
def test_density_is_the_share_of_selected_elements(case: Case) -> None:
    history = list(zip(*in_threads(case, 3), strict=True))
    for number, steps in enumerate(history):
        counts = counts_of(case, history[: number + 1]) if case.is_sparse else [N] * 3
        assert steps[0].density == sum(counts) / (3 * N)
        if case.is_sparse:
            assert steps[0].metrics["union_density"] == int(steps[0].mean.count_nonzero()) / N


@pytest.mark.parametrize("case", [c for c in CASES if c.collectives or c.fixed_count], ids=str)
def test_the_expected_payload_is_what_a_step_of_fixed_density_sends(case: Case) -> None:
    for steps in in_threads(case, 2, num_steps=2):
        expected = case.build().expected_payload_bytes(2)
        sent = steps[0].counted["payload_bytes"]
        is_fixed = case.collectives is not None or not case.sends_union
        assert sent == expected if is_fixed else sent <= expected
    assert case.build().expected_payload_bytes(1) == 0


@every_case
def test_the_global_random_state_is_untouched(case: Case) -> None:
    def states() -> tuple[bytes, object, bytes]:
        return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()[1].tobytes()

    before = states()
    run_case(case, LocalComm.alone(), 3)
    assert states() == before


# --- gloo processes = threads ---


@pytest.fixture(scope="module", params=[2, 3])
def gloo_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """[rank][case] -> the steps as tuples; one process group runs all rows that are selected."""
    folder = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, "-m", "tests.gloo_worker"]
    root = Path(__file__).parent.parent
    users = [item for item in request.session.items if "gloo_run" in getattr(item, "fixturenames", ())]
    rows = sorted({str(item.callspec.params["case"]) for item in users})  # type: ignore[attr-defined]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(request.param), str(folder / "rendezvous"), str(folder), *rows],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(request.param)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), errors
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


@every_case
def test_gloo_processes_are_threads(case: Case, gloo_run: list[dict]) -> None:
    world_size = len(gloo_run)
    threads = in_threads(case, world_size)
    for rank in range(world_size):
        processes = [Step(*step) for step in gloo_run[rank][str(case)]]
        if case.gathers_only:
            for a, b in zip(processes, threads[rank], strict=True):
                assert same_bits(a.mean, b.mean)
                assert same_bits(a.after, b.after)
                assert (a.counted, a.metrics, a.density) == (b.counted, b.metrics, b.density)
        else:
            # From equal state the sums may be added in another order: 2 (W - 1) EPSILON sum|x_i| an element,
            # and mean is 1/W of the sum.
            magnitude = sum(gradient(other, 0).abs() for other in range(world_size))
            bound = 2 * (world_size - 1) * EPSILON * magnitude / world_size
            bound += slack_of(case, [gradient(other, 0) for other in range(world_size)])
            assert ((processes[0].mean - threads[rank][0].mean).abs() <= bound).all()
            assert processes[0].counted == threads[rank][0].counted
        for mine, theirs in zip(processes, gloo_run[0][str(case)], strict=True):
            assert same_bits(mine.mean, Step(*theirs).mean)


# --- odd inputs ---


def first_steps(case: Case, sends: list[Tensor], layout: list = LAYOUT) -> list[Step]:
    """One step from the given gradients, one a worker."""

    def worker(comm: LocalComm) -> Step:
        reducer = case.build(layout, rank=comm.rank)
        memory = torch.zeros(layout[-1].stop)
        return run_steps(reducer, comm, range(1), memory, lambda rank, _: sends[rank])[0]

    return LocalComm.run(len(sends), worker)


@every_case_that_promises("zeros")
def test_zeros_give_zeros_and_training_goes_on(case: Case) -> None:
    def zeros_then_gradients(comm: LocalComm) -> list[Step]:
        def some(rank: int, step: int) -> Tensor:
            return torch.zeros(N) if step < 2 else gradient(rank, step)

        return run_steps(case.build(rank=comm.rank), comm, range(4), torch.zeros(N), some)

    for steps in LocalComm.run(2, zeros_then_gradients):
        assert steps[0].mean.count_nonzero() == steps[0].after.count_nonzero() == 0
        assert steps[2].mean.count_nonzero() > 0
        # All-zero buffers move no threshold: neither to zero (everything sent) nor away (nothing ever sent).
        assert steps[1].metrics.get("threshold") == steps[0].metrics.get("threshold")


@every_case_that_promises("one huge value")
def test_one_huge_value_arrives(case: Case) -> None:
    sends = [gradient(0, 0), gradient(1, 0)]
    sends[1][36] = -3e37
    for step in first_steps(case, sends):
        assert step.mean[36].item() == pytest.approx(-1.5e37, rel=4 * EPSILON + 2 * case.rounding)
        assert step.mean.isfinite().all()


@every_case_that_promises("one element")
def test_a_gradient_of_one_element_works(case: Case) -> None:
    steps = first_steps(case, [torch.tensor([2.0]), torch.tensor([4.0])], layout_of(((1,),)))
    assert [step.mean.item() for step in steps] == [3.0, 3.0]


@every_case_that_promises("a worker without gradient")
def test_a_worker_may_have_nothing_to_send(case: Case) -> None:
    steps = first_steps(case, [gradient(0, 0), torch.zeros(N)])
    assert same_bits(steps[0].mean, steps[1].mean)
    slack = slack_of(case, [gradient(0, 0)])
    assert_is_mean(steps[0].mean, [step.before - step.after for step in steps], slack)
    assert steps[0].mean.count_nonzero() > 0


@every_case
def test_nan_goes_where_the_table_says(case: Case) -> None:
    sends = [gradient(0, 0), gradient(1, 0)]
    sends[1][36] = float("nan")
    steps = first_steps(case, sends)
    assert same_bits(steps[0].mean, steps[1].mean)
    in_mean, in_send = steps[0].mean.isnan(), steps[1].after.isnan()
    assert bool(in_mean[36]) == (case.nan in ("sent", "spreads"))
    assert in_mean.sum() <= 1 or case.nan == "spreads"
    assert not in_mean[LAYOUT[0].stop :].any()  # it stays in its tensor
    if case.nan in ("sent", "kept"):
        assert bool(in_send[36]) == (case.nan == "kept")

"""The exact mean in half precision: what it rounds, what it keeps."""

import pytest
import torch
from torch import Tensor

import reducers
from reducers.exact import Exact, ExactSettings
from sage.exchange.comm import LocalComm
from sage.interfaces import Progress, Seeds
from tests.cases import layout_of


def one_step(values: list[float], dtype: str) -> list[tuple[float, float]]:
    """The mean and what is left of one element, a worker each."""

    def worker(comm: LocalComm) -> tuple[float, float]:
        config = ExactSettings.model_validate({"dtype": dtype})
        reducer = Exact(config, layout_of(((1,),)), seeds=Seeds.derive(1, 0), device=torch.device("cpu"))
        send = torch.tensor([values[comm.rank]])
        mean: Tensor = send.clone()
        reducer.reduce(send, mean, comm)
        return mean.item(), send.item()

    return LocalComm.run(len(values), worker)


@pytest.mark.parametrize("world_size", range(1, 10))
def test_what_float16_cannot_hold_is_sent_as_far_as_it_can_and_the_rest_stays(world_size: int) -> None:
    for mean, rest in one_step([70000.0] * world_size, "float16"):
        # float16 rounds each of q, W q and the W - 1 sums by at most 2^-11.
        assert mean == pytest.approx(32752, rel=(world_size + 1) * 2.0**-11)
        assert mean + rest == pytest.approx(70000, rel=(world_size + 1) * 2.0**-11)


def test_the_rounding_of_a_worker_stays_with_it() -> None:
    # bfloat16 has 8 bits: of 257 / 2 = 128.5 it holds 128 (ties to even), of 3 / 2 all.
    assert one_step([257.0, 3.0], "bfloat16") == [(129.0 + 1, 1.0), (129.0 + 1, 0.0)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_feedback_that_forgets_changes_no_bit_no_norm_and_no_byte(world_size: int) -> None:
    """Nothing is left in float32: with a memory of zeros, or with none at all, the same is sent."""
    layout = layout_of(((5, 7), (3,)))

    def worker(comm: LocalComm, feedback: str) -> tuple[Tensor, dict[str, float], dict[str, float]]:
        grad = torch.randn(38, generator=torch.Generator().manual_seed(comm.rank))
        exchange = reducers.build_exchange("exact", layout, grad, comm, feedback=feedback)
        for step in range(2):
            norms = exchange.average(grad, Progress(0.0, step, 0.1, 2), measure=True)
        assert norms is not None
        return grad, norms.read(), comm.ledger.take()

    for ours, theirs in zip(
        LocalComm.run(world_size, lambda comm: worker(comm, "none")),
        LocalComm.run(world_size, lambda comm: worker(comm, "residual")),
        strict=True,
    ):
        assert torch.equal(ours[0], theirs[0])
        assert ours[0].any()
        assert ours[1:] == theirs[1:]

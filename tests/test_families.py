"""Every task with embedded data under every reducer, through the real trainer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from reducers import REDUCERS
from sage.exchange.comm import LocalComm
from sage.interfaces import Place, Seeds, Task
from tasks import TASKS
from tests.toy import settings_of, train

NO_DATA = Path("no data")
WORLD_SIZE = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "digits": {"batch_per_worker": 359},  # 1,437 images: two steps
    "python_docs": {  # 8 columns of 21 tokens: two steps of 10
        "batch_per_worker": 4,
        "bptt": 10,
        "train_tokens": 168,
        "units": 8,
        "layers": 1,
        "dropout": 0.0,
    },
    "synthetic_ratings": {  # 122,500 interactions: two steps
        "global_batch": 61_250,
        "factors": 4,
        "widths": [8, 4],
        "dropout": 0.0,
    },
}
"""Of each embedded task: small, without dropout (which draws from the generator that threads share), and with
an epoch of two steps."""


def make_task(name: str, rank: int) -> Task:
    config = TASKS[name].Settings.model_validate(SETTINGS[name])
    torch.manual_seed(1)
    place, device = Place(rank, WORLD_SIZE), torch.device("cpu")
    return TASKS[name](config, NO_DATA, place, seeds=Seeds.derive(1, rank), device=device)


def weights_of(task: Task) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in task.model.parameters()]


def test_every_task_that_needs_no_data_is_in_the_table() -> None:
    for name, task in TASKS.items():
        if name in SETTINGS:
            task.check(task.Settings(), NO_DATA, WORLD_SIZE)
        else:
            with pytest.raises(ValueError, match=r"make it with: \./prepare_dataset\.sh"):
                task.check(task.Settings(), NO_DATA, WORLD_SIZE)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("reducer", REDUCERS)
def test_two_steps_move_equal_replicas_at_a_finite_loss(name: str, reducer: str, tmp_path: Path) -> None:
    # Without weight decay, nothing but what the reducer delivers moves a parameter.
    density = {"density": 0.05} if "density" in REDUCERS[reducer].Settings.model_fields else {}
    settings = settings_of(reducer, epochs=1, optimizer={"weight_decay": 0.0}, reducer=density)
    tasks = [make_task(name, rank) for rank in range(WORLD_SIZE)]
    before = weights_of(tasks[0])
    LocalComm.run(WORLD_SIZE, lambda comm: train(settings, comm, folder=tmp_path, task=tasks[comm.rank]))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    first, second = map(weights_of, tasks)
    assert all(map(torch.equal, first, second))
    assert not all(map(torch.equal, first, before))

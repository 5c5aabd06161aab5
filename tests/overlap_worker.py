"""One process of a gloo group that trains the toy, flat and overlapped with backward.

python -m tests.overlap_worker RANK WORLD_SIZE RENDEZVOUS_FILE OUT_FOLDER
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sage.exchange.comm import DistComm
from sage.interfaces import Place, Task, TrainingError
from sage.runfolder import manifest
from sage.training.overlap import OverlappedTrainer
from sage.training.settings import RunSettings
from sage.training.train import Trainer
from sage.workers.store import RendezvousStore
from tests.gloo_worker import join_group
from tests.test_skip import loss_becomes_nan, spoil_steps
from tests.toy import NormTask, ToyTask, bits_of, settings_of, state_of, train, train_until

SMALL = {"bucket_mb": 0.0001}
"""105 bytes: makes two buckets of the toy, and three of that with BatchNorm."""
REDUCERS: dict[str, dict[str, Any]] = {
    "exact": {},
    "topk": {"density": 0.1},
    "sage": {"density": 0.1, "threshold": 0.05},
    "powersgd": {"rank": 1},
    "random_k": {"density": 0.1},
}
STEPS = {
    "plain": {},
    "accumulated": {"accumulate_steps": 3},
    "clipped": {"clip": {"norm": 0.05, "before_reduce": False}},
    "bfloat16": {"precision": "bfloat16"},
    "skipping": {"on_nonfinite": "skip"},
}
"""What else is set, by which flat and overlapped training are compared."""
BAD_STEP = 3


def first_gradient_becomes_infinite(task: Task, loss: Tensor) -> Tensor:
    """An element of the first layer's weight, once: it is in the last bucket."""

    def spoil(grad: Tensor) -> Tensor:
        hook.remove()
        spoiled = grad.clone()
        spoiled[1, 3] = -torch.inf
        return spoiled

    hook = next(task.model.parameters()).register_hook(spoil)
    return loss


class BranchTask(ToyTask):
    """Worker 0 uses a branch at even batches; nobody ever uses another."""

    def __init__(self, batch_per_worker: int, place: Place) -> None:
        super().__init__(batch_per_worker, place)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.ModuleList([self.model, nn.Linear(6, 2), nn.Linear(6, 2)])
        self._count = 0

    def loss(self, batch: slice) -> Tensor:
        trunk, branch, _ = self.model  # type: ignore[misc]
        outputs = trunk(self.x[batch])
        self._count += 1
        if self.place.rank == 0 and self._count % 2 == 0:
            outputs = outputs + branch(self.x[batch])
        return (outputs - self.y[batch]).square().mean()

    def evaluate(self) -> dict[str, tuple[float, float]]:
        return {"loss": (1.0, 1.0)}


class Group:
    """What the scenarios share: a communicator, and a store of each one's own."""

    def __init__(self, out: Path) -> None:
        self.comm, self.out, self._count = DistComm(), out, 0
        self.place = Place(self.comm.rank, self.comm.world_size)

    def given(self, overlaps: bool) -> dict[str, Any]:
        self._count += 1
        found = dist.PrefixStore(f"test/{self._count}", dist.distributed_c10d._get_default_store())
        kind: type[Trainer] = OverlappedTrainer if overlaps else Trainer
        return {"store": RendezvousStore(self.place, found), "kind": kind, "batch_per_worker": 4}

    def folder(self, name: str) -> Path:
        return self.out / name / str(self.place.rank)

    def train(self, settings: RunSettings, overlaps: bool, name: str, **given: Any) -> dict[str, Any]:
        """What is left of a run: its bits, its totals; its lines are in a folder."""
        folder = self.folder(name)
        folder.mkdir(parents=True)
        found, summary = train(settings, self.comm, folder=folder, **self.given(overlaps), **given)
        state = state_of(found)
        return {"state": state, "totals": summary["totals"], "density": summary["density"]}


def compare(group: Group, name: str, how: str) -> dict[str, Any]:
    """The same run flat and overlapped, with a batch that cannot be used where steps are skipped."""
    found = {}
    for overlaps in (False, True):
        settings = settings_of(
            name, reducer=REDUCERS[name], **STEPS[how], overlap=SMALL if overlaps else None
        )
        task = NormTask(4, group.place)
        if how == "skipping":
            # DDP's first backward, which nobody uses, is one more.
            steps = {BAD_STEP + overlaps} if group.place.rank == 1 else set[int]()
            spoil_steps(task, steps, first_gradient_becomes_infinite)
        way = "overlapped" if overlaps else "flat"
        found[way] = group.train(settings, overlaps, f"{name}-{how}-{way}", task=task)
    return found


def resume(group: Group, name: str) -> dict[str, Any]:
    """A run, and one that is stopped in its sixth step and resumed by a new trainer."""
    settings = settings_of(name, reducer=REDUCERS[name], overlap=SMALL)
    whole = group.train(settings, True, f"{name}-whole", task=NormTask(4, group.place))
    folder = group.out / f"{name}-stopped"  # of all workers
    train_until(5, settings, group.comm, folder, task=NormTask(4, group.place), **group.given(True))
    dist.barrier()
    torch.manual_seed(99)  # as another process
    resumed, _ = train(
        settings,
        group.comm,
        folder=folder,
        keeps=True,
        resumed=manifest.newest(folder),
        task=NormTask(4, group.place),
        **group.given(True),
    )
    return {"whole": whole["state"], "resumed": state_of(resumed)}


def reseeded(group: Group) -> dict[str, list[Any]]:
    """The state of a reducer's own generators after another seed each, and after a step from one seed."""
    found: dict[str, list[Any]] = {"before": [], "after": []}
    for seed in (1, 2):
        settings = settings_of("atomo", seed=seed, feedback={"name": "none"}, overlap=SMALL)
        trainer, _ = train(settings, group.comm, task=ToyTask(4, group.place), **group.given(True))
        found["before"].append(generators_of(trainer.average.state_dict()))
        trainer.average.reseed(7)
        trainer.position.index = 0
        trainer.compute_gradient(trainer.task.train_batches(0))
        found["after"].append(generators_of(trainer.average.state_dict()))
    return found


def generators_of(state: dict[str, Any]) -> list[Any]:
    """The bits of all that atomo keeps: a generator a bucket."""
    return [bits_of(bucket["reducer"]) for bucket in state["buckets"]]


def stopped(group: Group, name: str, spoil: Callable[[Task, Tensor], Tensor], **given: Any) -> str:
    """The error of a run in whose fourth step a number is not finite on rank 1."""
    settings = settings_of(name, reducer=REDUCERS[name], overlap=SMALL)
    task = ToyTask(4, group.place)
    spoil_steps(task, {BAD_STEP + 1} if group.place.rank == 1 else set(), spoil)
    return error_of(group, settings, task, **given)


def error_of(group: Group, settings: RunSettings, task: Task, **given: Any) -> str:
    try:
        train(settings, group.comm, task=task, **group.given(True), **given)
    except TrainingError as error:
        return str(error)
    return "none"


def unused(group: Group) -> dict[str, Any]:
    """A model of which a step does not use all parameters."""
    found: dict[str, Any] = {}
    found["refused"] = error_of(group, settings_of("topk", overlap=SMALL), BranchTask(4, group.place))
    for name in ("exact", "topk"):
        for overlap in (None, {**SMALL, "find_unused_parameters": True}):
            settings = settings_of(name, reducer=REDUCERS[name], overlap=overlap)
            task = BranchTask(4, group.place)
            task._count = 0 if overlap is None else -1  # the backward that nobody uses
            way = "flat" if overlap is None else "overlapped"
            found[f"{name} {way}"] = group.train(
                settings, overlap is not None, f"{name}-unused-{way}", task=task
            )
    return found


def main(rank: int, world_size: int, rendezvous: str, out: str) -> None:
    join_group(rank, world_size, rendezvous)
    group = Group(Path(out))
    found: dict[str, Any] = {f"{name} {how}": compare(group, name, how) for name in REDUCERS for how in STEPS}
    found |= {f"{name} resumed": resume(group, name) for name in REDUCERS}
    found["reseeded"] = reseeded(group)
    found["unused"] = unused(group)
    found["errors"] = {
        f"{name} {what} {late}": stopped(group, name, spoil, reads_late=late)
        for name in ("exact", "topk")
        for what, spoil in (("loss", loss_becomes_nan), ("gradient", first_gradient_becomes_infinite))
        for late in (False, True)
    }
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])

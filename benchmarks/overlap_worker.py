"""A worker of benchmarks.overlap: training steps with every exchange, in turn."""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import reducers
from benchmarks.group import add_worker_options, process_group, return_rows
from sage.exchange.attached import AttachedExchange
from sage.exchange.ddp_hook import DDPHook
from tasks.data.cifar import CIFAR10
from tasks.models.resnet import resnet18

NUM_WARM_UP = 3
"""DDP arranges its buckets anew after the first step, torch's PowerSGD begins with the third."""
LOOPBACK = "loopback"
Case = tuple[str, str, dict[str, Any]]
"""What is exchanged, in which way, with which settings."""
DDP: Case = ("exact", "DDP", {})
NONE: Case = ("none", "none", {})
CASES: list[Case] = [
    NONE,
    ("exact", "flat", {}),
    DDP,
    ("exact", "hook", {}),
    ("bfloat16", "hook", {}),
    ("bfloat16", "torch's hook", {}),
    ("topk", "flat", {"density": 0.001}),
    ("topk", "hook", {"density": 0.001}),
    ("sage", "flat", {"density": 0.001}),
    ("sage", "hook", {"density": 0.001}),
    ("powersgd", "flat", {"rank": 4}),
    ("powersgd", "hook", {"rank": 4}),
    ("powersgd", "torch's hook", {"rank": 4}),
]
LOOPBACK_CASES: list[Case] = [DDP, ("exact", "hook", {})]


class Spread(NamedTuple):
    """Over the measured rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Row:
    """What benchmarks.overlap describes, of one way."""

    exchange: str
    way: str
    settings: dict[str, Any]
    hosts: int
    rate: str
    batch: int
    rounds: int
    density: float | None
    """The mean over the measured steps; None: a way that selects nothing, or does not tell."""
    payload_bytes: float | None
    """What a worker hands to collectives in a step; None: it does not tell."""
    step_ms: Spread
    exposed_ms: Spread | None
    times_ddp: Spread
    """The step divided by that of plain DDP in the same round."""
    other_cores: float = 0.0


@dataclass
class Trainer:
    """A model and its way of exchanging gradients."""

    case: Case
    model: nn.Module
    exchange: AttachedExchange | DDPHook | None
    optimizer: torch.optim.Optimizer
    seconds: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)

    def take_step(self, x: Tensor, y: Tensor) -> None:
        dist.barrier()
        started = time.perf_counter()
        flat = self.exchange if isinstance(self.exchange, AttachedExchange) else None
        if flat is None:
            self.optimizer.zero_grad()
        else:
            flat.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        if flat is not None:
            flat.step()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - started)
        if self.exchange is not None:
            self.densities.append(self.exchange.density)

    def count_from_here(self) -> None:
        """After the warm-up."""
        self.seconds.clear()
        self.densities.clear()
        if self.exchange is not None:
            self.ledger().take()

    def ledger(self) -> Any:
        assert self.exchange is not None
        owner = self.exchange if isinstance(self.exchange, DDPHook) else self.exchange.exchange
        return owner.comm.ledger  # type: ignore[attr-defined]


def make_trainer(case: Case) -> Trainer:
    """The same weights for all."""
    torch.manual_seed(0)
    model = resnet18(10)
    name, way, settings = case
    given = {"dtype": "bfloat16"} if name == "bfloat16" else settings
    reducer = "exact" if name == "bfloat16" else name
    exchange: AttachedExchange | DDPHook | None = None
    if way == "flat":
        exchange = reducers.attach(model, reducer, **given)
    elif way != "none":
        # One bucket for torch's PowerSGD: each of its all-reduces is started by the future of the one before;
        # over gloo those of several buckets come in different orders on different workers, and fail.
        bucket_mb = 100 if (name, way) == ("powersgd", "torch's hook") else None
        model = DistributedDataParallel(model, forward_sync_buffers=False, bucket_cap_mb=bucket_mb)
        if way == "hook":
            exchange = reducers.hook(model, reducer, **given)
        elif way == "torch's hook":
            register_torchs(model, name, settings)
    return Trainer(case, model, exchange, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))


def register_torchs(model: DistributedDataParallel, name: str, settings: dict[str, Any]) -> None:
    if name == "bfloat16":
        model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        return
    state = powerSGD_hook.PowerSGDState(
        process_group=None, matrix_approximation_rank=settings["rank"], start_powerSGD_iter=2
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


def batches(data: Path, size: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Of a round this worker's images (B, 3, 32, 32) and labels (B,)."""
    images = CIFAR10.read(data)
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def batch(number: int) -> tuple[Tensor, Tensor]:
        first = (number * world_size + rank) * size
        x = torch.from_numpy(images.train_x[first : first + size]).permute(0, 3, 1, 2).float()
        return x / 127.5 - 1, torch.from_numpy(images.train_y[first : first + size]).long()

    return batch


def measure(cases: list[Case], arguments: argparse.Namespace) -> list[Trainer]:
    trainers, batch = [make_trainer(case) for case in cases], batches(arguments.data, arguments.batch)
    for number in range(NUM_WARM_UP + arguments.rounds):
        if number == NUM_WARM_UP:
            for trainer in trainers:
                trainer.count_from_here()
        x, y = batch(number)
        first = number % len(trainers)
        for trainer in trainers[first:] + trainers[:first]:
            trainer.take_step(x, y)
    return trainers


def spread(values: Tensor) -> Spread:
    """Of values (rounds,)."""
    return Spread(values.median().item(), values.min().item(), values.max().item())


def rows_of(trainers: list[Trainer], arguments: argparse.Namespace) -> list[Row]:
    """One a way, of the slowest worker in each step."""
    steps_ms = 1000 * torch.tensor([trainer.seconds for trainer in trainers], dtype=torch.float64)
    dist.all_reduce(steps_ms, dist.ReduceOp.MAX)  # (ways, rounds)
    by_case = {trainer.case[:2]: step_ms for trainer, step_ms in zip(trainers, steps_ms, strict=True)}
    none, ddp = by_case.get(NONE[:2]), by_case[DDP[:2]]
    rows = []
    for trainer, step_ms in zip(trainers, steps_ms, strict=True):
        name, way, settings = trainer.case
        exchange = trainer.exchange
        rows.append(
            Row(
                exchange=name,
                way=way,
                settings=settings,
                hosts=arguments.world_size,
                rate=arguments.rate,
                batch=arguments.batch,
                rounds=arguments.rounds,
                density=sum(trainer.densities) / len(trainer.densities) if "density" in settings else None,
                payload_bytes=trainer.ledger().payload_bytes / arguments.rounds if exchange else None,
                step_ms=spread(step_ms),
                exposed_ms=None if none is None else spread(step_ms - none),
                times_ddp=spread(step_ms / ddp),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--rate", "--address"):
        parser.add_argument(name, default="")
    for name in ("--rounds", "--batch"):
        parser.add_argument(name, type=int)
    parser.add_argument("--data", type=Path)
    add_worker_options(parser)
    arguments = parser.parse_args()
    cases = LOOPBACK_CASES if arguments.rate == LOOPBACK else CASES
    with process_group(arguments, arguments.address):
        rows = rows_of(measure(cases, arguments), arguments)
    return_rows(arguments, rows)


if __name__ == "__main__":
    main()

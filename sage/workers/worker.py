"""One process of a run: its place, its device, and how it describes itself."""

import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sage.config import Settings
from sage.interfaces import Place, TrainingError
from sage.workers.rendezvous import Rendezvous


class WorkerIdentity(Settings):
    """What a worker brings to a process group, as it tells the others."""

    backend: str
    host: str
    gpu: str | None = None
    """The GPU's UUID; null: the worker has none."""


@dataclass(frozen=True)
class Worker:
    """One process of a run, before any process group exists."""

    rendezvous: Rendezvous
    device: torch.device
    backend: str
    num_threads: int
    data: Path
    """The folder of prepared data sets."""
    simulated: bool = False
    """Whether all workers are in this process, and take turns."""

    @property
    def place(self) -> Place:
        return self.rendezvous.place

    def with_rank(self, rank: int) -> "Worker":
        """A copy of this worker with another rank in the same run."""
        place = Place(rank, self.place.world_size)
        return replace(self, rendezvous=replace(self.rendezvous, place=place))

    def facts(self) -> dict[str, Any]:
        """What environment.json records of all workers in common."""
        return {
            "world_size": self.place.world_size,
            "simulated": self.simulated,
            "backend": self.backend if self.place.world_size > 1 else None,
            "threads_per_worker": self.num_threads,
        }

    def where(self) -> str:
        """The host and the device, as environment.json records them."""
        if self.device.type != "cuda":
            return f"{socket.gethostname()}/cpu"
        return f"{socket.gethostname()}/{self.device} {torch.cuda.get_device_name(self.device)}"

    def is_to_spawn(self) -> bool:
        """Whether the workers are processes that this process must start."""
        return self.place.world_size > 1 and not self.simulated and not self.rendezvous.launched

    def identity(self) -> WorkerIdentity:
        """What this worker brings to a process group."""
        gpu = None
        if self.device.type == "cuda":
            gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        return WorkerIdentity(backend=self.backend, host=socket.gethostname(), gpu=gpu)

    def describe(self, workers: Sequence[str]) -> str:
        """The workers, backend and threads of the run, in one line; several processes have a row each.

        workers: where() of each worker, by rank.
        """
        threads = "1 thread" if self.num_threads == 1 else f"{self.num_threads} threads"
        if self.simulated:
            return f"{self.place.world_size} simulated workers in turn on {self.device}, {threads}"
        if self.place.world_size == 1:
            return f"1 worker on {self.device}, {threads}"
        sharing = ""
        if self.device.type == "cuda" and self.backend == "gloo":
            local = self.rendezvous.local_world_size
            sharing = f" ({local} workers share {torch.cuda.device_count()} GPUs)"
        rows = [f"  rank {rank:<3}  {where.replace('/', '  ', 1)}" for rank, where in enumerate(workers)]
        return "\n".join(
            [
                f"{self.place.world_size} workers over {self.backend} on {self.device.type}{sharing}, "
                f"{threads} each",
                *rows,
            ]
        )


def check_identities(identities: Sequence[WorkerIdentity]) -> None:
    """Raise TrainingError where the workers, by rank, cannot form a process group."""
    backends = [identity.backend for identity in identities]
    if len(set(backends)) > 1:
        listed = ", ".join(f"rank {rank}: {backend}" for rank, backend in enumerate(backends))
        raise TrainingError(
            f"expected one backend, got {listed}; give every worker a GPU of its own (nccl), "
            "or none a GPU with CUDA_VISIBLE_DEVICES= (gloo)"
        )

    shared, count = Counter(identities).most_common(1)[0]
    if shared.backend == "nccl" and count > 1:
        ranks = [str(rank) for rank, identity in enumerate(identities) if identity == shared]
        raise TrainingError(
            f"NCCL: expected a GPU for each worker, got one GPU of host {shared.host} for ranks "
            f"{', '.join(ranks)}; start as many workers a host as it has GPUs (sbatch: --ntasks-per-node, "
            "--gpus-per-task=1), or share them over gloo with --workers on one host"
        )

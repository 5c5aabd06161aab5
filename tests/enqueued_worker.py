"""A worker of a group whose collectives are only enqueued when they return, as under NCCL: over gloo, whose
asynchronous collectives stand for a GPU's.

python -m tests.enqueued_worker RANK PORT WHERE

It reduces, step by step. Rank 1 stops in step STOP_AT, and rank 0 waits for it. WHERE: in "read", or
"elsewhere", where no wait has a deadline; "no abort": in read, and NCCL does not let itself be aborted.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sage.exchange.comm import DistComm
from sage.exchange.deadline import Deadline, Event
from sage.interfaces import Place
from sage.workers import group, launch
from sage.workers.rendezvous import Rendezvous
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

TIMEOUT_SECONDS = 2.0
"""Of a collective."""
MEETING_SECONDS = 120.0
"""How long one worker waits for the other to start, which takes a while on a busy machine."""
STOP_AT = 3
works: list[dist.Work] = []
all_reduce, init_process_group = dist.all_reduce, dist.init_process_group


class LastWork:
    """The end of what was enqueued last, in the place of a CUDA event."""

    def __init__(self, device: torch.device) -> None:
        self._work = works[-1]

    def query(self) -> bool:
        return self._work.is_completed()


def enqueue(x: torch.Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    works.append(all_reduce(x, op, group, async_op=True))


def join_over_gloo(backend: str, *, device_id: torch.device, timeout: Any, **given: Any) -> None:
    """gloo's own timeout is not to help: half an hour, as torch has it by default."""
    assert backend == "nccl"
    init_process_group("gloo", **given)


def abort(hangs: bool, aborted: dist.ProcessGroup) -> None:
    assert aborted is dist.group.WORLD
    print("aborted", flush=True)
    time.sleep(600 if hangs else 0)


def copy(x: torch.Tensor) -> tuple[torch.Tensor, Event]:
    return x, LastWork(x.device)


def train(worker: Worker, where: str, store: RendezvousStore) -> None:
    deadline = Deadline(TIMEOUT_SECONDS, "cpu", LastWork, copy)
    comm = DistComm(deadline=deadline)
    with deadline.watched(partial(launch.end_process, worker, store), poll_seconds=0.1):
        for step in range(STOP_AT + 1):
            store.set_step(step)
            if step == STOP_AT and comm.rank == 1:
                print("stops", flush=True)
                time.sleep(600)
            x = torch.ones(3)
            comm.all_reduce(x)
            if where == "elsewhere":
                works[-1].wait()
            assert comm.read(x).tolist() == [2.0] * 3
            print(f"step {step}", flush=True)


def main(rank: int, port: int, where: str) -> int:
    dist.all_reduce, dist.init_process_group = enqueue, join_over_gloo
    dist.distributed_c10d._abort_process_group = partial(abort, where == "no abort")
    place = Place(rank, 2)
    rendezvous = Rendezvous(place, rank, 2, launched=True, address="127.0.0.1", port=port)
    group.check_identities = lambda _: None  # NCCL takes no two workers on one device
    worker = Worker(rendezvous, torch.device("cpu"), "nccl", num_threads=1, data=Path())
    return launch.supervise(worker, MEETING_SECONDS, False, partial(train, worker, where))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]))

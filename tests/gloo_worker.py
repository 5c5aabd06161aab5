"""One process of a gloo group that runs rows of the table.

python -m tests.gloo_worker RANK WORLD_SIZE RENDEZVOUS_FILE OUT_FOLDER ROW...
"""

import sys
from dataclasses import astuple
from datetime import timedelta

import torch
import torch.distributed as dist

from sage.exchange.comm import DistComm
from tests.cases import CASES, run_case


def join_group(rank: int, world_size: int, rendezvous: str) -> None:
    """Form the default process group over gloo, with one thread a process."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )


def main(rank: int, world_size: int, rendezvous: str, out: str, rows: list[str]) -> None:
    join_group(rank, world_size, rendezvous)
    comm = DistComm()
    chosen = [case for case in CASES if str(case) in rows]
    steps = {str(case): [astuple(step) for step in run_case(case, comm)] for case in chosen}
    torch.save(steps, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])

"""Who did not come to a step: found out when a collective has failed, so that it costs other steps nothing.

Each worker on which a collective fails says so in the process group's store. Who does not say so was not in
that step: it has fewer batches, has ended, or is too slow.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sage.exchange.comm import DistComm
from sage.interfaces import CommunicationError, Communicator

PATIENCE_SECONDS = 5.0
"""How long to wait for others to say that theirs has failed, too. The first failure closes connections, which
the others see at once."""
POLL_SECONDS = 0.05


@contextmanager
def naming_absent(comm: Communicator, num_steps: int) -> Iterator[None]:
    """In here a CommunicationError gets the ranks of those that did not come, where that can be known.

    num_steps: how many steps all workers have taken before this one. Threads of one process have an error
    that says so itself.
    """
    try:
        yield
    except CommunicationError as error:
        raise named(error, comm, num_steps) from error


def named(error: BaseException, comm: Communicator, num_steps: int) -> BaseException:
    """An error that a step has raised; a CommunicationError with the ranks of those that did not come."""
    if not (isinstance(error, CommunicationError) and isinstance(comm, DistComm)):
        return error
    group = comm.group or dist.group.WORLD
    assert isinstance(group, dist.ProcessGroup)
    ranks = dist.get_process_group_ranks(group)
    absent, are_certain = _find_absent(group.group_name, ranks, comm.rank)
    if not absent:
        return error
    who = " and ".join(f"rank {rank}" for rank in absent) if are_certain else f"one of the ranks {absent}"
    return CommunicationError(
        f"{error}: {who} did not come to step {num_steps + 1}, having fewer batches, ended, or being too slow"
    )


def _find_absent(group: str, ranks: list[int], mine: int) -> tuple[list[int], bool]:
    """Who has not said, in time, that a collective of this group has failed; whether that could be asked.

    ranks: of the group's processes. mine: this one's index in them.
    """
    others = [rank for rank in ranks if rank != ranks[mine]]
    waiting = others
    deadline = time.monotonic() + PATIENCE_SECONDS
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(_key(group, ranks[mine]), "")
        while waiting and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            waiting = [rank for rank in waiting if not store.check([_key(group, rank)])]
    except RuntimeError:  # the store has ended, with the process that keeps it
        return others, len(others) == 1
    return waiting, True


def _key(group: str, rank: int) -> str:
    return f"sage/failed/{group}/{rank}"

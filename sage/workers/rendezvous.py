"""Which worker a process is and where the workers meet, read from the variables that its launcher has set.

Each quantity is looked up on its own: in the variables given by hand (hostip=... rank=... ./run.sh), in
torchrun's, and in those of the innermost of Open MPI, MPICH and a SLURM step (mpirun may itself be started by
SLURM, whose variables then count mpirun's daemons). The world size is looked up last in the configuration.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sage.interfaces import Place


class Variable(NamedTuple):
    """An environment variable."""

    name: str
    text: str


Variables = dict[str, Variable]
"""quantity -> the variable that gives it."""

BY_HAND = {
    "rank": "rank",
    "world_size": "world_size",
    "local_rank": "local_rank",
    "local_world_size": "local_world_size",
    "address": "hostip",
    "port": "port",
}
TORCHRUN = {
    "rank": "RANK",
    "world_size": "WORLD_SIZE",
    "local_rank": "LOCAL_RANK",
    "local_world_size": "LOCAL_WORLD_SIZE",
    "address": "MASTER_ADDR",
    "port": "MASTER_PORT",
}
OPEN_MPI = {
    "rank": "OMPI_COMM_WORLD_RANK",
    "world_size": "OMPI_COMM_WORLD_SIZE",
    "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
    "local_world_size": "OMPI_COMM_WORLD_LOCAL_SIZE",
}
MPICH = {
    "rank": "PMI_RANK",
    "world_size": "PMI_SIZE",
    "local_rank": "MPI_LOCALRANKID",
    "local_world_size": "MPI_LOCALNRANKS",
}
SLURM = {"rank": "SLURM_PROCID", "world_size": "SLURM_STEP_NUM_TASKS", "local_rank": "SLURM_LOCALID"}

HINTS = {
    "rank": "start with srun, mpirun, torchrun or --workers, or give rank=0, 1, ... before ./run.sh",
    "world_size": "start with srun, mpirun, torchrun or --workers, or give world_size=N after CONFIG",
    "address": "give hostip=ADDRESS before ./run.sh (with mpirun: -x hostip=ADDRESS), the same on every host",
    "port": "give port=PORT before ./run.sh (with mpirun: -x port=PORT), the same on every host",
}
"""Quantity -> what a user can do where no variable gives it."""


@dataclass(frozen=True)
class Rendezvous:
    """One process's part in a run. address and port belong to rank 0's host."""

    place: Place
    local_rank: int
    local_world_size: int
    launched: bool
    """Whether this process is a worker already; if not, place.world_size workers are to be started."""
    address: str = ""
    port: int = 0
    chooses_gpu: bool = False
    """Whether the launcher may show each worker of a host a GPU of its own, as SLURM does."""
    num_cpus: int | None = None
    """The processors that the launcher gave this worker, where it says so."""


def find_rendezvous(
    environ: Mapping[str, str], num_workers: int | None = None, configured: int | None = None
) -> Rendezvous:
    """Find this process's part in a run.

    num_workers: the number given as --workers; only torchrun's variables are read then, which --workers sets
    for the workers that it starts. configured: the configuration's world_size. Raises ValueError, in one
    line, where a quantity is missing, is not a number or contradicts another.
    """
    if num_workers is not None and configured not in (None, num_workers):
        raise ValueError(f"--workers: expected {configured}, as world_size says, got {num_workers}")
    try:
        return _find_part(environ, num_workers, configured)
    except ValueError as error:
        by_hand = [f"{name}={environ[name][:60]!r}" for name in BY_HAND.values() if name in environ]
        if not by_hand or num_workers is not None:
            raise
        advice = "unset what is not meant for this program"
        raise ValueError(f"{error}; in the environment: {', '.join(by_hand)}: {advice}") from None


def _find_part(environ: Mapping[str, str], num_workers: int | None, configured: int | None) -> Rendezvous:
    """find_rendezvous, without its advice."""
    found = _merge(_sources(environ) if num_workers is None else [_read(environ, TORCHRUN)])
    if not _is_worker(found, environ, num_workers, configured):
        count = num_workers or 1
        return Rendezvous(Place(0, count), 0, count, launched=False)

    world_size = _world_size(found, configured)
    if num_workers not in (None, world_size):
        raise ValueError(f"--workers: expected {world_size}, as launched, got {num_workers}")
    return _part_of_worker(found, world_size)


def _is_worker(
    found: Variables, environ: Mapping[str, str], num_workers: int | None, configured: int | None
) -> bool:
    """Whether this process was started as a worker, or was meant to be: by hand, with a variable missing."""
    if {"rank", "world_size"} & found.keys():
        return True
    if num_workers is not None:
        return False
    return configured not in (None, 1) or "hostip" in environ or "port" in environ


def _part_of_worker(found: Variables, world_size: int) -> Rendezvous:
    rank = _number(found, "rank", high=world_size - 1)
    by_hand = found["rank"].name == BY_HAND["rank"]
    by_torchrun = found["rank"].name == TORCHRUN["rank"]
    local_world_size = _number(found, "local_world_size", low=1, default=1 if by_hand else world_size)
    return Rendezvous(
        place=Place(rank, world_size),
        local_rank=_number(found, "local_rank", high=local_world_size - 1, default=0),
        local_world_size=local_world_size,
        launched=True,
        address=_address(found) if world_size > 1 else "",
        port=_number(found, "port", low=1, high=65535) if world_size > 1 else 0,
        chooses_gpu=not by_torchrun,
        num_cpus=_number(found, "cpus", low=1) if "cpus" in found else None,
    )


def find_simulation(environ: Mapping[str, str], num_simulated: int, configured: int | None) -> Rendezvous:
    """The part of a process that simulates all workers. Raises ValueError where a launcher started it, or
    where the configuration's world_size differs."""
    found = _merge(_sources(environ))
    given = [found[quantity] for quantity in ("rank", "world_size") if quantity in found]
    is_single = all(variable.text == text for variable, text in zip(given, ("0", "1"), strict=False))
    if given and not (is_single and len(given) == 2):  # srun --pty bash is a step of one task
        names = [variable.name for variable in given]
        problem = f"got one with {' and '.join(names)} in its environment"
        raise ValueError(f"--simulate: expected one process without a launcher, {problem}")
    if configured not in (None, num_simulated):
        raise ValueError(f"--simulate: expected {configured}, as world_size says, got {num_simulated}")
    return Rendezvous(Place(0, num_simulated), 0, num_simulated, launched=False)


def is_first_on_host(environ: Mapping[str, str]) -> bool:
    """Whether this process is the first of its host's workers; True too where its number is not readable, so
    that somebody says so."""
    local_rank = _merge(_sources(environ)).get("local_rank", Variable("", "0")).text
    return local_rank == "0" or not local_rank.isdecimal()


# --- the launchers' variables ---------------------------------------------------------------------


def _sources(environ: Mapping[str, str]) -> list[Variables]:
    """The variables of each source that is present, in the order in which they count."""
    open_mpi = _with_local_address(_read(environ, OPEN_MPI))
    if "PMIX_NAMESPACE" in environ:  # the name of this mpirun, the same on every host
        open_mpi["port"] = Variable("PMIX_NAMESPACE", str(port_of(environ["PMIX_NAMESPACE"])))
    nested = (open_mpi, _with_local_address(_read(environ, MPICH)), _slurm_step(environ))
    innermost = [variables for variables in nested if "rank" in variables][:1]
    return [_read(environ, BY_HAND), _read(environ, TORCHRUN), *innermost]


def _merge(sources: list[Variables]) -> Variables:
    """Each quantity from the first source that has it."""
    merged: Variables = {}
    for variables in sources:
        merged = variables | merged
    return merged


def _read(environ: Mapping[str, str], names: Mapping[str, str]) -> Variables:
    """names: quantity -> the name of its variable."""
    return {quantity: Variable(name, environ[name]) for quantity, name in names.items() if name in environ}


def _with_local_address(variables: Variables) -> Variables:
    """Add the address to an MPI's variables where all workers are on this host."""
    sizes = [variables[name].text for name in ("world_size", "local_world_size") if name in variables]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        variables["address"] = Variable(variables["local_world_size"].name, "127.0.0.1")
    return variables


def _slurm_step(environ: Mapping[str, str]) -> Variables:
    """The variables that srun sets for its tasks, of which number 0 is on the step's first node by default.

    A batch shell and salloc's have SLURM_PROCID too, but no SLURM_STEP_NUM_TASKS.
    """
    if SLURM["world_size"] not in environ:
        return {}
    variables = _read(environ, SLURM | {"cpus": "SLURM_CPUS_PER_TASK"})

    name = "SLURM_STEP_TASKS_PER_NODE"
    counts = tasks_per_node(environ.get(name, ""))
    node = environ.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        variables["local_world_size"] = Variable(name, str(counts[int(node)]))

    if nodes := environ.get("SLURM_STEP_NODELIST"):
        variables["address"] = Variable("SLURM_STEP_NODELIST", first_host(nodes))
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    variables["port"] = Variable("SLURM_JOB_ID", str(port_of(job)))
    return variables


def port_of(job: str) -> int:
    """The port that all workers of a job derive from its name; Linux hands out ports from 32768 on."""
    return 20000 + zlib.crc32(job.encode()) % 10000


def first_host(nodes: str) -> str:
    """The first host of SLURM's node list: n[01-03,7],m5 is n01, n02, n03, n7, m5."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def tasks_per_node(text: str) -> list[int]:
    """The tasks on each node, from SLURM's counts: 2(x3),1 is 2, 2, 2, 1."""
    counts = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts.extend([int(count)] * int(repeats or 1))
    return counts


# --- one quantity ---------------------------------------------------------------------------------


def _world_size(found: Variables, configured: int | None) -> int:
    """The launcher's world size; or the configuration's, where the launcher gives none, or where the rank is
    given by hand and the world size is not."""
    is_given = "world_size" in found
    if "rank" in found and found["rank"].name == BY_HAND["rank"]:
        is_given = is_given and found["world_size"].name == BY_HAND["world_size"]
    if configured is not None and not is_given:
        return configured

    world_size = _number(found, "world_size", low=1)
    if configured not in (None, world_size):
        name = found["world_size"].name
        raise ValueError(f"world_size: expected {world_size}, as launched ({name}), got {configured}")
    return world_size


def _address(found: Variables) -> str:
    name, text = found.get("address", Variable(_name_of("address", found), ""))
    if not text:
        raise ValueError(f"{name}: expected the address of rank 0's host, got nothing; {HINTS['address']}")
    return text


def _number(
    found: Variables, quantity: str, low: int = 0, high: int = 2**31, default: int | None = None
) -> int:
    """A quantity in [low, high], or its default where no variable gives it. Raises ValueError."""
    if quantity not in found and default is not None:
        return default
    if quantity not in found:
        name = _name_of(quantity, found)
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got nothing; {HINTS[quantity]}")
    name, text = found[quantity]
    if not text.isdecimal() or not low <= int(text) <= high:
        source = " from the launcher" if name not in BY_HAND.values() else ""
        raise ValueError(f"{name}: expected a number in [{low}, {high}]{source}, got {text!r}")
    return int(text)


def _name_of(quantity: str, found: Variables) -> str:
    """The variable that should give a missing quantity: torchrun's where the others are torchrun's."""
    names = {name for name, _ in found.values()}
    is_torchrun = not names.isdisjoint({TORCHRUN["rank"], TORCHRUN["world_size"]})
    return TORCHRUN[quantity] if is_torchrun else BY_HAND[quantity]

"""Which worker a process is and where the workers meet, looked up in the environment that its launcher made.

Each quantity is looked up on its own: by hand (hostip=... rank=... ./run.sh), in torchrun's variables, in
those of the innermost of Open MPI, MPICH and a SLURM step (mpirun may itself be started by SLURM, whose
variables then count its daemons), and the world size last in the configuration.
"""

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from sage.interfaces import Place

Offer = dict[str, tuple[str, str]]
"""What one source knows: a quantity's variable and its text."""

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

HOW = {
    "rank": "start with srun, mpirun, torchrun or --workers, or give rank=0, 1, ... before ./run.sh",
    "world_size": "start with srun, mpirun, torchrun or --workers, or give world_size=N after CONFIG",
    "address": "give hostip=ADDRESS before ./run.sh (with mpirun: -x hostip=ADDRESS), the same on every host",
    "port": "give port=PORT before ./run.sh (with mpirun: -x port=PORT), the same on every host",
}
"""How to give what was found nowhere."""


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
    """This process's part. num_workers: --workers, which beats all but torchrun's variables, since it is with
    these that it starts workers; configured: the configuration's world_size.

    Raises ValueError, in one line, where a quantity is missing, is no number or contradicts another.
    """
    if num_workers not in (None, configured) and configured is not None:
        raise ValueError(f"--workers: expected {configured}, as world_size says, got {num_workers}")
    found = _first(_offers(environ) if num_workers is None else [_named(environ, TORCHRUN)])
    is_worker = {"rank", "world_size"} & found.keys()
    given = [name for name in ("hostip", "port") if name in environ]
    if not is_worker and (num_workers is not None or (configured in (None, 1) and not given)):
        return Rendezvous(Place(0, num_workers or 1), 0, num_workers or 1, launched=False)
    world_size = _world_size(found, configured)
    if num_workers not in (None, world_size):
        raise ValueError(f"--workers: expected {world_size}, as launched, got {num_workers}")
    rank = _number(found, "rank", high=world_size - 1)
    by_hand = found["rank"][0] == BY_HAND["rank"]
    local_world_size = _number(found, "local_world_size", low=1, default=1 if by_hand else world_size)
    local_rank = _number(found, "local_rank", high=local_world_size - 1, default=0)
    by_torchrun = found["rank"][0] == TORCHRUN["rank"]
    return Rendezvous(
        place=Place(rank, world_size),
        local_rank=local_rank,
        local_world_size=local_world_size,
        launched=True,
        address=_address(found) if world_size > 1 else "",
        port=_number(found, "port", low=1, high=65535) if world_size > 1 else 0,
        chooses_gpu=not by_torchrun,
        num_cpus=_number(found, "cpus", low=1) if "cpus" in found else None,
    )


def refuse_launcher(environ: Mapping[str, str], num_simulated: int, configured: int | None) -> Rendezvous:
    """The part of a process that simulates all workers. Raises ValueError where a launcher has started it, or
    the configuration's world_size is another."""
    found = _first(_offers(environ))
    if names := [found[quantity][0] for quantity in ("rank", "world_size") if quantity in found]:
        told = f"got one with {' and '.join(names)} in its environment"
        raise ValueError(f"--simulate: expected one process without a launcher, {told}")
    if configured not in (None, num_simulated):
        raise ValueError(f"--simulate: expected {configured}, as world_size says, got {num_simulated}")
    return Rendezvous(Place(0, num_simulated), 0, num_simulated, launched=False)


def speaks_here(environ: Mapping[str, str]) -> bool:
    """Whether this process is the one of its host that says what is wrong."""
    _, local_rank = _first(_offers(environ)).get("local_rank", ("", "0"))
    return local_rank == "0" or not local_rank.isdecimal()


def _offers(environ: Mapping[str, str]) -> list[Offer]:
    """What the sources know, the first to be believed first."""
    open_mpi = _on_one_host(_named(environ, OPEN_MPI))
    if "PMIX_NAMESPACE" in environ:  # the name of this mpirun, the same on every host
        open_mpi["port"] = ("PMIX_NAMESPACE", str(port_of(environ["PMIX_NAMESPACE"])))
    nested = (open_mpi, _on_one_host(_named(environ, MPICH)), _slurm_step(environ))
    innermost = [offer for offer in nested if "rank" in offer][:1]
    return [_named(environ, BY_HAND), _named(environ, TORCHRUN), *innermost]


def _first(offers: list[Offer]) -> Offer:
    """Each quantity from the first source that has it."""
    found: Offer = {}
    for offer in offers:
        found = offer | found
    return found


def _named(environ: Mapping[str, str], names: Mapping[str, str]) -> Offer:
    return {quantity: (name, environ[name]) for quantity, name in names.items() if name in environ}


def _on_one_host(offer: Offer) -> Offer:
    """An MPI's offer, with the address where all workers are on this host."""
    sizes = [offer[quantity][1] for quantity in ("world_size", "local_world_size") if quantity in offer]
    if len(sizes) == 2 and sizes[0] == sizes[1]:
        offer["address"] = (offer["local_world_size"][0], "127.0.0.1")
    return offer


def _slurm_step(environ: Mapping[str, str]) -> Offer:
    """What srun tells its tasks, of which number 0 is on the step's first node, as is srun's default.

    A batch shell and salloc's have SLURM_PROCID too, but no SLURM_STEP_NUM_TASKS.
    """
    if SLURM["world_size"] not in environ:
        return {}
    offer = _named(environ, SLURM | {"cpus": "SLURM_CPUS_PER_TASK"})
    name = "SLURM_STEP_TASKS_PER_NODE"
    counts = tasks_per_node(environ.get(name, ""))
    node = environ.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(counts):
        offer["local_world_size"] = (name, str(counts[int(node)]))
    if nodes := environ.get("SLURM_STEP_NODELIST"):
        offer["address"] = ("SLURM_STEP_NODELIST", first_host(nodes))
    job = f"{environ.get('SLURM_JOB_ID', '')}.{environ.get('SLURM_STEP_ID', '')}"
    return offer | {"port": ("SLURM_JOB_ID", str(port_of(job)))}


def port_of(job: str) -> int:
    """A port that all workers of a job derive alike, below those that Linux hands out (32768 and up)."""
    return 20000 + zlib.crc32(job.encode()) % 10000


def first_host(nodes: str) -> str:
    """The first of SLURM's node list: n[01-03,7],m5 is n01, n02, n03, n7, m5."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])+", nodes)
    assert first is not None, nodes
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def tasks_per_node(text: str) -> list[int]:
    """SLURM's counts: 2(x3),1 is 2, 2, 2, 1."""
    counts = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(times or 1)
    return counts


def _world_size(found: Offer, configured: int | None) -> int:
    """The launcher's; the configuration's where the rank is given by hand or the launcher says none."""
    by_hand = found.get("rank", ("",))[0] == BY_HAND["rank"]
    if configured is not None and (
        "world_size" not in found or (by_hand and found["world_size"][0] != BY_HAND["world_size"])
    ):
        return configured
    world_size = _number(found, "world_size", low=1)
    if configured not in (None, world_size):
        name = found["world_size"][0]
        raise ValueError(f"world_size: expected {world_size}, as launched ({name}), got {configured}")
    return world_size


def _address(found: Offer) -> str:
    name, text = found.get("address", (_name_of("address", found), ""))
    if not text:
        raise ValueError(f"{name}: expected the address of rank 0's host, got nothing; {HOW['address']}")
    return text


def _number(found: Offer, quantity: str, low: int = 0, high: int = 2**31, default: int | None = None) -> int:
    """A quantity, or its default where it was not found."""
    if quantity not in found and default is not None:
        return default
    if quantity not in found:
        name = _name_of(quantity, found)
        raise ValueError(f"{name}: expected a number in [{low}, {high}], got nothing; {HOW[quantity]}")
    name, text = found[quantity]
    if not text.isdecimal() or not low <= int(text) <= high:
        source = " from the launcher" if name not in BY_HAND.values() else ""
        raise ValueError(f"{name}: expected a number in [{low}, {high}]{source}, got {text!r}")
    return int(text)


def _name_of(quantity: str, found: Offer) -> str:
    """The variable by which a missing quantity is asked for: torchrun's where the others are torchrun's."""
    names = {name for name, _ in found.values()}
    return (TORCHRUN if names & {TORCHRUN["rank"], TORCHRUN["world_size"]} else BY_HAND)[quantity]

"""Which worker a process is, by its launcher's variables: every launcher, alone or nested."""

import re

import pytest

from sage.interfaces import Place
from sage.workers.rendezvous import (
    Rendezvous,
    find_rendezvous,
    find_simulation,
    first_host,
    is_first_on_host,
    tasks_per_node,
)

HAND = {"hostip": "10.0.0.7", "port": "23456", "rank": "1"}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
BATCH_SHELL = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "5",
    "SLURM_TASKS_PER_NODE": "2(x2),1",
}
STEP = BATCH_SHELL | {
    "SLURM_STEP_ID": "3",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_STEP_NODELIST": "gpu[07-08,11]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1350631425",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ALONE = Rendezvous(Place(0, 1), 0, 1, launched=False)


def ranks(found: Rendezvous) -> tuple[int, int, int, int]:
    return found.place.rank, found.place.world_size, found.local_rank, found.local_world_size


def test_without_a_launcher_it_is_one_process() -> None:
    assert find_rendezvous({}) == ALONE
    assert find_rendezvous({"PATH": "/bin", "MASTER_ADDR": "node0"}) == ALONE
    assert find_rendezvous({}, configured=1) == ALONE


def test_workers_are_to_be_started_whatever_the_environment() -> None:
    for environ in ({}, HAND, STEP, OPEN_MPI, MPICH):
        found = find_rendezvous(environ, num_workers=3)
        assert (found.place, found.launched) == (Place(0, 3), False)


def test_a_worker_that_the_option_workers_started_reads_only_torchruns_variables() -> None:
    found = find_rendezvous(HAND | STEP | TORCHRUN, num_workers=8)
    assert (ranks(found), found.address, found.port) == ((5, 8, 1, 4), "node0", 29500)


def test_with_a_rank_by_hand_the_configuration_gives_the_world_size() -> None:
    found = find_rendezvous(HAND, configured=4)
    assert (ranks(found), found.address, found.port) == ((1, 4, 0, 1), "10.0.0.7", 23456)
    assert found.launched
    assert ranks(find_rendezvous(HAND | {"world_size": "2"})) == (1, 2, 0, 1)
    with_locals = HAND | {"world_size": "2", "local_rank": "1", "local_world_size": "2"}
    assert ranks(find_rendezvous(with_locals)) == (1, 2, 1, 2)
    one_task_step = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    one_task_step |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}
    assert find_rendezvous(one_task_step | HAND, configured=4).place == Place(1, 4)  # in srun --pty bash


def test_torchruns_variables_are_taken_as_they_are() -> None:
    found = find_rendezvous(TORCHRUN)
    assert (ranks(found), found.address, found.port) == ((5, 8, 1, 4), "node0", 29500)
    assert not found.chooses_gpu
    few = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert ranks(find_rendezvous(few)) == (5, 8, 0, 8)


def test_a_slurm_step_is_enough_and_a_batch_shell_is_not_a_step() -> None:
    found = find_rendezvous(STEP)
    assert (ranks(found), found.address) == ((3, 5, 1, 2), "gpu07")
    assert found.chooses_gpu
    assert ranks(
        find_rendezvous(STEP | {"SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2"})
    ) == (
        4,
        5,
        0,
        1,
    )
    assert find_rendezvous(BATCH_SHELL) == ALONE


def test_workers_of_a_step_agree_on_a_port_that_linux_does_not_hand_out_and_other_steps_have_another() -> (
    None
):
    others = STEP | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    port = find_rendezvous(STEP).port
    assert find_rendezvous(others).port == port
    assert 1024 < port < 32768
    ports = {find_rendezvous(STEP | {"SLURM_STEP_ID": str(step)}).port for step in range(10)}
    assert len(ports) == 10


def test_address_and_port_given_by_hand_beat_the_launchers() -> None:
    by_pararun = {"hostip": "head", "port": "20077"}
    for launched in (STEP, OPEN_MPI, MPICH, TORCHRUN):
        found = find_rendezvous(by_pararun | launched)
        assert (found.address, found.port) == ("head", 20077)
        assert ranks(found) == ranks(find_rendezvous(launched | by_pararun))


def test_an_mpi_on_one_host_needs_no_address() -> None:
    found = find_rendezvous(OPEN_MPI)
    assert (ranks(found), found.address) == ((1, 2, 1, 2), "127.0.0.1")
    assert 1024 < found.port < 32768
    assert find_rendezvous(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"}).port == found.port
    one_host = MPICH | {"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3", "port": "23456"}
    assert find_rendezvous(one_host).address == "127.0.0.1"


def test_an_mpi_started_by_slurm_is_not_taken_for_slurms_daemons() -> None:
    """mpirun starts its daemons on the other hosts by srun: there SLURM_PROCID counts daemons."""
    daemons = STEP | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "gpu[08,11]"}
    given = {"hostip": "gpu07"}
    assert ranks(find_rendezvous(daemons | OPEN_MPI)) == (1, 2, 1, 2)
    assert ranks(find_rendezvous(daemons | MPICH | given | {"port": "1"})) == (3, 4, 1, 2)
    several = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}
    with pytest.raises(ValueError, match="hostip: expected the address of rank 0's host, got nothing"):
        find_rendezvous(daemons | several)


def test_torchrun_started_by_slurm_is_torchrun() -> None:
    found = find_rendezvous(STEP | TORCHRUN)
    assert (ranks(found), found.address, found.port) == ((5, 8, 1, 4), "node0", 29500)


@pytest.mark.parametrize("environ", [STEP, OPEN_MPI, MPICH | {"hostip": "a", "port": "1"}, TORCHRUN])
@pytest.mark.parametrize("world_size", [3, 9])
def test_a_configured_world_size_that_is_not_the_launched_one_is_refused(
    environ: dict[str, str], world_size: int
) -> None:
    launched = find_rendezvous(environ).place.world_size
    assert find_rendezvous(environ, configured=launched) == find_rendezvous(environ)
    with pytest.raises(ValueError, match=rf"^world_size: expected {launched}, .*, got {world_size}($|;)"):
        find_rendezvous(environ, configured=world_size)


def test_workers_that_contradict_the_configuration_are_refused() -> None:
    assert find_rendezvous({}, num_workers=4, configured=4).place == Place(0, 4)
    with pytest.raises(ValueError, match="--workers: expected 4, as world_size says, got 2"):
        find_rendezvous({}, num_workers=2, configured=4)


@pytest.mark.parametrize(
    ("environ", "configured", "message"),
    [
        ({}, 2, "rank: expected a number in [0, 1], got nothing; start with srun"),
        ({"rank": "0"}, None, "world_size: expected a number in [1, 2147483648], got nothing; start with"),
        ({"hostip": "a"}, None, "world_size: expected "),
        ({"port": "1"}, None, "world_size: expected "),
        ({"rank": "0", "port": "1"}, 2, "hostip: expected the address of rank 0's host, got nothing; give"),
        (HAND | {"hostip": ""}, 2, "hostip: expected the address of rank 0's host, got nothing; give"),
        (
            {"rank": "0", "hostip": "a"},
            2,
            "port: expected a number in [1, 65535], got nothing; give port=PORT",
        ),
        (HAND | {"port": "65536"}, 2, "port: expected a number in [1, 65535], got '65536'"),
        (HAND | {"rank": "2"}, 2, "rank: expected a number in [0, 1], got '2'"),
        (HAND | {"rank": "-1"}, 2, "rank: expected a number in [0, 1], got '-1'"),
        (HAND | {"rank": ""}, 2, "rank: expected a number in [0, 1], got ''"),
        (HAND | {"local_rank": "1"}, 2, "local_rank: expected a number in [0, 0], got '1'"),
        (TORCHRUN | {"RANK": "8"}, None, "RANK: expected a number in [0, 7] from the launcher, got '8'"),
        (STEP | {"SLURM_PROCID": "x"}, None, "SLURM_PROCID: expected a number in [0, 4] from the launcher"),
        (MPICH | {"hostip": "a"}, None, "port: expected a number in [1, 65535], got nothing; give port=PORT"),
    ],
)
def test_a_quantity_that_is_missing_or_wrong_is_named_with_how_to_give_it(
    environ: dict[str, str], configured: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        find_rendezvous(environ, configured=configured)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("n[08,11-12]", "n08"),
        ("node-a,node-b[1-2]", "node-a"),
        ("rack[1-2]-gpu[003-004].site,x", "rack1-gpu003.site"),
    ],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_slurms_task_counts_are_read_node_by_node() -> None:
    assert tasks_per_node("4") == [4]
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("") == []


def test_slurms_processors_per_task_are_this_workers() -> None:
    assert find_rendezvous(STEP).num_cpus is None
    assert find_rendezvous(STEP | {"SLURM_CPUS_PER_TASK": "8"}).num_cpus == 8


@pytest.mark.parametrize("environ", [STEP, OPEN_MPI, MPICH, TORCHRUN])
def test_one_process_on_each_host_is_the_first(environ: dict[str, str]) -> None:
    assert not is_first_on_host(environ)
    (name,) = environ.keys() & {
        "SLURM_LOCALID",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "MPI_LOCALRANKID",
        "LOCAL_RANK",
    }
    assert is_first_on_host(environ | {name: "0"})
    assert is_first_on_host(environ | {name: "none"})
    assert is_first_on_host({})


def test_a_simulation_in_a_step_of_one_task_is_allowed() -> None:
    """srun --pty bash is such a step, and so is its shell's every command."""
    single = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
    assert find_simulation(single, 4, None).place == Place(0, 4)
    with pytest.raises(ValueError, match="--simulate: expected one process without a launcher"):
        find_simulation(single | {"SLURM_STEP_NUM_TASKS": "2"}, 4, None)


@pytest.mark.parametrize("exported", [{"port": "8080"}, {"hostip": "db.example"}, {"rank": "gold"}])
def test_exported_variables_of_something_else_are_named(exported: dict[str, str]) -> None:
    ((name, value),) = exported.items()
    advice = f"in the environment: {name}='{value}': unset what is not meant for this program"
    with pytest.raises(ValueError, match=advice):
        find_rendezvous(exported)

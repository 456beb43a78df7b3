"""Which process this is, by the variables of torchrun and of Slurm."""

import pytest

from ilm_compile.errors import PlanError
from ilm_compile.training.launch import Place, first_host, launch_from_slurm, read_place

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NODEID": "2",
    "SLURM_TASKS_PER_NODE": "2(x3),1,1",
    "SLURM_JOB_NODELIST": "gpu[007-009,12],cpu1",
}


def test_a_process_of_its_own_has_no_launcher() -> None:
    assert read_place({}) == Place()


def test_slurm_is_put_into_the_variables_of_torchrun() -> None:
    environment = dict(SLURM)
    launch_from_slurm(environment=environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("gpu007", "8888")
    assert read_place(environment) == Place(5, 1, 8, 2, is_started=True)


def test_the_node_decides_how_many_tasks_are_local() -> None:
    environment = SLURM | {"SLURM_NODEID": "3", "SLURM_LOCALID": "0"}
    launch_from_slurm(environment=environment)
    assert environment["LOCAL_WORLD_SIZE"] == "1"


def test_a_step_of_srun_comes_before_the_job() -> None:
    environment = SLURM | {"SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "gpu009"}
    launch_from_slurm(environment=environment)
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("6", "gpu009")


def test_host_and_port_can_be_given() -> None:
    environment = dict(SLURM)
    launch_from_slurm(host="head", port=1234, environment=environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5]", "node3"),
        ("node[010,012-014],other[1-2]", "node010"),
        ("rack2-node[01-04]-ib", "rack2-node01-ib"),
        ("10.0.0.5", "10.0.0.5"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "[1-2]", "node[", "node[]"])
def test_what_is_no_list_of_hosts_is_refused(nodes: str) -> None:
    with pytest.raises(PlanError, match="give --host"):
        first_host(nodes)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "the variable RANK is not set; start with torchrun"),
        ({"WORLD_SIZE": "x", "RANK": "0"}, "expected a number in the variable WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK < WORLD_SIZE, got 0, 2 and 2"),
    ],
)
def test_wrong_variables_are_named(environment: dict[str, str], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        read_place(environment)


def test_slurm_outside_of_srun_says_so() -> None:
    with pytest.raises(PlanError, match="SLURM_PROCID is not set; start the job with srun"):
        launch_from_slurm(environment={})

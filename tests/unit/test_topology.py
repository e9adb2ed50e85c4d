"""The grid of ranks and the launcher's environment; no process groups."""

import math
import os

import pytest

from megalite.errors import ConfigError
from megalite.topology import AXES, Grid, LaunchEnvironment, slurm_start

# world size, tensor, pipeline, context
GRIDS = pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (8, 2, 2, 1), (8, 8, 1, 1), (8, 1, 8, 1), (24, 2, 3, 2), (7, 1, 1, 1), (12, 3, 2, 2)]
)
KINDS = [("tensor",), ("context",), ("pipeline",), ("data", "context"), ("pipeline", "tensor"), AXES]


def grid_of(sizes: tuple[int, ...]) -> Grid:
    world, tensor, pipeline, context = sizes
    return Grid.of(world, tensor=tensor, pipeline=pipeline, context=context)


@GRIDS
@pytest.mark.parametrize("axes", KINDS)
def test_each_kind_of_group_partitions_the_ranks(sizes, axes):
    grid = grid_of(sizes)
    groups = grid.groups(*axes)
    size = math.prod(getattr(grid, axis) for axis in axes)
    assert all(len(group) == size for group in groups)
    assert sorted(rank for group in groups for rank in group) == list(range(sizes[0]))


@GRIDS
@pytest.mark.parametrize("axes", KINDS)
def test_coordinates_round_trip_and_agree_with_the_groups(sizes, axes):
    grid = grid_of(sizes)
    where = {rank: dict(zip(AXES, grid.coordinates(rank), strict=True)) for rank in range(sizes[0])}
    for rank, place in where.items():
        assert grid.ranks[tuple(place.values())] == rank
    for group in grid.groups(*axes):
        for axis in set(AXES) - set(axes):
            assert len({where[rank][axis] for rank in group}) == 1
        # A rank's place in the group: DeepSpeed takes that in (pipeline, tensor) for its model-parallel rank.
        places = [[where[rank][axis] for axis in AXES if axis in axes] for rank in group]
        assert places == sorted(places)


def test_tensor_is_fastest_and_pipeline_slowest():
    grid = Grid.of(16, tensor=2, pipeline=2, context=2)
    assert grid.groups("tensor")[:3] == [[0, 1], [2, 3], [4, 5]]
    assert grid.groups("context")[:3] == [[0, 2], [1, 3], [4, 6]]
    assert grid.groups("data", "context")[0] == [0, 2, 4, 6]
    assert grid.groups("pipeline", "tensor")[0] == [0, 1, 8, 9]
    assert grid.coordinates(13) == (1, 1, 0, 1)
    assert grid.zero == 4


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (8, {"tensor": 3}, "parallel.tensor (3) does not divide 8 ranks; start 6 or 9, or change the sizes"),
        (2, {"tensor": 4}, "parallel.tensor (4) does not divide 2 ranks; start 4, or change the sizes"),
        (
            6,
            {"tensor": 2, "pipeline": 2},
            "parallel.tensor (2) x parallel.pipeline (2) does not divide 6 ranks; start 4 or 8, or change the sizes",
        ),
        (1, {"context": 2}, "parallel.context (2) does not divide 1 ranks; start 2, or change the sizes"),
    ],
)
def test_a_world_that_does_not_divide_is_refused(world, sizes, message):
    with pytest.raises(ConfigError) as caught:
        Grid.of(world, **sizes)
    assert str(caught.value) == message


def read(monkeypatch, **variables: str) -> LaunchEnvironment:
    monkeypatch.setattr(os, "environ", variables)  # read() adds to it
    return LaunchEnvironment.read()


MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    assert read(monkeypatch) == LaunchEnvironment(0, 0, 1, launched=False)


def test_a_launcher_is_read(monkeypatch):
    got = read(monkeypatch, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8", **MEETING)
    assert got == LaunchEnvironment(5, 1, 8, launched=True)


@pytest.mark.parametrize(
    ("variables", "shown"),
    [
        ({"RANK": "0"}, "RANK=0, LOCAL_RANK=None, WORLD_SIZE=None"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "RANK=0, LOCAL_RANK=None, WORLD_SIZE=1"),
        ({"RANK": "x", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK=x, LOCAL_RANK=0, WORLD_SIZE=1"),
        ({"RANK": "", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, "RANK=, LOCAL_RANK=0, WORLD_SIZE=1"),
        ({"RANK": "0", "LOCAL_RANK": "0.5", "WORLD_SIZE": "1"}, "RANK=0, LOCAL_RANK=0.5, WORLD_SIZE=1"),
    ],
)
def test_a_partial_or_garbled_launcher_is_refused(monkeypatch, variables, shown):
    with pytest.raises(ConfigError) as caught:
        read(monkeypatch, **variables)
    assert str(caught.value) == (
        f"launcher environment: {shown}: give all three as numbers, or unset them for one process"
    )


@pytest.mark.parametrize(
    ("rank", "local_rank", "world_size"), [("2", "0", "2"), ("-1", "0", "2"), ("0", "-1", "2"), ("0", "0", "0")]
)
def test_a_rank_outside_the_world_is_refused(monkeypatch, rank, local_rank, world_size):
    with pytest.raises(
        ConfigError, match=f"RANK={rank}, LOCAL_RANK={local_rank}, WORLD_SIZE={world_size}: ranks count from 0"
    ):
        read(monkeypatch, RANK=rank, LOCAL_RANK=local_rank, WORLD_SIZE=world_size)


@pytest.mark.parametrize(
    ("changed", "shown"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR=, MASTER_PORT=29500"),
        ({"MASTER_PORT": ""}, "MASTER_ADDR=n1, MASTER_PORT=None"),
        ({"MASTER_PORT": "29500x"}, "MASTER_ADDR=n1, MASTER_PORT=29500x"),
        ({"MASTER_PORT": "65536"}, "MASTER_ADDR=n1, MASTER_PORT=65536"),
    ],
)
def test_a_meeting_point_that_cannot_be_is_refused(monkeypatch, changed, shown):
    with pytest.raises(ConfigError) as caught:
        read(monkeypatch, RANK="0", LOCAL_RANK="0", WORLD_SIZE="2", **MEETING | changed)
    assert str(caught.value) == (
        f"launcher environment: {shown}: give rank 0's host and a free port on it, the same on every rank"
    )


# As srun of SLURM 22.05 set them for the last of four tasks on two nodes.
SRUN = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "12",
    "SLURM_CPUS_ON_NODE": "2",
}


def test_srun_is_read_and_translated_for_torch(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(2))
    assert read(monkeypatch, **SRUN) == LaunchEnvironment(3, 1, 4, launched=True)
    added = {name: value for name, value in os.environ.items() if name not in SRUN}
    assert added == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "20012",
        "LOCAL_WORLD_SIZE": "2",
    }


def test_what_the_batch_script_says_stands(monkeypatch):
    said = {"MASTER_ADDR": "head", "MASTER_PORT": "1234", "LOCAL_WORLD_SIZE": "7"}
    read(monkeypatch, **SRUN | said)
    assert {name: os.environ[name] for name in said} == said


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[004-007,012],m1", "gpu004"),
        ("rack-2-[9,11]-ib", "rack-2-9-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
    ],
)
def test_ranks_meet_at_the_first_node(monkeypatch, nodes, first):
    read(monkeypatch, **SRUN | {"SLURM_STEP_NODELIST": nodes})
    assert os.environ["MASTER_ADDR"] == first


def test_each_start_of_a_job_has_its_port(monkeypatch):
    ports = set()
    for job, restarts in (("12", "0"), ("12", "1"), ("19999", "0"), ("39998", "0")):
        read(monkeypatch, **SRUN | {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts})
        ports.add(int(os.environ["MASTER_PORT"]))
    assert ports == {20012, 20013, 39999, 39998}


@pytest.mark.parametrize(("visible", "local_rank"), [("1", 0), ("GPU-5e1a", 0), ("0,1", 1), ("", 1)])
def test_a_task_that_sees_one_gpu_calls_it_the_first(monkeypatch, visible, local_rank):
    assert read(monkeypatch, **SRUN | {"CUDA_VISIBLE_DEVICES": visible}).local_rank == local_rank
    assert os.environ["LOCAL_RANK"] == str(local_rank)


def test_a_task_bound_to_its_cores_shares_them_with_nobody(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(1))
    read(monkeypatch, **SRUN)
    assert "LOCAL_WORLD_SIZE" not in os.environ


@pytest.mark.parametrize(
    "variables",
    [
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},  # a batch script
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # a shell in a job of four tasks
    ],
)
def test_outside_a_step_of_tasks_there_is_one_rank(monkeypatch, variables):
    assert read(monkeypatch, **variables) == LaunchEnvironment(0, 0, 1, launched=False)


def test_another_launcher_under_srun_comes_first(monkeypatch):
    got = read(monkeypatch, **SRUN | MEETING | {"RANK": "5", "LOCAL_RANK": "2", "WORLD_SIZE": "8"})
    assert got == LaunchEnvironment(5, 2, 8, launched=True)


def test_half_of_sruns_variables_are_refused(monkeypatch):
    with pytest.raises(ConfigError) as caught:
        read(monkeypatch, SLURM_STEP_ID="0", SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_JOB_ID="1")
    assert str(caught.value) == (
        "launcher environment: SLURM_STEP_ID is set, but not SLURM_STEP_NUM_TASKS, SLURM_STEP_NUM_NODES,"
        " SLURM_STEP_NODELIST, SLURM_CPUS_ON_NODE: start with srun, or unset SLURM_STEP_ID for one process"
    )


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "12"}, ("12", 0)),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3"}, ("12", 3)),
        ({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "x"}, None),
    ],
)
def test_slurm_says_which_start_of_which_job(monkeypatch, said, start):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert slurm_start() == start

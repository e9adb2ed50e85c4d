"""The grid of ranks and the launcher's environment; no process groups."""

import pytest

from megalite.errors import ConfigError
from megalite.topology import Grid, LaunchEnvironment

# (world size, tensor, pipeline)
GRIDS = pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (8, 2, 2), (8, 8, 1), (8, 1, 8), (24, 2, 3), (7, 1, 1), (12, 3, 2)]
)


@GRIDS
def test_each_kind_of_group_partitions_the_ranks(sizes):
    grid = Grid.of(*sizes)
    world, tensor, pipeline = sizes
    data = world // (tensor * pipeline)
    for groups, size in (
        (grid.tensor_groups(), tensor),
        (grid.data_groups(), data),
        (grid.model_groups(), tensor * pipeline),
    ):
        assert all(len(group) == size for group in groups)
        assert sorted(rank for group in groups for rank in group) == list(range(world))


@GRIDS
def test_coordinates_round_trip_and_agree_with_the_groups(sizes):
    grid = Grid.of(*sizes)
    where = {rank: grid.coordinates(rank) for rank in range(sizes[0])}
    assert len(set(where.values())) == sizes[0]
    for rank, (pipeline, data, tensor) in where.items():
        assert grid.ranks[pipeline, data, tensor] == rank
    for group in grid.tensor_groups():
        assert [where[rank][2] for rank in group] == list(range(grid.tensor))
        assert len({where[rank][:2] for rank in group}) == 1
    for group in grid.data_groups():
        assert [where[rank][1] for rank in group] == list(range(grid.data))
        assert len({(where[rank][0], where[rank][2]) for rank in group}) == 1
    for group in grid.model_groups():
        assert len({where[rank][1] for rank in group}) == 1
        # A rank's place in the group, which DeepSpeed takes for its model-parallel rank.
        assert [where[rank][0] * grid.tensor + where[rank][2] for rank in group] == list(range(len(group)))


def test_tensor_is_fastest_and_pipeline_slowest():
    grid = Grid.of(8, tensor=2, pipeline=2)
    assert grid.tensor_groups() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert grid.data_groups() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert grid.model_groups() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert grid.coordinates(5) == (1, 0, 1)


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(8, 3, 1), (2, 4, 1), (6, 2, 2), (1, 1, 2)])
def test_a_world_that_does_not_divide_is_refused(world, tensor, pipeline):
    with pytest.raises(ConfigError) as caught:
        Grid.of(world, tensor, pipeline)
    assert str(caught.value) == (
        f"parallel.tensor ({tensor}) x parallel.pipeline ({pipeline}) does not divide {world} ranks;"
        f" start a multiple of {tensor * pipeline}"
    )


def read(monkeypatch, **variables: str) -> LaunchEnvironment:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return LaunchEnvironment.read()


def test_without_a_launcher_there_is_one_rank(monkeypatch):
    assert read(monkeypatch) == LaunchEnvironment(0, 0, 1, launched=False)


def test_a_launcher_is_read(monkeypatch):
    got = read(monkeypatch, RANK="5", LOCAL_RANK="1", WORLD_SIZE="8")
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

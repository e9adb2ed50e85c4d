"""Who reads which window, and going on from a position."""

import numpy as np
import pytest
import torch

from megalite.data.batch import Batch
from megalite.data.dataset import WindowDataset
from megalite.data.loader import TrainLoader, eval_batches
from megalite.errors import UserError
from tests.unit.test_dataset import make_source

SIZE = 4


@pytest.fixture
def data(tmp_path):
    """23 windows of 4; a window's first token is 4 times its number."""
    return WindowDataset([make_source(tmp_path, "a", list(range(23 * SIZE + 3)))], SIZE)


def step_of(data, dp_size, micro_batch, accumulation, seed=1, consumed=0, steps=1):
    """The windows that all ranks together read in `steps` steps, in the order of their sample numbers."""
    loaders = [
        TrainLoader(
            data,
            micro_batch=micro_batch,
            accumulation=accumulation,
            dp_rank=rank,
            dp_size=dp_size,
            seed=seed,
            consumed_samples=consumed,
        )
        for rank in range(dp_size)
    ]
    windows = []
    for _ in range(steps):
        batches = [loader.next_step() for loader in loaders]
        for micro_step in range(accumulation):
            for rank in range(dp_size):
                windows += (batches[rank][micro_step].tokens[:, 0] // SIZE).tolist()
    assert len({loader.consumed_samples for loader in loaders}) == 1
    return windows, loaders[0].state_dict()


def test_batch_fields():
    batch = Batch.from_windows(np.array([[1, 2, 3], [4, 5, 6]]), loss_mask=np.array([True, False])).to("cpu")
    assert batch.tokens.tolist() == [[1, 2], [4, 5]]
    assert batch.labels.tolist() == [[2, 3], [5, 6]]
    assert batch.loss_mask.tolist() == [[True, True], [False, False]]
    assert batch.positions.tolist() == [[0, 1], [0, 1]]
    assert [each.dtype for each in (batch.tokens, batch.labels, batch.positions)] == [torch.int64] * 3
    assert batch.loss_mask.dtype == torch.bool
    assert Batch.from_windows(np.zeros((2, 3))).loss_mask.all()


def test_every_epoch_visits_every_window_once_in_an_order_of_its_own(data):
    windows, _ = step_of(data, dp_size=1, micro_batch=1, accumulation=1, steps=3 * 23)
    epochs = [windows[:23], windows[23:46], windows[46:]]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize(("dp_size", "micro_batch", "accumulation"), [(1, 12, 1), (2, 3, 2), (3, 2, 2), (12, 1, 1)])
def test_any_layout_of_a_step_reads_the_same_samples(data, dp_size, micro_batch, accumulation):
    """Five steps of 12 straddle two ends of epochs."""
    expected, _ = step_of(data, 1, 1, 12, steps=5)
    windows, state = step_of(data, dp_size, micro_batch, accumulation, steps=5)
    assert windows == expected
    assert state["consumed_samples"] == 60


def test_samples_of_one_rank(data):
    loader = TrainLoader(data, micro_batch=2, accumulation=2, dp_rank=1, dp_size=3, seed=1, consumed_samples=12)
    expected = [[loader.window_of(k) for k in samples] for samples in ((14, 15), (20, 21))]
    got = [(batch.tokens[:, 0] // SIZE).tolist() for batch in loader.next_step()]
    assert got == expected
    assert loader.consumed_samples == 24


def test_resume_with_other_ranks_and_batch_size_goes_on_exactly(data):
    whole, _ = step_of(data, 1, 1, 1, steps=60)
    head, state = step_of(data, dp_size=2, micro_batch=3, accumulation=2, steps=2)
    loaders = [TrainLoader(data, micro_batch=2, accumulation=1, dp_rank=rank, dp_size=3, seed=1) for rank in range(3)]
    tail = []
    for loader in loaders:
        loader.load_state_dict(state)
    for _ in range(6):
        for loader in loaders:
            tail += (loader.next_step()[0].tokens[:, 0] // SIZE).tolist()
    assert head + tail == whole


def test_state_is_three_plain_values(data):
    _, state = step_of(data, 1, 2, 1)
    assert state == {"fingerprint": data.fingerprint, "seed": 1, "consumed_samples": 2}


def test_state_of_other_data_or_seed_is_refused(data, tmp_path):
    _, state = step_of(data, 1, 1, 1)
    other = WindowDataset(data.sources, SIZE - 1)
    arguments = {"micro_batch": 1, "accumulation": 1, "dp_rank": 0, "dp_size": 1}
    with pytest.raises(UserError, match="data or block_size changed"):
        TrainLoader(other, seed=1, **arguments).load_state_dict(state)
    with pytest.raises(UserError, match="seed changed: 1 in the checkpoint, 2 now"):
        TrainLoader(data, seed=2, **arguments).load_state_dict(state)


@pytest.mark.parametrize("shard", [(0, 0, 1), (1, 1, 1), (1, -1, 2)])
def test_an_impossible_shard_is_a_bug_of_the_caller(data, shard):
    micro_batch, rank, size = shard
    with pytest.raises(ValueError, match="impossible shard"):
        TrainLoader(data, micro_batch=micro_batch, accumulation=1, dp_rank=rank, dp_size=size, seed=1)
    with pytest.raises(ValueError, match="impossible shard"):
        next(eval_batches(data, micro_batch, rank, size))


@pytest.mark.parametrize(("micro_batch", "dp_size"), [(1, 1), (4, 1), (23, 1), (24, 1), (2, 3), (5, 4), (8, 8)])
def test_evaluation_counts_every_label_once_and_every_rank_has_as_many_batches(data, micro_batch, dp_size):
    ranks = [list(eval_batches(data, micro_batch, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for each in ranks for batch in each]
    assert all(batch.tokens.shape == (micro_batch, SIZE) for batch in batches)
    labels = torch.cat([batch.labels[batch.loss_mask] for batch in batches])
    assert sorted(labels.tolist()) == list(range(1, 23 * SIZE + 1))


def test_evaluation_limit_and_order(data):
    first, second = (list(eval_batches(data, 2, rank, 2, windows=8)) for rank in range(2))
    # 8 of 23 windows, evenly spread: 0, 2, 5, 8, 11, 14, 17, 20.
    assert [(batch.tokens[:, 0] // SIZE).tolist() for batch in first] == [[0, 2], [11, 14]]
    assert [(batch.tokens[:, 0] // SIZE).tolist() for batch in second] == [[5, 8], [17, 20]]
    assert len(list(eval_batches(data, 23, 0, 1, windows=999))) == 1

"""Who reads which window, going on from a position, and preparing ahead."""

import random
import threading
import time

import numpy as np
import pytest
import torch

from megalite.data.batch import Batch
from megalite.data.blend import Blend, SampleOrder
from megalite.data.dataset import WindowDataset
from megalite.data.loader import TrainLoader, eval_batches
from megalite.errors import UserError
from tests.unit.test_dataset import make_source

SIZE = 4
ONE = {"micro_batch": 1, "accumulation": 1, "dp_rank": 0, "dp_size": 1, "seed": 1}
BLENDS = [None, Blend(["a", "b"], [0.4, 0.6], [6, 23])]


@pytest.fixture
def data(tmp_path):
    """23 windows of 4; a window's first token is 4 times its number."""
    return WindowDataset([make_source(tmp_path, "a", list(range(23 * SIZE + 3)))], SIZE)


def loaders_of(data, dp_size, micro_batch, accumulation, seed=1, **options):
    """One for each rank."""
    shape = {"micro_batch": micro_batch, "accumulation": accumulation, "dp_size": dp_size, "seed": seed}
    return [TrainLoader(data, dp_rank=rank, **shape, **options) for rank in range(dp_size)]


def windows_of(loaders, steps=1):
    """The windows that all ranks together read in `steps` steps, in the order of their sample numbers."""
    windows = []
    for _ in range(steps):
        batches = [loader.next_step() for loader in loaders]
        for micro_step in zip(*batches, strict=True):
            for batch in micro_step:
                windows += (batch.tokens[:, 0] // SIZE).tolist()
    assert len({loader.consumed_samples for loader in loaders}) == 1
    return windows


def step_of(data, dp_size, micro_batch, accumulation, steps=1, **options):
    """The windows of `steps` steps of new loaders, and the position after them."""
    loaders = loaders_of(data, dp_size, micro_batch, accumulation, **options)
    windows = windows_of(loaders, steps)
    for loader in loaders:
        loader.close()
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
    order = SampleOrder(23, seed=1)
    expected = [[order(k) for k in samples] for samples in ((14, 15), (20, 21))]
    got = [(batch.tokens[:, 0] // SIZE).tolist() for batch in loader.next_step()]
    loader.close()
    assert got == expected
    assert loader.consumed_samples == 24


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("seed", range(4))
def test_any_history_of_ranks_and_batch_sizes_reads_each_sample_once(data, blend, seed):
    rng = random.Random(seed)
    seen, state = [], None
    for _ in range(5):
        loaders = loaders_of(data, rng.randint(1, 4), rng.randint(1, 3), rng.randint(1, 3), blend=blend, prefetch=3)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(state)
        seen += windows_of(loaders, rng.randint(1, 4))
        state = loaders[-1].state_dict()
        for loader in loaders:
            loader.close()
    order = SampleOrder(23, 1, blend)
    assert seen == [order(k) for k in range(len(seen))]
    assert state["consumed_samples"] == len(seen) > 23


def test_state_is_three_plain_values(data):
    _, state = step_of(data, 1, 2, 1)
    assert state == {"fingerprint": data.fingerprint, "seed": 1, "consumed_samples": 2}
    _, state = step_of(data, 1, 2, 1, blend=BLENDS[1])
    assert state == {"fingerprint": BLENDS[1].fingerprint(data.fingerprint), "seed": 1, "consumed_samples": 2}


def test_progress_counts_passes_over_what_was_read(data):
    loader, blended = TrainLoader(data, **ONE, consumed_samples=45), TrainLoader(data, **ONE, blend=BLENDS[1])
    loader.next_step()
    assert loader.progress() == {"epoch": 2.0}
    for _ in range(15):
        blended.next_step()
    assert blended.progress() == {"epochs": pytest.approx({"a": 1.0, "b": 9 / 17})}
    loader.close()
    blended.close()


def test_state_of_other_data_blend_or_seed_is_refused(data):
    _, state = step_of(data, 1, 1, 1)
    other = WindowDataset(data.sources, SIZE - 1)
    message = r"data, its blend or block_size changed: .* --data\.allow_changed_data$"
    for loader in (TrainLoader(other, **ONE), TrainLoader(data, **ONE, blend=BLENDS[1])):
        with pytest.raises(UserError, match=message):
            loader.load_state_dict(state)
    with pytest.raises(UserError, match="seed changed: 1 in the checkpoint, 2 now"):
        TrainLoader(data, **ONE | {"seed": 2}, allow_changed_data=True).load_state_dict(state)


def test_other_data_is_read_from_the_same_sample_on_where_that_is_asked_for(data):
    _, state = step_of(data, 1, 1, 1, steps=9)
    loader = TrainLoader(data, **ONE, blend=BLENDS[1], allow_changed_data=True)
    notice = loader.load_state_dict(state)
    assert "changed" in notice
    assert "sample 9 of" in notice
    assert windows_of([loader]) == [SampleOrder(23, 1, BLENDS[1])(9)]
    loader.close()
    assert TrainLoader(data, **ONE, allow_changed_data=True).load_state_dict(state) is None


class Watched(WindowDataset):
    """Counts the batches that were read, and can fail."""

    read, failure = 0, None

    def batch(self, indices, loss_mask=None):
        if self.failure is not None:
            raise self.failure
        self.read += 1
        return super().batch(indices, loss_mask)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("depth", [1, 3])
def test_steps_are_prepared_ahead_so_many_and_no_more(data, depth):
    watched = Watched(data.sources, SIZE)
    loader = TrainLoader(watched, **ONE, prefetch=depth)
    assert watched.read == 0  # until it is known where to begin
    for step in range(1, 30):
        loader.next_step()
        assert loader.state_dict()["consumed_samples"] == step
        wait_for(lambda: watched.read == step + depth)  # noqa: B023
    loader.close()
    assert watched.read == 29 + depth


@pytest.mark.parametrize("failure", [UserError("a bad token"), MemoryError(), SystemExit(3)])
def test_what_reading_raises_is_raised_by_next_step_each_time(data, failure):
    watched = Watched(data.sources, SIZE)
    loader = TrainLoader(watched, **ONE)
    loader.next_step()
    wait_for(lambda: watched.read == 3)
    watched.failure = failure
    for _ in range(2):
        loader.next_step()
    for _ in range(2):
        with pytest.raises(type(failure)) as caught:
            loader.next_step()
        assert caught.value is failure
    assert loader.consumed_samples == 3
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_closed_is_closed(data):
    loader = TrainLoader(data, **ONE)
    loader.close()  # before the first step there is nothing to end
    loader.next_step()
    with pytest.raises(RuntimeError, match="before the first step"):
        loader.load_state_dict(loader.state_dict())
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()
    loader.close()


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

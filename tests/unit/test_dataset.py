"""Windows and their keyed order."""

import json
import struct

import numpy as np
import pytest
import torch

from megalite.data.batch import Batch
from megalite.data.dataset import WindowDataset
from megalite.data.indexed import IndexedDataset
from megalite.data.permutation import KeyedPermutation
from megalite.errors import UserError
from tests.unit.test_indexed import handwritten_idx

GOLDEN = [6, 0, 2, 7, 9, 1, 4, 3, 5, 8]


def make_source(folder, name, tokens, tokenizer=None):
    (folder / f"{name}.idx").write_bytes(handwritten_idx([len(tokens)] if tokens else []))
    (folder / f"{name}.bin").write_bytes(struct.pack(f"<{len(tokens)}H", *tokens))
    if tokenizer:
        facts = {"tokens": len(tokens), "documents": 1, "dtype": "uint16", "tokenizer_sha256": tokenizer}
        (folder / f"{name}.manifest.json").write_text(json.dumps(facts))
    return IndexedDataset(folder / name)


def test_windows_overlap_by_one_and_stay_in_their_source(tmp_path):
    first = make_source(tmp_path, "a", list(range(11)))  # windows 0-4, 4-8; 9 and 10 remain
    empty = make_source(tmp_path, "b", [])
    second = make_source(tmp_path, "c", list(range(100, 109)))
    data = WindowDataset([first, empty, str(tmp_path / "c")], block_size=4)
    assert second.num_tokens == 9
    windows = [data[i].tolist() for i in range(len(data))]
    assert windows == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [100, 101, 102, 103, 104], [104, 105, 106, 107, 108]]
    assert data[0].dtype == np.int64
    labels = [token for window in windows for token in window[1:]]
    assert labels == [*range(1, 9), *range(101, 109)]


@pytest.mark.parametrize("index", [-1, 2])
def test_a_window_that_is_not_there(tmp_path, index):
    data = WindowDataset([make_source(tmp_path, "a", list(range(9)))], block_size=4)
    with pytest.raises(IndexError):
        data[index]


def test_an_id_that_the_model_does_not_have_is_refused(tmp_path):
    source = make_source(tmp_path, "a", [0, 1, 2, 3, 4, 5, 6, 7, 8])
    data = WindowDataset([source], block_size=4, vocab_size=8)
    assert data[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match=r"a\.bin: token id 8 near token 4, but model\.vocab_size is 8; "):
        data[1]
    assert WindowDataset([source], block_size=4, vocab_size=9)[1].max() == 8


def test_no_window_says_what_there_is(tmp_path):
    source = make_source(tmp_path, "a", list(range(8)))
    assert len(WindowDataset([source], block_size=7)) == 1
    with pytest.raises(UserError, match=r"block_size 8 .* has 8"):
        WindowDataset([source], block_size=8)
    with pytest.raises(UserError, match="no window"):
        WindowDataset([make_source(tmp_path, "b", [])], block_size=1)
    with pytest.raises(UserError, match="no window"):
        WindowDataset([], block_size=1)


def test_sources_of_different_tokenizers_are_refused(tmp_path):
    tokens = list(range(9))
    same = [make_source(tmp_path, "a", tokens, "t1"), make_source(tmp_path, "b", tokens, "t1")]
    unknown = make_source(tmp_path, "c", tokens)
    assert len(WindowDataset([*same, unknown], 4)) == 6
    with pytest.raises(UserError, match="different tokenizers"):
        WindowDataset([*same, make_source(tmp_path, "d", tokens, "t2")], 4)


# Documents within windows


def random_index(seed):
    """(.idx, tokens, the document of each token): documents of 0 to 3 sequences, sequences of 0 to 40 tokens."""
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, rng.choice([2, 5, 40]), rng.integers(0, 4)).tolist() for _ in range(60)]
    bounds = np.cumsum([0, *map(len, sequences)])
    owner = np.repeat(np.arange(60), [sum(each) for each in sequences])
    return handwritten_idx([n for each in sequences for n in each], bounds=bounds.tolist()), owner


@pytest.mark.parametrize("seed", range(20))
def test_documents_of_every_window_are_those_of_its_tokens(tmp_path, seed):
    """With several sequences a document and none, of one token, longer than a window, and borders on the window's."""
    index, owner = random_index(seed)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(np.arange(len(owner), dtype="<u2").tobytes())
    before = make_source(tmp_path, "b", list(range(20)))
    for size in (1, 3, 16, 50):
        data = WindowDataset([before, tmp_path / "a"], size, reset_positions=True, mask_documents=True)
        order = list(np.random.default_rng(seed).permutation(len(data)))
        batch = data.batch(order)
        assert batch.documents.dtype == torch.int32
        skipped = 19 // size  # windows of the other source
        assert not batch.documents[[i for i, window in enumerate(order) if window < skipped]].any()
        for i, window in enumerate(order):
            if window < skipped:
                continue
            mine = owner[(window - skipped) * size :][:size].tolist()
            seen = list(dict.fromkeys(mine))
            assert batch.documents[i].tolist() == [seen.index(each) for each in mine]
            assert batch.positions[i].tolist() == [t - mine.index(each) for t, each in enumerate(mine)]


def test_options_change_nothing_else(tmp_path):
    index, owner = random_index(0)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(np.arange(len(owner), dtype="<u2").tobytes())
    keep = np.array([True, False])
    for reset, mask in ((False, False), (True, False), (False, True), (True, True)):
        data = WindowDataset([tmp_path / "a"], 16, reset_positions=reset, mask_documents=mask)
        got = data.batch([2, 5], keep)
        want = Batch.from_windows(np.stack([data[2], data[5]]), keep)
        for field in ("tokens", "labels", "loss_mask"):
            assert torch.equal(getattr(got, field), getattr(want, field))
        assert torch.equal(got.positions, want.positions) != reset
        assert (got.documents is not None) == mask
        moved = got.to("cpu")
        assert moved.documents is got.documents
        assert moved.positions is got.positions
        assert data.batch([2, 5]).loss_mask.all()


def test_byte_pointers_that_do_not_rise_are_noticed_where_they_are_used(tmp_path):
    good = handwritten_idx([3, 1, 4, 1, 1])
    assert good.count(struct.pack("<q", 8)) == 1
    (tmp_path / "a.idx").write_bytes(good.replace(struct.pack("<q", 8), struct.pack("<q", 4000)))
    (tmp_path / "a.bin").write_bytes(bytes(20))
    data = WindowDataset([tmp_path / "a"], 9, mask_documents=True)
    with pytest.raises(UserError, match=r"a\.idx has byte pointers that don't rise near token 0; build"):
        data.batch([0])


def test_fingerprint_depends_on_block_size_content_and_order(tmp_path):
    a, b = make_source(tmp_path, "a", list(range(9))), make_source(tmp_path, "b", list(range(13)))
    prints = {WindowDataset(sources, size).fingerprint for sources, size in (([a, b], 4), ([b, a], 4), ([a, b], 3))}
    assert len(prints) == 3
    assert WindowDataset([a, b], 4).fingerprint in prints


def test_fingerprint_of_a_manifest_that_has_both_hashes_reads_no_file(tmp_path):
    make_source(tmp_path, "a", list(range(9)), "t1")
    path = tmp_path / "a.manifest.json"
    facts = json.loads(path.read_text())
    prints = set()
    for index, shard in (("i", "b"), ("i", "c"), ("j", "b")):
        path.write_text(json.dumps(facts | {"idx_sha256": index, "bin_sha256": shard}))
        data = WindowDataset([tmp_path / "a"], 4)
        (tmp_path / "a.idx").rename(tmp_path / "away")
        prints.add(data.fingerprint)
        (tmp_path / "away").rename(tmp_path / "a.idx")
    assert len(prints) == 3


@pytest.mark.parametrize("n", [*range(1, 40), 63, 64, 65, 99, 100, 101, 1000, 4097])
def test_permutation_is_a_bijection(n):
    order = [KeyedPermutation(n, seed=7, epoch=0)(i) for i in range(n)]
    assert sorted(order) == list(range(n))


def test_permutation_at_large_n():
    n = 2**40
    order = KeyedPermutation(n, seed=7, epoch=3)
    images = {order(i) for i in range(5000)}
    assert len(images) == 5000
    assert all(0 <= image < n for image in images)
    # Uniform on [0, 1): mean 0.5 with standard deviation 0.29 / sqrt(5000) = 0.004.
    assert abs(np.mean([image / n for image in images]) - 0.5) < 0.02
    for outside in (-1, n):
        with pytest.raises(IndexError):
            order(outside)


def test_permutation_depends_on_seed_and_epoch_and_is_reproducible():
    def order(seed, epoch):
        return tuple(map(KeyedPermutation(200, seed, epoch), range(200)))

    orders = {order(seed, epoch) for seed in (1, 2, 11) for epoch in (0, 1, 11)}
    assert len(orders) == 9
    assert tuple(range(200)) not in orders
    assert order(1, 0) == order(1, 0)
    # A checkpoint's position means this very order; a change here breaks every resume.
    assert [KeyedPermutation(10, seed=1234, epoch=0)(i) for i in range(10)] == GOLDEN


def test_permutation_puts_every_window_everywhere():
    """Over 4000 seeds each of 10 windows comes first about equally often (chi-square, 9 degrees of freedom)."""
    counts = np.bincount([KeyedPermutation(10, seed, 0)(0) for seed in range(4000)], minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 33.7  # p = 0.0001


def test_neighbours_do_not_stay_neighbours():
    order = [KeyedPermutation(10000, 1, 0)(i) for i in range(10000)]
    # Of random pairs, the mean distance is n/3; an unshuffled order has 1.
    assert 3100 < np.abs(np.diff(order)).mean() < 3560
    # Rank correlation of place and window: standard deviation 0.01.
    assert abs(np.corrcoef(order, range(10000))[0, 1]) < 0.05

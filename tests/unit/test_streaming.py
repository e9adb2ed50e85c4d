"""Training from text: which windows come when, on how many ranks whatever, and going on from a place in a file."""

import os
import random
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest

from megalite.data import lanes
from megalite.data.indexed import IndexedDataset
from megalite.data.lanes import BlockReader, Position
from megalite.data.streaming import block_of
from tests.unit.stream_ranks import SIZE, Ranks, loader
from tests.unit.token_files import build, random_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("working_folder", "opened_once")


@pytest.fixture
def small_pieces(monkeypatch):
    """So that texts of some hundred bytes are read and encoded in pieces."""
    for name, value in (("PIECE", 40), ("BORDER", 64), ("READ", 100), ("BATCH_PIECES", 7)):
        monkeypatch.setattr(lanes, name, value)


def write_texts(form):
    """Files of one form, with what is hard in each; returns their names."""
    texts = [text.replace("\x00", "") for text in random_documents(60, seed=3)]
    texts[20] = " ".join(texts)[:9000]  # longer than a segment
    texts[30:33] = ["", "x" * 2500, " \n"]
    os.mkdir("in")
    if form == "jsonl":
        write_jsonl("in/a.jsonl", texts[:30])
        write_jsonl("in/b.jsonl", texts[30:])
        Path("in/b.jsonl").write_bytes(b"\xef\xbb\xbf" + Path("in/b.jsonl").read_bytes() + b"\n \n")
    else:
        between = {"none": " ", "line": "\r\n", "blank": "\n \n"}[form]
        whole = between.join(text.replace("\t\r\n\n", "") for text in texts)
        Path("in/a.txt").write_text("\ufeff" + whole, encoding="utf-8", newline="")
        Path("in/b.txt").write_text("y" * 5000, encoding="utf-8")  # nowhere to be cut
        Path("in/c.txt").write_text("日本語" * 1000 + " é\n", encoding="utf-8")
        Path("in/d.txt").write_text("\ufeff", encoding="utf-8")
        Path("in/e.txt").touch()
    return sorted(str(path) for path in Path("in").iterdir())


def reader_of(tokenizer_dir, files, lane_count, *, cuttable=True, **options):
    reader = BlockReader(loader(tokenizer_dir, files, block_size=1, **options).corpus, lane_count)
    if not cuttable:
        reader.corpus, reader.encoder.cut = replace(reader.corpus, cuttable=False), None
    return reader


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("cuttable", [True, False])
@pytest.mark.parametrize("form", ["jsonl", "none", "line", "blank"])
def test_an_epoch_is_what_is_built_from_the_same_files(tokenizer_dir, form, cuttable):
    """Every token of every document once. A lane is its segments in a row, from whatever token it is gone on with."""
    files = write_texts(form)
    split_on = "none" if form == "jsonl" else form
    [summary] = build(tokenizer_dir, files, split_on=split_on)
    reader = reader_of(tokenizer_dir, files, 3, cuttable=cuttable, split_on=split_on)
    count = reader.corpus.ends[-1]
    segments = [b"".join(reader._encode(list(reader._segment(Position(n))))) for n in range(2 * count)]
    assert sum(map(bool, segments)) >= (2 * 3 if form == "none" and not cuttable else 20)
    files_and_starts = [reader.corpus.segment(n)[:2] for n in range(count)]
    in_order = sorted(range(count), key=files_and_starts.__getitem__)
    assert b"".join(segments[n] for n in in_order) == IndexedDataset(summary.prefix).tokens.tobytes()

    rng = random.Random(1)
    for lane in range(3):
        expected = np.frombuffer(b"".join(segments[lane::3]), reader.dtype).tolist()
        found, at = [], Position(lane)
        while len(found) < len(expected) - 700:
            tokens, at = reader.next_block(at, rng.choice([0, 1, 2, 30, 400] if cuttable else [0, 400]))
            assert found[-1:] == tokens[: len(found)][:1].tolist()
            found += tokens[1 if found else 0 :].tolist()
        assert found == expected[: len(found)]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_epoch_deals_out_every_byte_once_in_an_order_of_its_own(tokenizer_dir, epoch):
    files = write_texts("line")
    corpus = loader(tokenizer_dir, files, split_on="line").corpus
    numbers = range(epoch * corpus.ends[-1], (epoch + 1) * corpus.ends[-1])
    segments = [(file.path, start, end) for file, start, end in map(corpus.segment, numbers)]
    ends = {path: [0, *(end for each, _, end in sorted(segments) if each == path)] for path, _, _ in segments}
    assert all([start for each, start, _ in sorted(segments) if each == path] == ends[path][:-1] for path in ends)
    assert {path: end[-1] for path, end in ends.items()} == {p: os.path.getsize(p) for p in files if os.path.getsize(p)}
    assert segments != sorted(segments)
    others = range((epoch + 1) * corpus.ends[-1], (epoch + 2) * corpus.ends[-1])
    assert [(file.path, start, end) for file, start, end in map(corpus.segment, others)] != segments


@pytest.mark.parametrize(("dp_size", "accumulation"), [(2, 1), (3, 4), (4, 3), (12, 1)])
def test_a_step_holds_the_same_samples_for_any_number_of_ranks(tokenizer_dir, corpus, dp_size, accumulation):
    expected = Ranks(tokenizer_dir, corpus).steps(20)
    assert Ranks(tokenizer_dir, corpus, dp_size, accumulation=accumulation).steps(20) == expected
    assert len({tuple(window) for step in expected for window in step}) > 230


def test_a_run_goes_on_exactly_with_any_number_of_ranks(tokenizer_dir, corpus):
    """At random steps, most of them inside a block of four windows; five steps of 12 are five windows of each lane."""
    rng = random.Random(5)
    expected = list(chain(*Ranks(tokenizer_dir, corpus).steps(50)))
    found, state = [], None
    while len(found) < len(expected):
        ranks = Ranks(tokenizer_dir, corpus, rng.choice([1, 2, 3, 4, 6]), global_batch=rng.choice([12, 24, 36]))
        if state is not None:
            ranks.load(state)
        found += chain(*ranks.steps(rng.randrange(1, 6)))
        state = ranks.state()
        assert state["consumed_samples"] == len(found)
    assert found[: len(expected)] == expected


def test_a_state_is_what_was_returned_not_what_is_read_ahead(tokenizer_dir, corpus):
    ranks = Ranks(tokenizer_dir, corpus)
    start = ranks.state()
    assert start["lanes"] == [[lane, -1, 0, 0] for lane in range(12)]
    assert {"seed": 1, "consumed_samples": 0, "first_sample": 0}.items() <= start.items()
    first = ranks.steps(1)
    assert ranks.state() == Ranks(tokenizer_dir, corpus).load(start).state() | {
        "consumed_samples": 12, "lanes": ranks.state()["lanes"]
    }  # fmt: skip
    assert Ranks(tokenizer_dir, corpus).load(start).steps(1) == first


def test_resuming_reads_nothing_of_what_is_behind(tokenizer_dir, few_lanes):
    """Each file is a segment. Once a lane is through with one, it may be gone."""
    os.mkdir("in")
    for number, text in enumerate(random_documents(300, seed=2)):
        write_jsonl(f"in/{number:03}.jsonl", [text + " end"])
    ranks = Ranks(tokenizer_dir, ["in"], block_size=40)
    ranks.steps(30)
    state, expected = ranks.state(), ranks.steps(10)
    again = Ranks(tokenizer_dir, ["in"], block_size=40).load(state)
    segment = again.loaders[0].corpus.segment
    behind = [n for lane, (at, *_) in enumerate(state["lanes"]) for n in range(lane, at, 12)]
    assert len(behind) > 50
    for number in behind:
        os.remove(segment(number)[0].path)
    assert again.steps(10) == expected


def test_windows_of_a_lane_are_its_stream(tokenizer_dir, corpus):
    """Without a shuffle buffer in order, each sharing one token with the next; with one, block by block mixed."""
    in_order = Ranks(tokenizer_dir, corpus, shuffle_buffer=1).steps(64)
    for lane in range(12):
        windows = [step[lane] for step in in_order]
        assert all(a[-1] == b[0] for a, b in pairwise(windows))
    mixed = Ranks(tokenizer_dir, corpus, shuffle_buffer=16 * 12 + 5).steps(64)
    orders = set()
    for lane in range(12):
        windows, stream = [step[lane] for step in mixed], [step[lane] for step in in_order]
        for first in (16, 32, 48):
            assert sorted(windows[first : first + 16]) == sorted(stream[first : first + 16])
            orders.add(tuple(stream[first : first + 16].index(window) for window in windows[first : first + 16]))
    assert len(orders) == 36
    assert tuple(range(16)) not in orders


def test_blocks_grow_to_their_size():
    blocks = [block_of(window, 8) for window in range(24)]
    assert sorted(set(blocks)) == [(0, 1), (1, 1), (2, 2), (4, 4), (8, 8), (16, 8)]
    assert all(first <= window < first + count for window, (first, count) in enumerate(blocks))
    assert [block_of(window, 1) for window in range(3)] == [(0, 1), (1, 1), (2, 1)]


def test_a_corpus_smaller_than_a_window_is_read_again_and_again(tokenizer_dir):
    Path("a.txt").write_text("the fox", encoding="utf-8")
    only = loader(tokenizer_dir, ["a.txt"], block_size=50)
    document = BlockReader(only.corpus, 1).next_block(Position(0), 1)[0].tolist()
    document = document[: document.index(only.eod_id) + 1]
    [window, *_] = Ranks(tokenizer_dir, ["a.txt"], block_size=50).steps(1)[0]
    assert window == (document * 51)[:51]
    only.next_step()
    assert only.progress()["epoch"] > 1


def test_progress_counts_passes_over_the_corpus(tokenizer_dir, corpus):
    ranks = Ranks(tokenizer_dir, corpus, dp_size=2)
    [summary] = build(tokenizer_dir, corpus)
    ranks.steps(2 * summary.tokens // (12 * SIZE))
    assert all(abs(each.progress()["epoch"] - 2) < 0.4 for each in ranks.loaders)


def test_documents_are_told_apart_where_asked_for(tokenizer_dir, corpus):
    both = loader(tokenizer_dir, corpus, reset_positions=True, mask_documents=True, block_size=40)
    for batch in both.next_step():
        for tokens, positions, documents in zip(batch.tokens, batch.positions, batch.documents, strict=True):
            ends = (tokens == both.eod_id).int().cumsum(0)
            assert documents.tolist() == [0, *ends[:-1].tolist()]
            assert [i for i in range(40) if positions[i] == 0] == [
                0,
                *(i + 1 for i in range(39) if tokens[i] == both.eod_id),
            ]
    assert batch.loss_mask.all()
    plain = loader(tokenizer_dir, corpus, block_size=40).next_step()[0]
    assert plain.documents is None
    assert plain.positions[0].tolist() == list(range(40))

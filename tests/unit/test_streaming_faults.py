"""Training from text that cannot be: other data, bad data or none, wrong arguments, and processes that die."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from megalite.errors import UserError
from tests.unit.stream_ranks import Ranks, loader
from tests.unit.token_files import random_documents, write_jsonl

pytestmark = pytest.mark.usefixtures("working_folder", "opened_once")


def test_other_data_or_another_order_is_refused(tokenizer_dir, corpus):
    state = Ranks(tokenizer_dir, corpus).state()
    with pytest.raises(UserError, match="the seed changed: 1 in the checkpoint, 2 now"):
        loader(tokenizer_dir, corpus, seed=2).load_state_dict(state)
    for change in ({"block_size": 6}, {"shuffle_buffer": 49}, {"json_key": "other"}, {"split_on": "line"}):
        with pytest.raises(UserError, match=r"shuffle_buffer changed: fingerprint .* --data.allow_changed_data"):
            loader(tokenizer_dir, corpus, **change).load_state_dict(state)
    os.mkdir("moved")
    os.rename("a.jsonl", "moved/a.jsonl")
    assert loader(tokenizer_dir, ["moved/a.jsonl"]).load_state_dict(state) is None
    with open("moved/a.jsonl", "r+b") as file:
        file.write(b" ")
    with pytest.raises(UserError, match="the training text"):
        loader(tokenizer_dir, ["moved/a.jsonl"]).load_state_dict(state)


def test_changed_data_where_allowed_is_read_from_its_start(tokenizer_dir, corpus):
    ranks = Ranks(tokenizer_dir, corpus)
    ranks.steps(3)
    write_jsonl("b.jsonl", random_documents(50, seed=9))
    other = Ranks(tokenizer_dir, ["b.jsonl"], allow_changed_data=True)
    assert "going on from the start of the data" in other.loaders[0].load_state_dict(ranks.state())
    expected = Ranks(tokenizer_dir, ["b.jsonl"]).steps(9)
    assert other.steps(4) == expected[:4]
    assert other.loaders[0].consumed_samples == 7 * 12
    assert Ranks(tokenizer_dir, ["b.jsonl"], 3).load(other.state()).steps(5) == expected[4:]
    changed = loader(tokenizer_dir, ["b.jsonl"], allow_changed_data=True)
    assert "fingerprint" in changed.load_state_dict({"seed": 1, "consumed_samples": 5, "fingerprint": "of an index"})


def test_lanes_are_dealt_out_to_ranks_that_divide_them(tokenizer_dir, corpus):
    seven = Ranks(tokenizer_dir, corpus, 7, global_batch=14)
    seven.steps(3)
    state, expected = seven.state(), list(chain(*seven.steps(10)))
    assert len(state["lanes"]) == 14  # 12 of which could not be dealt out to seven
    assert list(chain(*Ranks(tokenizer_dir, corpus, 2, global_batch=20).load(state).steps(7))) == expected
    message = r"in 14 lanes, which .* 3 data-parallel ranks: go on with one of 1, 2, 7, 14$"
    with pytest.raises(UserError, match=message):
        loader(tokenizer_dir, corpus, 0, 3).load_state_dict(state)


@pytest.mark.parametrize("content", ["", "\n \n\r\n" * 3000])
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_no_text_at_all(tokenizer_dir, name, content):
    Path(name).write_text(content, encoding="utf-8", newline="")
    with pytest.raises(UserError, match=f'no text in "{name}": there is nothing to train on'):
        loader(tokenizer_dir, [name], split_on="line").next_step()


def test_almost_no_text_is_found(tokenizer_dir, few_lanes):
    Path("a.txt").write_text("\n" * 40_000 + "fox\n" + "\n" * 40_000, encoding="utf-8")
    [windows] = Ranks(tokenizer_dir, ["a.txt"], split_on="line", shuffle_buffer=1).steps(1)
    assert len(windows) == 12
    assert len({token for window in windows for token in window}) < 5


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_what_has_no_places_to_go_on_from_is_refused(tokenizer_dir, name):
    Path(name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"{name}: streaming needs plain .*preprocess_data"):
        loader(tokenizer_dir, [name])


@pytest.mark.parametrize(
    ("name", "split_on", "bad", "line", "reason"),
    [
        ("a.jsonl", "none", b'{"text": 1}', 301, "not a string"),
        ("a.jsonl", "none", b'{"text": "', 301, "broken JSON"),
        ("a.txt", "none", b"a\n\xff", 302, "invalid UTF-8"),
        ("a.txt", "line", b"\xc3", 301, "invalid UTF-8"),
        ("a.txt", "blank", b"a\n\xc3\n", 302, "invalid UTF-8"),
    ],
)
def test_a_bad_document_is_named(tokenizer_dir, few_lanes, name, split_on, bad, line, reason):
    good = b'{"text": "the quick brown fox"}\n'
    Path(name).write_bytes(good * 300 + bad + b"\n" + good * 300)
    with pytest.raises(UserError, match=rf"^{name}:{line}: .*{reason}.*--on-error skip"):
        Ranks(tokenizer_dir, [name], split_on=split_on).steps(3000)


def test_impossible_arguments(tokenizer_dir):
    write_jsonl("a.jsonl", ["the fox"])
    for wrong in ({"dp_rank": 1}, {"block_size": 0}, {"shuffle_buffer": 0}, {"workers": -1}, {"accumulation": 13}):
        with pytest.raises(ValueError, match="impossible loader"):
            loader(tokenizer_dir, ["a.jsonl"], **wrong)
    with pytest.raises(UserError, match='split_on "page" is none of'):
        loader(tokenizer_dir, ["a.jsonl"], split_on="page")
    started = loader(tokenizer_dir, ["a.jsonl"])
    state = started.state_dict()
    started.next_step()
    with pytest.raises(RuntimeError, match="before the first step"):
        started.load_state_dict(state)
    started.close()
    with pytest.raises(RuntimeError, match="closed"):
        started.next_step()


def test_workers_give_what_one_process_gives_and_end_at_once(tokenizer_dir, corpus):
    expected = Ranks(tokenizer_dir, corpus).steps(30)
    ranks = Ranks(tokenizer_dir, corpus, workers=2)
    assert ranks.steps(30) == expected
    assert len(multiprocessing.active_children()) == 2
    [only] = ranks.loaders
    only.close()
    only.close()
    assert not multiprocessing.active_children()


def test_a_dead_worker_ends_the_run(tokenizer_dir, corpus):
    ranks = Ranks(tokenizer_dir, corpus, workers=1)
    ranks.steps(1)
    [worker] = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with pytest.raises(UserError, match="a process that tokenizes died"):
        ranks.steps(100)
    assert not multiprocessing.active_children()


def test_what_a_worker_raises_arrives(tokenizer_dir):
    Path("a.jsonl").write_text('{"text": "fox"}\n' * 9 + "[]\n", encoding="utf-8")
    ranks = Ranks(tokenizer_dir, ["a.jsonl"], workers=1)
    with pytest.raises(UserError, match=r"^a.jsonl:10: not a JSON object"):
        ranks.steps(100)
    assert not multiprocessing.active_children()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        ranks.steps(1)


PARENT = """
import multiprocessing, sys, time
from megalite.data.inputs import expand_inputs
from megalite.data.streaming import StreamingLoader
if __name__ == "__main__":
    loader = StreamingLoader(
        expand_inputs(["a.jsonl"]), sys.argv[1], block_size=5, micro_batch=1, accumulation=1, dp_rank=0, dp_size=1,
        seed=1, workers=1, encoder="tokenizers",
    )
    loader.next_step()
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(60)
"""


def test_workers_die_with_a_killed_parent(tokenizer_dir, corpus):
    Path("parent.py").write_text(PARENT, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "parent.py", str(tokenizer_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        worker = int(parent.stdout.readline())
        parent.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)

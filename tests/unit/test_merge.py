"""Many pairs to one: their documents in order, whatever their types, and whole or not there whenever it is stopped."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalite.data.indexed import IndexedDataset
from megalite.data.merge import merge_indexed
from megalite.data.validate import validate
from megalite.errors import UserError
from tests.unit import pair_files
from tests.unit.pair_files import PAIR, files_in, random_documents, sha256

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("working_folder")


def merge(inputs, output="out/x", **options):
    return merge_indexed(inputs, output, progress=False, **options)


def refused(message, *arguments, **options):
    """One line that holds `message`, and what is in out/ stays as it was."""
    before = contents()
    with pytest.raises(UserError) as caught:
        merge(*arguments, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents() == before


def contents(folder="out"):
    return {name: Path(folder, name).read_bytes() for name in files_in(folder)}


@pytest.mark.parametrize("chunk_bytes", [8, 72, 8 << 20])
@pytest.mark.parametrize("letters", ["HHH", "iii", "Hii", "BHB", "bHq", "hHb"])
def test_the_result_is_what_one_writer_would_have_written(letters, chunk_bytes):
    parts = [random_documents(seed, count) for seed, count in ((0, 12), (1, 0), (2, 30))]
    for name, part, letter in zip("abc", parts, letters, strict=True):
        pair_files.megatron(name, part, letter)
    # An input without documents, as b is, has no say in the type.
    held = {"HH": "H", "ii": "i", "Hi": "i", "BB": "B", "bq": "q", "hb": "h"}[letters[0] + letters[2]]
    summary = merge(["a", "b.idx", "c.bin"], widen=letters in ("Hii", "bHq", "hHb"), chunk_bytes=chunk_bytes)
    expected = parts[0] + parts[2]
    pair_files.megatron("expected", expected, held)
    assert Path("out/x.idx").read_bytes() == Path("expected.idx").read_bytes()
    assert Path("out/x.bin").read_bytes() == Path("expected.bin").read_bytes()
    assert (summary.inputs, summary.documents, summary.dtype) == (3, 42, pair_files.NAMES[held])
    assert (summary.sequences, summary.tokens) == (sum(map(len, expected)), sum(pair_files.sizes(expected)))
    assert validate("out/x", deep=True).ok
    assert IndexedDataset("out/x").num_documents == 42
    assert files_in("out") == PAIR


def test_a_type_that_holds_both():
    pair_files.megatron("a", [[[65_535]]], "H")
    pair_files.megatron("b", [[[-32_768]]], "h")
    refused("a holds uint16 and b int16: pass --widen", ["a", "b"])
    assert merge(["a", "b"], widen=True).dtype == "int32"
    assert IndexedDataset("out/x").tokens.tolist() == [65_535, -32_768]


def test_globs_are_sorted_and_the_order_given_is_kept():
    for name, token in (("part-b", 2), ("part-a", 1), ("0", 9)):
        pair_files.ours(name, [[[token]]])
    merge(["part-*", "0"])
    assert IndexedDataset("out/x").tokens.tolist() == [1, 2, 9]


def test_the_manifest_says_what_all_inputs_agree_on():
    documents = [random_documents(seed, 5) for seed in range(2)]
    pair_files.ours("a", documents[0])
    pair_files.ours("b", documents[1])
    summary = merge(["a", "b"])
    entries = [
        {
            "prefix": name,
            "documents": 5,
            "tokens": sum(pair_files.sizes(part)),
            "bin_sha256": sha256(f"{name}.bin"),
            "idx_sha256": sha256(f"{name}.idx"),
        }
        for name, part in zip("ab", documents, strict=True)
    ]
    manifest = json.loads(Path("out/x.manifest.json").read_text())
    assert manifest == {
        "version": 2,
        "tokenizer_sha256": "a" * 64,
        "vocab_size": 60,
        "eod_id": 0,
        "append_eod": True,
        "merged_from": entries,
        "dtype": "uint16",
        "documents": 10,
        "tokens": summary.tokens,
        "text_bytes": 3 * summary.tokens,
        "bin_sha256": sha256("out/x.bin"),
        "idx_sha256": sha256("out/x.idx"),
    }
    assert (summary.tokenizer_sha256, summary.notes) == ("a" * 64, [])

    pair_files.ours("b", documents[1], append_eod=False, text_bytes=None)
    summary = merge(["a", "b"], overwrite=True)
    manifest = json.loads(Path("out/x.manifest.json").read_text())
    assert "append_eod" not in manifest
    assert "text_bytes" not in manifest
    assert manifest["eod_id"] == 0
    assert summary.notes == ["append_eod is not known: the inputs' manifests differ in it, or don't say it"]

    pair_files.megatron("c", documents[1])
    summary = merge(["a", "c"], overwrite=True)
    assert not {"tokenizer_sha256", "vocab_size"} & json.loads(Path("out/x.manifest.json").read_text()).keys()
    assert (summary.tokenizer_sha256, len(summary.notes)) == (None, 1)
    assert "the tokenizer is not known: c has no manifest" in summary.notes[0]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ([], {}, "no input is given"),
        (["missing"], {}, "missing.idx is missing"),
        (["no-*"], {}, 'no .idx file matches "no-*"'),
        (["a", "a.idx"], {}, "a is given twice"),
        (["a", "sub/../a"], {}, "sub/../a is given twice, also as a"),
        (["a", "link"], {}, "link is given twice, also as a"),
        (["a", "b"], {"output": "b", "overwrite": True}, "b is an input and the output"),
        (["a", "b"], {"output": "out/"}, "has no file name"),
        (["a", "b"], {"output": ""}, "has no file name"),
        (["a", "b"], {"output": "a.bin/x"}, "cannot write a.bin/x: "),
        (["a", "wide"], {}, "a holds uint16 and wide int32: pass --widen"),
        (["a", "other"], {}, "a and other have different tokenizers"),
        (["a", "larger"], {}, "a and larger have different vocabularies"),
        (["a", "short"], {}, "short.bin has 2 bytes, but"),
        (["neox"], {}, "gpt-neox"),
        (["nothing"], {}, "there is nothing to merge"),
        (["damaged", "a"], {}, "damaged.bin differs from the bin_sha256 in damaged.manifest.json"),
        (["a", "damaged-idx"], {}, "damaged-idx.idx differs from the idx_sha256"),
    ],
)
def test_what_is_refused(inputs, options, message):
    os.mkdir("sub")
    documents = [[[5, 0]], [[1, 2, 0]]]
    for name, facts in (
        ("a", {}),
        ("b", {}),
        ("other", {"tokenizer_sha256": "b" * 64}),
        ("larger", {"vocab_size": 61}),
        ("damaged", {"bin_sha256": "c" * 64}),
        ("damaged-idx", {"idx_sha256": "c" * 64}),
    ):
        pair_files.ours(name, documents, **facts)
    pair_files.megatron("wide", documents, "i")
    pair_files.megatron("short", documents)
    Path("short.bin").write_bytes(b"\1\0")
    pair_files.neox_merged("neox", documents)
    pair_files.megatron("nothing", [])
    for suffix in ("bin", "idx"):
        os.symlink(f"a.{suffix}", f"link.{suffix}")
    pair_files.ours("b", documents)
    before = sorted(os.listdir("."))
    refused(message, inputs, **options)
    assert set(os.listdir(".")) - {"out"} == set(before)
    assert files_in("out") == []


def test_what_exists_is_kept_unless_it_is_the_same_or_may_go():
    pair_files.ours("a", random_documents(0, 5))
    pair_files.megatron("b", random_documents(1, 5))  # its hash is taken from the file
    first = merge(["a", "b"])
    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in files_in("out")}
    again = merge(["./a", "b.idx"])
    assert [each.up_to_date for each in (first, again)] == [False, True]
    assert (again.tokens, again.documents, again.notes) == (first.tokens, first.documents, first.notes)
    refused("pass --overwrite", ["b", "a"])
    refused("pass --overwrite", ["a"])
    tokens = Path("b.bin").read_bytes()
    Path("b.bin").write_bytes(bytes([tokens[0] ^ 1]) + tokens[1:])
    refused("pass --overwrite", ["a", "b"])
    assert before == {name: os.stat(f"out/{name}").st_mtime_ns for name in files_in("out")}
    assert not merge(["a", "b"], overwrite=True).up_to_date
    assert merge(["a", "b"]).up_to_date
    Path("out/x.bin").write_bytes(b"")  # damaged since
    refused("pass --overwrite", ["a", "b"])
    os.remove("out/x.manifest.json")
    refused("pass --overwrite", ["a", "b"])
    merge(["a", "b"], overwrite=True)
    os.rename("out/x.manifest.json", "out/x.manifest.json.tmp")  # as a kill may leave it, but for the .bin
    merged = Path("out/x.bin").read_bytes()
    Path("out/x.bin").write_bytes(merged[::-1])
    refused("pass --overwrite", ["a", "b"])
    Path("out/x.bin").write_bytes(merged)
    assert merge(["a", "b"]).up_to_date
    assert files_in("out") == PAIR


# The program reports that it begins, then merges with tiny chunks; KILL_AT: it dies before its n-th fsync or rename.
PROGRAM = """
import os, signal, sys
from megalite.data.merge import merge_indexed
kill_at = int(sys.argv[1])
def dying(call):
    def wrapped(*arguments):
        global kill_at
        kill_at -= 1
        if kill_at == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments)
    return wrapped
os.fsync, os.replace = dying(os.fsync), dying(os.replace)
print("begins", flush=True)
merge_indexed(["a", "b"], "out/x", progress=False, chunk_bytes=64)
"""


def start_merge(kill_at=0):
    command = [sys.executable, "-c", PROGRAM, str(kill_at)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert run.stdout.readline() == "begins\n"
    return run


def check_killed(run, expected):
    """Nothing half-written under a final name; the same merge again gives the same bytes."""
    run.communicate(timeout=60)
    for name, content in contents().items():
        assert name.endswith(".tmp") or content == expected[name]
    merge(["a", "b"])
    assert contents() == expected


@pytest.fixture
def expected_merge():
    for name, seed in (("a", 1), ("b", 2)):
        pair_files.ours(name, random_documents(seed, 1000, several=False))
    merge(["a", "b"], "expected/x")
    return contents("expected")


def test_killed_at_any_moment_the_merge_runs_again_to_the_same_bytes(expected_merge):
    rng = random.Random(3)
    run = start_merge()
    start = time.monotonic()
    run.communicate(timeout=60)
    seconds = time.monotonic() - start
    assert contents() == expected_merge
    killed = 0
    for _ in range(10):
        for name in files_in("out"):
            os.remove(f"out/{name}")
        run = start_merge()
        time.sleep(rng.uniform(0, seconds))
        run.kill()
        check_killed(run, expected_merge)
        killed += run.returncode == -signal.SIGKILL
    assert killed >= 3


@pytest.mark.parametrize("kill_at", range(1, 8))  # fsync of three files, three renames, fsync of the folder
def test_killed_between_its_last_steps(expected_merge, kill_at):
    run = start_merge(kill_at)
    check_killed(run, expected_merge)
    assert run.returncode == -signal.SIGKILL


def tool(*arguments, **options):
    command = [sys.executable, str(ROOT / "tools/merge_data.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)


def test_command_line():
    pair_files.ours("part-1", random_documents(1, 5))
    pair_files.megatron("part-2", random_documents(2, 5))
    arguments = ["--input", "part-*", "--output-prefix", "artifacts/data/train"]
    done = tool(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "10 documents, of 2 inputs; wrote in" in done.stdout
    assert "note: the tokenizer is not known: part-2 has no manifest" in done.stdout
    done = tool(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert (result["up_to_date"], result["documents"], result["dtype"]) == (True, 10, "uint16")
    assert list(result["files"]) == [f"artifacts/data/train.{suffix}" for suffix in ("bin", "idx", "manifest.json")]
    done = tool(*arguments[:-1], "part-1", "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: part-1 is an input and the output")


@pytest.mark.parametrize("limit", [2_000, 40_000])  # in the .bin, in the .idx
def test_a_real_write_error_is_one_line_and_leaves_what_was_there(limit):
    pair_files.ours("a", random_documents(1, 3000, several=False, empty=False))
    pair_files.ours("b", [[[1, 0]]])
    merge(["b"])
    before = contents()

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = tool("--input", "a", "b", "--output-prefix", "out/x", "--overwrite", preexec_fn=full)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "error: cannot write out/x: File too large\n")
    assert contents() == before


def test_memory_does_not_follow_the_number_of_documents():
    count = 200_000
    lengths, pointers = np.ones(count, "<i4"), 2 * np.arange(count, dtype="<i8")
    header = pair_files.idx([], []).ljust(34)[:18] + np.array([count, count + 1], "<u8").tobytes()
    bounds = np.arange(count + 1, dtype="<i8")
    content = b"".join([header, lengths.tobytes(), pointers.tobytes(), bounds.tobytes()])
    for name in "ab":
        pair_files.write(name, content, bytes(2 * count))
    tracemalloc.start()
    merge(["a", "b"], chunk_bytes=1 << 14)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert IndexedDataset("out/x").num_documents == 2 * count
    assert peak < 1.5e6  # the two indexes have 8 MB, the tokens 0.8

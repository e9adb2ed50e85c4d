"""The tokenizer: exact round trips, special tokens, Hugging Face's reading of it, sampling, bad input."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import tokenizers
import zstandard
from pyarrow import parquet

from megalite.data.inputs import expand_inputs
from megalite.data.tokenizer import EOD, Tokenizer, train_tokenizer
from megalite.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TEXT = "".join(
    f"def function_{i}(value):\n    return value + {i}  # don't stop, it's naïve — 日本語\n" for i in range(300)
)
SPECIAL = ["<|user|>", "<|assistant|>"]
HARD = [
    "",
    " ",
    "   leading and trailing   ",
    "\r\n\r\n\t\v\f\x00\x01\x1c\x1f\x7f\x85\u2028",
    "e\u0301 \u0301\u0302 a\u20dd",
    "👩‍👩‍👧‍👦 🇨🇭 🏳️‍🌈 \U0010ffff \ufeff\ufffe\uffff",
    "ﬁ ﷺ Å Å İ ß ſ ǆ 𝔘𝔫𝔦",
    "<|endoftext|> <|user|>x<|assistant|><|endoftext|>",
    "שלום عليكم नमस्ते ไทย",
    "Hello , world . It 's n't",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizer")
    (base / "a.txt").write_text(TEXT, encoding="utf-8")
    summary = train_tokenizer([str(base / "a.txt")], 350, base / "out", SPECIAL)
    assert (summary.vocab_size, summary.sampled_bytes) == (350, len(TEXT.encode()))
    return base / "out"


def random_texts(count, seed):
    rng = random.Random(seed)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (0x300, 0x370)]
    for _ in range(count):
        yield "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(60)))


def test_any_text_comes_back_exactly(folder):
    tokenizer = Tokenizer(folder)
    texts = [*HARD, *random_texts(400, seed=5), TEXT]
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert encoded == [tokenizer.encode(text) for text in texts]
    assert max(map(max, filter(None, encoded))) < tokenizer.vocab_size == 350
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / 3  # it did learn merges


def test_text_of_a_special_token_stays_text(folder):
    tokenizer = Tokenizer(folder)
    assert tokenizer.eod_id == 0
    for token in [EOD, *SPECIAL]:
        text = f"a{token}b {token}"
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
            assert not {0, 1, 2} & set(ids)
            assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, 1]) == EOD + SPECIAL[0]


def test_hugging_face_reads_the_same(folder):
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer(folder)
    assert theirs.is_fast
    assert (theirs.eos_token, theirs.eos_token_id, len(theirs)) == (EOD, 0, ours.vocab_size)
    assert theirs.clean_up_tokenization_spaces is False
    assert [theirs.convert_tokens_to_ids(token) for token in SPECIAL] == [1, 2]
    for text in [*HARD, *random_texts(50, seed=6), TEXT]:
        if "<|" not in text:  # where Hugging Face reads special tokens, we read text
            assert theirs(text)["input_ids"] == ours.encode(text)
            assert theirs.decode(ours.encode(text)) == text
    assert theirs(f"a{EOD}")["input_ids"][-1] == 0
    assert theirs.decode([0], skip_special_tokens=True) == ""


def test_the_same_arguments_give_the_same_file(folder, tmp_path):
    (tmp_path / "b.txt").write_text(TEXT, encoding="utf-8")
    train_tokenizer([str(tmp_path / "b.txt")], 350, tmp_path / "out", SPECIAL)
    assert Tokenizer(tmp_path / "out").sha256 == Tokenizer(folder).sha256
    assert sorted(os.listdir(tmp_path / "out")) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["b.txt.gz", "b.txt.zst", "b.jsonl.gz", "b.parquet"])
def test_any_input_gives_the_same_file(folder, tmp_path, name):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / name
    text = json.dumps({"text": TEXT}) if "jsonl" in name else TEXT
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"text": [TEXT]}), path)
    else:
        path.write_bytes((gzip if name.endswith(".gz") else zstandard).compress(text.encode()))
    summary = train_tokenizer([str(tmp_path / "data")], 350, tmp_path / "out", SPECIAL)
    assert (summary.files, summary.total_bytes, summary.sampled_bytes) == (1, len(TEXT.encode()), len(TEXT.encode()))
    assert Tokenizer(tmp_path / "out").sha256 == Tokenizer(folder).sha256


def test_foreign_folders(folder, tmp_path):
    """BOS, truncation and padding of a foreign tokenizer are not applied, and its eos_token ends documents."""
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = backend.encode("hello value").ids
    backend.add_special_tokens(["</s>"])
    content = json.loads(backend.to_str().replace(EOD, "<unk>"))
    template = {"type": "TemplateProcessing", "pair": [], "special_tokens": {}}
    bos = {"SpecialToken": {"id": "<unk>", "type_id": 0}}
    template["single"] = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    template["special_tokens"] = {"<unk>": {"id": "<unk>", "ids": [0], "tokens": ["<unk>"]}}
    content["post_processor"] = template
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("hello value").ids == [0, ids[0]]
    with pytest.raises(UserError, match="neither"):
        Tokenizer(tmp_path)
    for eos in ("</s>", {"content": "</s>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        tokenizer = Tokenizer(tmp_path)
        assert (tokenizer.eod_id, tokenizer.vocab_size) == (350, 351)
        assert tokenizer.encode("hello value") == ids
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json"):
        Tokenizer(tmp_path)


def test_loading_what_is_no_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: No such file"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(UserError, match="is not a tokenizer") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_sample_spreads_over_files_and_positions(tmp_path, monkeypatch):
    from megalite.data import tokenizer as module

    monkeypatch.setattr(module, "PIECE", 200)
    for name in "abcd":
        rows = [json.dumps({"text": f"{name} {i:04d} " + "x" * 93}) for i in range(1000)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "abcd"]
    size = sum(map(os.path.getsize, paths))

    def sample(seed, wanted=size // 5):
        counts = dict.fromkeys(("sampled_bytes", "total_bytes", "sampled_pieces", "total_pieces"), 0)
        return list(module._sample(expand_inputs(paths), wanted, "text", seed, counts)), counts

    pieces, counts = sample(seed=1)
    assert counts["total_pieces"] == 4000
    assert counts["total_bytes"] == 4000 * 100
    assert (len(pieces), 100 * len(pieces)) == (counts["sampled_pieces"], counts["sampled_bytes"])
    for name in "abcd":  # 1000 draws at 0.2: standard deviation 13; 250 draws: 6.3
        numbers = [int(piece[2:6]) for piece in pieces if piece[0] == name]
        assert 140 < len(numbers) < 260
        assert all(20 < sum(quarter * 250 <= n < quarter * 250 + 250 for n in numbers) < 80 for quarter in range(4))
    assert sample(seed=1)[0] == pieces != sample(seed=2)[0]
    assert sample(seed=1, wanted=size)[1]["sampled_pieces"] == 4000


def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa bbbb")
    summary = train_tokenizer([str(tmp_path / "a.txt")], 5000, tmp_path / "out", min_frequency=1)
    assert 257 < summary.vocab_size < 300
    assert summary.requested_vocab_size == 5000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"files": ["missing.txt"]}, "no such file"),
        ({"files": ["*.nothing"]}, "no file matches"),
        ({"files": ["empty.txt"]}, r'no text in "empty\.txt": there is nothing to train'),
        ({"files": ["empty.txt", "blank.jsonl"]}, r'no text in "empty\.txt" and 1 more: '),
        ({"files": ["broken.jsonl"]}, r"broken\.jsonl:2: broken JSON"),
        ({"files": ["latin.txt"]}, r"latin\.txt:3: invalid UTF-8"),
        ({"vocab_size": 258}, "too small"),
        ({"special_tokens": ["<|a|>", "<|a|>"]}, "given twice"),
        ({"special_tokens": [" "]}, "is empty"),
        ({"special_tokens": ["<|\n|>"]}, "can't be printed"),
        ({"special_tokens": ["value"]}, "ordinary text"),
        ({"special_tokens": ["a"]}, "ordinary text"),
        ({"min_frequency": 0}, "min_frequency"),
        ({"sample_bytes": 1}, "--sample-bytes"),
        ({"output_dir": "good.txt"}, r"cannot write to good\.txt"),
        ({"output_dir": "good.txt/x"}, r"cannot write to good\.txt/x"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(TEXT)
    Path("empty.txt").write_text("")
    Path("blank.jsonl").write_text("\n")
    Path("broken.jsonl").write_text('{"text": "x"}\n{"text": \n')
    Path("latin.txt").write_bytes(b"a\nb\ncaf\xe9\n")
    arguments = {"files": ["good.txt"], "vocab_size": 300, "output_dir": "out", "special_tokens": SPECIAL} | options
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(**arguments)
    assert "\n" not in str(caught.value)
    assert not Path("out").exists() or not os.listdir("out")
    assert Path("good.txt").read_text() == TEXT


def test_naming_the_end_token_is_no_mistake(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    train_tokenizer([str(tmp_path / "a.txt")], 300, tmp_path / "out", ["<|user|>", EOD])
    backend = Tokenizer(tmp_path / "out").backend
    assert [backend.token_to_id(token) for token in (EOD, "<|user|>")] == [0, 1]


def run_tool(*arguments, cwd):
    command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def test_command_line(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.txt").write_text(TEXT)
    (tmp_path / "data/val.txt").write_text("zzz")
    common = ["--vocab-size", "32000", "--output-dir", "artifacts/tokenizer"]
    done = run_tool("--data-files", "data/train.txt", "data/val.txt", *common, "--sample-bytes", "1MB", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "(100 %)" in done.stdout
    assert "not 32,000" in done.stdout
    assert Tokenizer(tmp_path / "artifacts/tokenizer").vocab_size > 300

    failed = run_tool("--data-files", "data/other.txt", *common, cwd=tmp_path)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr == 'error: no such file: "data/other.txt"\n'
    usage = run_tool("--data-files", "data/train.txt", *common, "--sample-bytes", "many", cwd=tmp_path)
    assert usage.returncode == 2
    assert "is not a size such as 200MB" in usage.stderr

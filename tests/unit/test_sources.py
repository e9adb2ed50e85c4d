"""What data.train_files and data.eval_files become."""

import math
from pathlib import Path

import pytest

from megalite.config import BlendEntry, DataConfig
from megalite.data.dataset import WindowDataset
from megalite.data.sources import (
    cache_prefix,
    check_tokenizer,
    index_texts,
    make_blend,
    resolve_blend,
    resolve_files,
    streamed_files,
    unigram_entropy,
)
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from tests.unit.test_dataset import make_source


def test_unigram_entropy_of_the_windows_that_are_evaluated(tmp_path):
    uniform, constant = [0, 1, 2, 3] * 4, [7] * 9
    data = WindowDataset([make_source(tmp_path, "a", [3, *uniform, *constant])], block_size=8)
    assert unigram_entropy(data, 1) == pytest.approx(math.log(4))
    assert unigram_entropy(data, 1000) == unigram_entropy(data)
    # 16 labels uniform over four tokens, 8 of a fifth.
    assert unigram_entropy(data) == pytest.approx(4 / 6 * math.log(6) + 1 / 3 * math.log(3))


def test_text_is_indexed_once_and_again_when_it_changes(tmp_path, tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    text = tmp_path / "a.txt"
    text.write_text("fox " * 100)
    data = DataConfig(cache_dir=str(tmp_path / "cache"), num_workers=1)
    index_texts([str(text)], tokenizer, data)
    prefix = cache_prefix([str(text)], tokenizer, data)
    built = Path(f"{prefix}.bin").stat().st_mtime_ns
    index_texts([str(text)], tokenizer, data)
    assert Path(f"{prefix}.bin").stat().st_mtime_ns == built
    for change in ({"json_key": "body"}, {"split_on": "line"}):
        assert cache_prefix([str(text)], tokenizer, data.model_copy(update=change)) != prefix
    text.write_text("dog " * 101)
    assert cache_prefix([str(text)], tokenizer, data) != prefix


def test_streamed_files_are_of_the_format(tmp_path):
    for name in ("a.txt", "b.jsonl"):
        (tmp_path / name).write_text("fox")
    data = DataConfig(train_files=[str(tmp_path / "*.txt")], format="text")
    assert [file.path for file in streamed_files(data)] == [str(tmp_path / "a.txt")]
    with pytest.raises(ConfigError, match=r"b.jsonl is not .txt, which data.format = text reads"):
        streamed_files(data.model_copy(update={"train_files": [str(tmp_path)]}))


def test_a_folder_names_the_text_in_it(tmp_path):
    (tmp_path / "a.txt").write_text("fox")
    assert resolve_files([str(tmp_path)], "data.train_files") == ([], [str(tmp_path / "a.txt")])


def entries(*prefixes):
    return [BlendEntry(prefix=prefix, weight=weight) for weight, prefix in enumerate(prefixes, 1)]


def test_a_blends_entries_are_parts_of_one_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, tokens in (("a", 9), ("b", 5), ("c1", 13), ("c2", 2), ("c3", 4 + 1)):
        make_source(tmp_path, name, list(range(tokens)))
    found = resolve_blend(entries("b.bin", "c*", "a"))
    assert found == [(["b"], []), (["c1", "c2", "c3"], []), (["a"], [])]
    dataset = WindowDataset([prefix for prefixes, _ in found for prefix in prefixes], block_size=4)
    blend = make_blend(entries("b.bin", "c*", "a"), [1, 3, 1], dataset)
    assert (blend.names, blend.windows, blend.shares) == (["b.bin", "c*", "a"], [1, 4, 2], [1, 2, 3])


def test_a_blend_without_a_sense_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    long, short = make_source(tmp_path, "long", list(range(9))), make_source(tmp_path, "short", [1, 2, 3, 4])
    for text in ("x.txt", "y.txt"):
        Path(text).write_text("fox")
    with pytest.raises(ConfigError, match=r"^data\.blend: short is shorter than one sequence \(data\.block_size = 4,"):
        make_blend(entries("long", "short"), [1, 1], WindowDataset([long, short], block_size=4))
    for twice in (("long", "./long.bin"), ("lon*", "long"), ("*.txt", "./y.txt")):
        with pytest.raises(ConfigError, match=r"^data\.blend: .* is in both .* and .*; give it once$"):
            resolve_blend(entries(*twice))
    with pytest.raises(ConfigError, match=r"^data\.blend: nowhere: no such indexed data"):
        resolve_blend(entries("long", "nowhere"))


def test_data_of_another_tokenizer_is_refused(tmp_path, tokenizer_dir):
    tokenizer = Tokenizer(tokenizer_dir)
    own = WindowDataset([make_source(tmp_path, "a", [0] * 9, tokenizer=tokenizer.sha256)], block_size=4)
    check_tokenizer(own, tokenizer, "data.train_files")
    unknown = WindowDataset([make_source(tmp_path, "b", [0] * 9)], block_size=4)
    check_tokenizer(unknown, tokenizer, "data.train_files")
    other = WindowDataset([make_source(tmp_path, "c", [0] * 9, tokenizer="0" * 64)], block_size=4)
    with pytest.raises(ConfigError, match=r"^data\.eval_files: .*c was made with another tokenizer"):
        check_tokenizer(other, tokenizer, "data.eval_files")

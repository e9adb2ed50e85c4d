"""Inputs: which files, which documents are in them, and what is said of bad ones."""

import os
from pathlib import Path

import pytest

from megalite.data import tokenize
from megalite.data.documents import expand_inputs, read_pieces
from megalite.data.sources import resolve_files
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError, UserError
from tests.unit.token_files import build, documents_of, refused

pytestmark = pytest.mark.usefixtures("working_folder")
GOOD = '{"text": "fox"}\n'


def test_inputs_are_expanded_in_order_and_once():
    for name in ("b2.txt", "b1.txt", "a.txt", "[x].txt", "c.TXT"):
        Path(name).write_text("x")
    os.symlink("a.txt", "link.txt")
    assert expand_inputs(["b*.txt", "a.txt", "./b1.txt", "link.txt", "[x].txt", "c.TXT"]) == [
        "b1.txt",
        "b2.txt",
        "a.txt",
        "[x].txt",
        "c.TXT",
    ]


def test_files_to_train_on_are_sorted_into_pairs_and_texts():
    for name in ("a.bin", "a.idx", "b[1].bin", "b[1].idx", "c.txt", "d.jsonl", "e.manifest.json"):
        Path(name).write_text("x")
    assert resolve_files(["*"], "key") == (["a", "b[1]"], ["c.txt", "d.jsonl"])
    assert resolve_files(["d.jsonl", "c.*", "d*"], "key") == ([], ["d.jsonl", "c.txt"])
    assert resolve_files(["b[1]", "a.idx", "a", "b[1].bin"], "key") == (["b[1]", "a"], [])


@pytest.mark.parametrize(
    ("pattern", "error", "message"),
    [
        ("*.bin", ConfigError, r"key: \*\.bin matches no \.bin, \.idx, \.txt or \.jsonl file"),
        ("x", ConfigError, r"key: x: no such indexed data \(x\.idx does not exist\); build it"),
        ("x.txt", UserError, r'no such file: "x\.txt"'),
        ("*.txt", UserError, r'no file matches "\*\.txt"'),
    ],
)
def test_what_matches_nothing_is_named(pattern, error, message):
    Path("e.manifest.json").write_text("x")
    with pytest.raises(error, match=message):
        resolve_files([pattern], "key")


@pytest.mark.parametrize(
    ("split_on", "expected"),
    [
        ("none", ["\r\none\r\ntwo\n \t\n\nthree  \r\n\nfour"]),
        ("line", ["one", "two", "three  ", "four"]),
        ("blank", ["one\r\ntwo", "three  ", "four"]),
    ],
)
def test_documents_of_a_txt(tokenizer_dir, split_on, expected):
    Path("a.txt").write_bytes(b"\r\none\r\ntwo\n \t\n\nthree  \r\n\nfour")
    Path("b.txt").write_text("")
    Path("c.txt").write_text("\n\nend\n")
    build(tokenizer_dir, ["a.txt", "b.txt", "c.txt"], split_on=split_on)
    tokenizer = Tokenizer(tokenizer_dir)
    found = [tokenizer.decode(ids[:-1]) for ids in documents_of("out/x")]
    assert found == [*expected, "\n\nend\n" if split_on == "none" else "end"]


def test_byte_order_mark_of_a_jsonl_is_no_error(tokenizer_dir):
    Path("a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fox"}\r\n')
    build(tokenizer_dir, ["a.jsonl"])
    assert documents_of("out/x") == [[*Tokenizer(tokenizer_dir).encode("fox"), 0]]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_pieces_of_a_txt_are_the_text(tmp_path, ending):
    text = ("wörter und 日本語 👩‍👧 " * 30 + "\r\n") * 3 + "é" * 500 + ending
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    for size in (1, 2, 3, 7, 100, 10**6):
        pieces = list(read_pieces(str(tmp_path / "a.txt"), "text", size))
        assert "".join(pieces) == text
        assert max(len(piece.encode()) for piece in pieces) <= 2 * size + 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + '{"text": "fox"\n', "a.jsonl:2: broken JSON"),
        (GOOD + "\n" + '["fox"]\n', "a.jsonl:3: not a JSON object"),
        (GOOD + '{"body": "fox"}\n', "a.jsonl:2: no key \"text\" (its keys: 'body')"),
        (GOOD + '{"text": null}\n', 'a.jsonl:2: the value of "text" is not a string but NoneType'),
        (GOOD + '{"text": "\\ud800"}\n', "a.jsonl:2: a lone surrogate"),
        (GOOD.encode() + b'{"text": "\xff"}\n', "a.jsonl:2: invalid UTF-8"),
        ("[" * 100_000, "a.jsonl:1: broken JSON"),
        ("\0", "a.jsonl:1: broken JSON"),
        ("", 'no text in "a.jsonl": there is nothing'),
        ('\n{"text": ""}\n', 'no text in "a.jsonl": there is nothing'),
    ],
)
def test_bad_documents(tokenizer_dir, content, message):
    Path("a.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(message, tokenizer_dir, ["a.jsonl"])


def test_inputs_without_text_are_named(tokenizer_dir):
    for name in ("b.txt", "a.txt", "c.jsonl"):
        Path(name).write_text("")
    refused('no text in "b.txt" and 2 more: there is nothing to tokenize', tokenizer_dir, ["b.txt", "*"])


def test_the_first_bad_document_is_named_for_any_number_of_workers(tokenizer_dir, monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH_BYTES", 1)
    Path("a.jsonl").write_text(GOOD * 30 + "{\n" + GOOD + "[\n" + GOOD * 30)
    for workers in (1, 2):
        refused("a.jsonl:31: broken JSON", tokenizer_dir, ["a.jsonl"], workers=workers)


@pytest.mark.parametrize("split_on", ["none", "line", "blank"])
def test_bad_text_has_its_line(tokenizer_dir, split_on):
    Path("a.txt").write_bytes(b"one\n\ntwo\ncaf\xe9\nfour\n")
    refused("a.txt:4: invalid UTF-8", tokenizer_dir, ["a.txt"], split_on=split_on)

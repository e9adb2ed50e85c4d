"""Documents out of bytes: the same for any cut of a file, each bad one said with its line, memory bounded."""

import json
import os
import random
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest

from megalite.data import documents
from megalite.data.documents import Part, PartReader, Piece, Reject, divisible, first_line
from megalite.data.inputs import InputFile
from megalite.errors import UserError
from tests.unit.part_files import BOM, GOOD, cut_anywhere, cut_at_space, cut_nowhere, read, store, texts, whole

pytestmark = pytest.mark.usefixtures("working_folder")


# Lines, good and bad, that files are made of at random: for .jsonl, and as .txt.
LINES = [
    b'{"text": "\\u65e5\\u672c"}',
    '{"text": "wörter 👩‍👧"}'.encode(),
    b'  {"text": "", "n": [1, {"text": 2}]} ',
    b"{broken",
    b'{"text": "\xff"}',
    b"",
    b"",
    b" \t\x0b\x0c",
    b'{"text": "' + b"long " * 12 + b'"}',
]


def random_file(rng):
    lines = [rng.choice(LINES) + rng.choice([b"\n", b"\n", b"\r\n"]) for _ in range(rng.randrange(12))]
    content = rng.choice([b"", b"", BOM]) + b"".join(lines)
    return content.removesuffix(b"\n") if rng.random() < 0.4 else content


@pytest.mark.parametrize(("name", "split_on"), [("a.jsonl", "none"), ("a.txt", "line"), ("a.txt", "blank")])
def test_any_cut_of_a_file_gives_the_same_documents(monkeypatch, name, split_on):
    monkeypatch.setattr(documents, "BLOCK", 7)
    rng = random.Random(5)
    for _ in range(300):
        content = random_file(rng)
        found, reader = read(name, content, split_on=split_on)
        size = len(content)
        borders = [0, *sorted(rng.choices(range(size + 1), k=rng.randrange(size + 2))), size]
        cut, lines, blank_lines = [], 0, 0
        for part in (Part(name, start, end) for start, end in pairwise(borders)):
            each = PartReader(part, split_on=split_on)
            for document in each:
                line = first_line(part, document.line, split_on)
                assert line == lines + document.line
                cut.append(document._replace(line=line))
            lines += each.lines
            blank_lines += each.blank_lines
            assert each.position == part.end - part.start
        assert cut == found
        assert (lines, blank_lines) == (reader.lines, reader.blank_lines) == (lines, reader.blank_lines)
        assert lines == content.count(b"\n") + (content[-1:] not in (b"", b"\n"))


FILES = [
    ("a.jsonl", "none", None),
    ("a.jsonl.gz", "none", None),
    ("a.txt", "line", None),
    ("a.txt", "blank", None),
    ("a.txt.zst", "blank", None),
    ("a.txt.gz", "line", None),
    ("a.txt", "none", cut_at_space),
    ("a.txt", "none", cut_anywhere),
    ("a.txt.zst", "none", cut_anywhere),
    ("a.parquet", "none", None),
]


@pytest.mark.parametrize(("name", "split_on", "cut"), FILES)
def test_reading_goes_on_where_a_piece_began(monkeypatch, name, split_on, cut):
    monkeypatch.setattr(documents, "BLOCK", 16)
    rng = random.Random(6)
    for _ in range(20):
        content = random_file(rng).replace(b"\xff", b"x")
        store(name, content)
        options = {"split_on": split_on, "cut": cut}
        found, _ = read(name, None, **options)
        for i, piece in enumerate(found):
            if isinstance(piece, Reject):
                continue
            again = [
                each._replace(line=first_line(whole(name), each.line, split_on, piece.offset))
                for each in PartReader(whole(name), start_offset=piece.offset, **options)
            ]
            if cut is None:
                assert again == found[i:]
            else:  # other pieces of the same text
                assert texts(again) == texts(found[i:])
    assert len(found) > 1


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("split_on", "expected"),
    [
        ("none", [(1, "\r\none\r\ntwo\n \t\n\nthree  \r\n\nfour")]),
        ("line", [(2, "one"), (3, "two"), (6, "three  "), (8, "four")]),
        ("blank", [(2, "one\r\ntwo"), (6, "three  "), (8, "four")]),
    ],
)
def test_documents_of_a_txt(split_on, expected, compression):
    def documents_of(content):
        store("a.txt" + compression, content)
        found, reader = read("a.txt" + compression, None, split_on=split_on)
        assert all(each.last for each in found)
        return [(each.line, each.texts[0]) for each in found], reader.lines

    content = b"\r\none\r\ntwo\n \t\n\nthree  \r\n\nfour"
    assert documents_of(content) == documents_of(BOM + content) == (expected, 8)
    assert documents_of(b"") == ([(1, "")] if split_on == "none" else [], 0)
    assert documents_of(BOM + b"\n\nend\n") == ([(1, "\n\nend\n") if split_on == "none" else (3, "end")], 3)


def test_several_keys_and_a_byte_order_mark():
    rows = [{"a": "one", "text": "x", "b": "two"}, {"b": "", "a": "é"}]
    content = BOM + b"\r\n \n".join(json.dumps(row).encode() for row in rows)
    found, reader = read("a.jsonl", content, json_keys=("b", "a"))
    assert found == [Piece(1, 0, ("two", "one"), True), Piece(3, content.rindex(b"{"), ("", "é"), True)]
    assert (reader.lines, reader.blank_lines) == (3, 1)
    assert read("a.jsonl", None, json_keys=("a", "text"))[0][1].reason.startswith('no key "text" (its keys: ')
    with pytest.raises(UserError, match=r'"a\.txt" has no JSON keys: several need \.jsonl or \.parquet'):
        PartReader(Part("a.txt", 0, 1), json_keys=("a", "b"))
    with pytest.raises(UserError, match='split_on "lines" is none of none, blank, line'):
        PartReader(Part("a.txt", 0, 1), split_on="lines")


@pytest.mark.parametrize("place", [0, 3, 6])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b'{"text": "fox"', "broken JSON (Expecting ',' delimiter)"),
        (b'["fox"]', 'not a JSON object with a key "text"'),
        (b'{"body": "fox", "\\u001b": 1}', "no key \"text\" (its keys: 'body', '\\x1b'); say which with --json-key"),
        (b'{"text": null}', 'the value of "text" is null, not a string'),
        (b'{"text": ["fox"]}', 'the value of "text" is an array, not a string'),
        (b'{"text": "a\\ud800\\u0041"}', "a lone surrogate ('\\ud800') is not text"),
        (b'{"text": "a\\uDFFF"}', "a lone surrogate ('\\udfff') is not text"),
        (b'{"text": "\xff"}', "invalid UTF-8 (invalid start byte)"),
        (b'{"text": "\xed\xa0\x80"}', "invalid UTF-8 (invalid continuation byte)"),
        (b"[" * 100_000, "broken JSON (too deep, or a number too long)"),
        (b'{"text": "fox", "n": ' + b"1" * 5000 + b"}", "broken JSON (too deep, or a number too long)"),
        (b"\0", "broken JSON (Expecting value)"),
        (b'{"text": "a\tb"}', "broken JSON (Invalid control character at)"),
        (GOOD[:-1] * 2, "broken JSON (Extra data)"),
        (BOM * 2 + GOOD[:-1], "broken JSON (Unexpected UTF-8 BOM (decode using utf-8-sig))"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_bad_line_is_said_and_reading_goes_on(place, bad, reason):
    lines = [GOOD] * 7
    lines[place] = bad + b"\r\n"
    found, reader = read("a.jsonl", b"".join(lines))
    if place == 0:
        bad = bad.removeprefix(BOM)
    assert found.pop(place) == Reject(place + 1, reason, bad)
    assert texts(found) == ["fox"] * 6
    assert reader.lines == 7


def test_pairs_of_surrogates_are_text():
    assert texts(read("a.jsonl", b'{"text": "\\ud83d\\uDE00 \\\\ud800"}')[0]) == ["😀 \\ud800"]


@pytest.mark.parametrize(
    ("split_on", "expected"),
    [
        ("none", [Reject(4, "invalid UTF-8 (invalid continuation byte)", b"caf\xe9!")]),
        ("line", ["one", "two", Reject(4, "invalid UTF-8 (invalid continuation byte)", b"caf\xe9!"), "five", "six"]),
        ("blank", ["one", Reject(4, "invalid UTF-8 (invalid continuation byte)", b"two\r\ncaf\xe9!"), "five\nsix"]),
    ],
)
def test_bad_text_has_its_line(split_on, expected):
    found, _ = read("a.txt", b"one\n\ntwo\r\ncaf\xe9!\r\n\r\nfive\nsix\n", split_on=split_on)
    assert [each if isinstance(each, Reject) else each.texts[0] for each in found] == expected


@pytest.mark.parametrize("cut", [None, cut_anywhere, cut_at_space, cut_nowhere])
@pytest.mark.parametrize("block", [4, 7, 64, 10**6])
def test_pieces_of_a_txt_are_the_text(monkeypatch, block, cut):
    monkeypatch.setattr(documents, "BLOCK", block)
    text = ("wörter und 日本語 👩‍👧 " * 30 + "\r\n") * 3 + "é" * 500 + "\n"
    content = text.encode()
    for mark in (b"", BOM):
        found, reader = read("a.txt", mark + content, cut=cut)
        assert texts(found) == [text]
        assert [(each.line, each.last) for each in found] == [(1, False)] * (len(found) - 1) + [(1, True)]
        starts = [0, *(each.offset - len(mark) for each in found[1:]), len(content)]
        assert [content[a:b].decode() for a, b in pairwise(starts)] == [each.texts[0] for each in found]
        assert reader.lines == 4
    if cut is cut_anywhere:
        assert max(len(each.texts[0]) for each in found) <= block
    elif cut is not cut_at_space or block == 10**6:
        assert len(found) == 1
    bad = content.index("é".encode() * 500) + 301  # the second byte of a character
    for content in (content[:bad], content[:bad] + b"x" + content[bad:]):  # noqa: B020
        found = read("a.txt", content, cut=cut)[0]
        assert isinstance(found[-1], Reject)
        assert not any(each.last for each in found[:-1])
        assert found[-1].line == 4


def test_a_long_text_without_a_place_to_cut_costs_no_more_than_once_over(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 100)
    seen = 0

    def cut(text):
        nonlocal seen
        seen += len(text)
        return 0

    read("a.txt", b"x" * 100_000, cut=cut)
    assert seen < 2 * 100_000


@pytest.mark.parametrize(("name", "split_on"), [("a.jsonl", "none"), ("a.txt", "line"), ("a.txt", "blank")])
def test_what_is_too_long_is_rejected(monkeypatch, name, split_on):
    monkeypatch.setattr(documents, "MAX_LINE", 1000)
    monkeypatch.setattr(documents, "REJECT_BYTES", 10)
    most = GOOD[:-3] + b"x" * (1000 - len(GOOD)) + GOOD[-3:]
    content = b"\n".join([most, b'{"text": "' + b"y" * 5000 + b'"}\n', GOOD, most.strip() + b" \n", GOOD + b"z" * 2000])
    found, reader = read(name, content, split_on=split_on)
    assert [each.line for each in found if isinstance(each, Reject)] == [3, 7, 10] if split_on != "blank" else [3, 7, 9]
    assert {(each.reason, len(each.raw)) for each in found if isinstance(each, Reject)} == {("longer than 1 GiB", 10)}
    assert [each.line for each in found if isinstance(each, Piece)] == ([1, 5, 9] if split_on != "blank" else [1, 5])
    assert reader.lines == 10
    assert read("b.txt", b"x" * 1001, split_on="none")[0][0].reason.startswith("longer than 1 GiB, without a place")


@pytest.mark.parametrize(("name", "split_on"), [("a.jsonl", "none"), ("a.txt", "line"), ("a.txt", "blank")])
def test_a_part_inside_a_long_line_owns_nothing(name, split_on):
    with open(name, "wb") as file:
        file.truncate(200_000_000)  # NULs
        file.seek(0, os.SEEK_END)
        file.write(b"\n" + GOOD)
    tracemalloc.start()
    try:
        for start, end in ((1, 2), (1000, 150_000_000), (199_999_999, 200_000_000)):
            reader = PartReader(Part(name, start, end), split_on=split_on)
            assert (list(reader), reader.lines, reader.position) == ([], 0, end - start)
        found = list(PartReader(Part(name, 199_999_999, 200_000_010), split_on=split_on))
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert [each.line for each in found] == ([] if split_on == "blank" else [1])


@pytest.mark.parametrize(("name", "split_on"), [("a.jsonl", "none"), ("a.txt", "line"), ("a.txt", "blank")])
@pytest.mark.parametrize("line", [b"words", b"some words\n"])
def test_a_part_is_not_read_far_beyond_its_end(monkeypatch, name, split_on, line):
    """Else a file of n parts, all one line, or all one paragraph, would be read n times over."""
    monkeypatch.setattr(documents, "BLOCK", 100)
    Path(name).write_bytes(line * 10**5)
    skipped = 0
    skip_line = documents._skip_line

    def counted(*arguments):
        nonlocal skipped
        found = skip_line(*arguments)
        skipped += found[0]
        return found

    monkeypatch.setattr(documents, "_skip_line", counted)
    list(PartReader(Part(name, 995, 2000), split_on=split_on))
    assert 0 < skipped < 1200


def test_a_paragraph_that_is_too_long_takes_no_memory(monkeypatch):
    monkeypatch.setattr(documents, "MAX_LINE", 1000)
    Path("a.txt").write_bytes(b"some words\n" * 10**5 + b"\nfox")
    tracemalloc.start()
    try:
        found = list(PartReader(whole("a.txt"), split_on="blank"))
        assert tracemalloc.get_traced_memory()[1] < 500_000
    finally:
        tracemalloc.stop()
    assert [each.line for each in found] == [1, 100_002]
    assert found[0].reason == "longer than 1 GiB"


def test_divisible():
    for name, split_on, expected in (
        ("a.jsonl", "none", True),
        ("a.JSONL", "blank", True),
        ("a.jsonl.gz", "none", False),
        ("a.txt", "none", False),
        ("a.txt", "line", True),
        ("a.txt", "blank", True),
        ("a.txt.zst", "line", False),
        ("a.parquet", "none", False),
    ):
        assert divisible(InputFile(name, 9), split_on) == expected

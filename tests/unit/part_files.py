"""Files of documents, in the working folder, and what a reader gives of them."""

import gzip
import os
from pathlib import Path

import pyarrow
import zstandard
from pyarrow import parquet

from megalite.data.documents import Part, PartReader

GOOD = b'{"text": "fox"}\n'
BOM = b"\xef\xbb\xbf"


def whole(path):
    return Part(path, 0, os.path.getsize(path))


def read(path, content, **options):
    """All that a reader gives of a file, and the reader, after checks of what holds for any."""
    if content is not None:
        Path(path).write_bytes(content)
    part = whole(path)
    reader = PartReader(part, **options)
    found, positions = [], [reader.position]
    for each in reader:
        found.append(each)
        positions.append(reader.position)
    assert positions == sorted(positions)
    assert positions[0] == 0
    assert reader.position == part.end
    return found, reader


def texts(found):
    """The first text of each document, its pieces joined."""
    joined, pending = [], ""
    for each in found:
        pending += each.texts[0]
        if each.last:
            joined.append(pending)
            pending = ""
    assert not pending
    return joined


def cut_anywhere(text):
    return len(text)


def cut_at_space(text):
    return max(text.rfind(" "), 0)


def cut_nowhere(text):
    return 0


def store(name, content):
    if name.endswith(".gz"):
        content = gzip.compress(content)
    elif name.endswith(".zst"):
        content = zstandard.compress(content)
    if name.endswith(".parquet"):
        column = [None if b"broken" in line else line.decode("utf-8", "replace") for line in content.split(b"\n")]
        parquet.write_table(pyarrow.table({"text": column}), name, row_group_size=3)
    else:
        Path(name).write_bytes(content)

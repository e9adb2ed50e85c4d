"""Token files written by hand, byte for byte as each program writes them, without the code under test.

A document is a list of sequences, a sequence a list of ids.
"""

import hashlib
import json
import os
import random
import struct
from pathlib import Path

PAIR = ["x.bin", "x.idx", "x.manifest.json"]
CODES = {"B": 1, "b": 2, "h": 3, "i": 4, "q": 5, "d": 6, "f": 7, "H": 8}
NAMES = {"B": "uint8", "b": "int8", "h": "int16", "i": "int32", "q": "int64", "H": "uint16"}
NEOX_CODES = CODES | {"f": 6, "d": 7}


def idx(sizes, doc_idx, letter="H", *, codes=CODES, modes=None, itemsize=None):
    """What _IndexWriter of Megatron-LM, and Index.writer of the other two, write."""
    itemsize = itemsize or struct.calcsize(letter)
    pointers = [sum(sizes[:i]) * itemsize for i in range(len(sizes))]
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<Q", 1)
        + struct.pack("<B", codes[letter])
        + struct.pack("<QQ", len(sizes), len(doc_idx))
        + struct.pack(f"<{len(sizes)}i", *sizes)
        + struct.pack(f"<{len(sizes)}q", *pointers)
        + struct.pack(f"<{len(doc_idx)}q", *doc_idx)
        + (b"" if modes is None else struct.pack(f"<{len(modes)}b", *modes))
    )


def ids(documents, letter="H"):
    tokens = [token for document in documents for sequence in document for token in sequence]
    return struct.pack(f"<{len(tokens)}{letter}", *tokens)


def bounds(documents):
    doc_idx = [0]
    for document in documents:
        doc_idx.append(doc_idx[-1] + len(document))
    return doc_idx


def sizes(documents):
    return [len(sequence) for document in documents for sequence in document]


def write(prefix, idx_bytes, bin_bytes):
    Path(f"{prefix}.idx").write_bytes(idx_bytes)
    Path(f"{prefix}.bin").write_bytes(bin_bytes)


def megatron(prefix, documents, letter="H", modes=None):
    """Megatron-LM: IndexedDatasetBuilder.add_document; a mode for each sequence in multimodal data."""
    write(prefix, idx(sizes(documents), bounds(documents), letter, modes=modes), ids(documents, letter))


def neox(prefix, documents, letter="H"):
    """gpt-neox: add_item and end_document; its table of dtypes has the floats the other way round."""
    write(prefix, idx(sizes(documents), bounds(documents), letter, codes=NEOX_CODES), ids(documents, letter))


def neox_merged(prefix, documents, letter="H"):
    """gpt-neox's tools/datasets/merge_datasets.py: merge_file_ takes the sizes over, but no document bounds."""
    write(prefix, idx(sizes(documents), [0], letter), ids(documents, letter))


def deepspeed(prefix, documents, letter="H", eod=None):
    """Megatron-DeepSpeed: add_doc(doc_ids, sentence_lens); --append-eod adds to the ids, not to the lengths."""
    ended = [[*document, [] if eod is None or not document else [eod]] for document in documents]
    write(prefix, idx(sizes(documents), bounds(documents), letter), ids(ended, letter))


def ours(prefix, documents, letter="H", /, **facts):
    """MegaLite: Megatron's files, and a manifest."""
    megatron(prefix, documents, letter)
    manifest = {
        "tokenizer_sha256": "a" * 64,
        "vocab_size": 60,
        "eod_id": 0,
        "append_eod": True,
        "dtype": NAMES[letter],
        "documents": len(documents),
        "tokens": sum(sizes(documents)),
        "text_bytes": 3 * sum(sizes(documents)),
        "bin_sha256": sha256(f"{prefix}.bin"),
        "idx_sha256": sha256(f"{prefix}.idx"),
    } | facts
    manifest = {key: value for key, value in manifest.items() if value is not None}
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))


def files_in(folder):
    return sorted(os.listdir(folder)) if os.path.isdir(folder) else []


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def random_documents(seed, count=30, *, highest=59, several=True, empty=True):
    """Documents of several sequences and of none, sequences of no token, some of them ending in 0."""
    rng = random.Random(seed)
    documents = []
    for _ in range(count):
        parts = rng.choice([0, 1, 1, 2, 5]) if several else 1
        document = [
            [rng.randrange(highest + 1) for _ in range(rng.choice([0, 1, 2, 9] if empty else [1, 4, 9]))]
            for _ in range(parts)
        ]
        if document and document[-1] and rng.random() < 0.7:
            document[-1][-1] = 0
        documents.append(document)
    return documents

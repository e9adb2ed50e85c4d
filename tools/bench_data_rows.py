"""What tools/bench_data.py measures, each in a process of its own: python bench_data_rows.py NAME JSON.

JSON holds the arguments. What a program measured itself is the last line of its output, as JSON.
"""

import dataclasses
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from megalite.data.indexed import CODES, HEADER, MAGIC, VERSION, IndexedDataset, token_dtype, write_index
from megalite.data.permutation import KeyedPermutation
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError, run_main

SEQUENCE = 2048  # tokens of a sample
BATCH = 8  # samples of a batch
COLD_SAMPLES = 1000  # after more of them, what the disk reads ahead has brought in much of a small file
CHUNK = 2**20  # documents written at once


# ------------------------------------------------------------------------------------------------------------- building


def encode_batch_fast(input: str, tokenizer_dir: str, prefix: str) -> dict:
    """Row (a): the library's own batches of 100 documents, in its threads, and nothing else: no check, no restart."""
    tokenizer = Tokenizer(tokenizer_dir)
    dtype = token_dtype(tokenizer.vocab_size)
    lengths = []
    with open(input, "rb") as lines, open(f"{prefix}.bin", "wb") as out:
        while texts := [json.loads(line)["text"] for line in islice(lines, 100)]:
            for ids in tokenizer.encode_batch(texts):
                if ids:
                    out.write(np.array([*ids, tokenizer.eod_id], dtype=dtype).tobytes())
                    lengths.append(len(ids) + 1)
    write_index(f"{prefix}.idx", lengths, dtype)
    return {}


# -------------------------------------------------------------------------------------------------------------- reading


def repeat_pair(source: str, prefix: str, size: int) -> dict:
    """Write a pair of about `size` bytes that holds another's documents again and again."""
    data = IndexedDataset(source)
    times = max(1, round(size / data.bin_path.stat().st_size))
    content = data.bin_path.read_bytes()
    with open(f"{prefix}.bin", "wb") as out:
        for _ in range(times):
            out.write(content)
        out.flush()
        os.fsync(out.fileno())  # only pages that are on the disk can be dropped from memory
    write_index(f"{prefix}.idx", np.tile(data.sequence_lengths, times), data.dtype)
    return {"tokens": data.num_tokens * times, "documents": data.num_documents * times}


def read_windows(prefix: str, vocab_size: int, batch: int, documents: bool, seconds: float) -> dict:
    """Windows in the order of training: as arrays (batch 0), or in batches of tensors."""
    from megalite.data.dataset import WindowDataset  # imports torch

    drop_from_memory(f"{prefix}.bin")
    dataset = WindowDataset([prefix], SEQUENCE, vocab_size, reset_positions=documents, mask_documents=documents)
    order = KeyedPermutation(len(dataset), seed=1, epoch=0)

    def read(k: int) -> Any:
        return dataset.batch([order(j) for j in range(k, k + batch)]) if batch else dataset[order(k)]

    return time_reads(read, len(dataset), batch or 1, seconds, f"{prefix}.bin")


def read_samples(
    megatron: str, prefix: str, vocab_size: int, eod_id: int, batch: int, documents: bool, seconds: float
) -> dict:
    """Samples of Megatron's GPTDataset in its order: one by one (batch 0), or in batches as a DataLoader makes them."""
    make = gpt_dataset(megatron, prefix, vocab_size, eod_id, documents)
    from torch.utils.data import default_collate

    make()  # writes its index
    drop_from_memory(f"{prefix}.bin")
    dataset = make()

    def read(k: int) -> Any:
        return default_collate([dataset[j] for j in range(k, k + batch)]) if batch else dataset[k]

    return time_reads(read, len(dataset), batch or 1, seconds, f"{prefix}.bin")


def time_reads(read: Callable[[int], Any], samples: int, step: int, seconds: float, path: str) -> dict:
    """Microseconds a sample: cold, the first COLD_SAMPLES; then warm, all of `path` in memory, for `seconds` of CPU."""
    last = samples - step
    if last < 0:
        raise UserError(f"{path} has {samples} samples of {SEQUENCE} tokens: {step} are needed; give more --input")
    cold = range(0, min(last + 1, COLD_SAMPLES), step)
    wall, cpu = time.perf_counter(), time.process_time()
    for k in cold:
        read(k)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    result = {"cold_us": wall / len(cold) / step * 1e6, "cold_cpu_us": cpu / len(cold) / step * 1e6}
    read_through(path)
    done, k, start = 0, len(cold) * step, time.process_time()  # an epoch is longer than this takes, unless it is small
    while (cpu := time.process_time() - start) < seconds:
        for _ in range(0, 64, step):
            k = k if k <= last else 0
            read(k)
            k += step
            done += step
    return result | {"warm_cpu_us": cpu / done * 1e6, "samples": done}


def gpt_dataset(megatron: str, prefix: str, vocab_size: int, eod_id: int, documents: bool) -> Callable[[], Any]:
    """A function that opens a pair as training does; its index is written beside the pair, or taken from there.

    documents: positions by document, and what keeps attention inside documents; a version without
    inter_document_masking has the positions alone, but for a mask of [s, s] numbers, which is not asked for.
    """
    sys.path.insert(0, megatron)
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    class Vocabulary:
        """The part of a tokenizer that GPTDataset looks at."""

        def __init__(self) -> None:
            self.vocab_size, self.eod, self.pad = vocab_size, eod_id, -1
            self.unique_identifiers = {"class": "Vocabulary"}

    by_document = {"reset_position_ids": documents, "reset_attention_mask": documents}
    if "inter_document_masking" in {field.name for field in dataclasses.fields(GPTDatasetConfig)}:
        by_document = {"reset_position_ids": False, "reset_attention_mask": False, "inter_document_masking": documents}
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=([prefix], None),
        split="1,0,0",
        tokenizer=Vocabulary(),
        path_to_cache=f"{prefix}.cache",
        create_attention_mask=False,
        eod_mask_loss=False,
        **by_document,
    )

    def make() -> GPTDataset:
        low = GPTDataset.build_low_level_dataset(prefix, config)
        indices = np.arange(GPTDataset.numel_low_level_dataset(low), dtype=np.int32)
        return GPTDataset(low, prefix, indices, None, Split.train, config)

    return make


# ------------------------------------------------------------------------------------------------------------- starting


def make_pair(prefix: str, documents: int) -> dict:
    """Write the index of many documents of 100 to 1,899 tokens, and a .bin of that size that takes no disk space."""
    rng, dtype = np.random.default_rng(1), np.dtype("<u2")
    lengths = rng.integers(100, 1900, documents, dtype=np.int32)
    with open(f"{prefix}.idx", "wb") as out:
        out.write(HEADER.pack(MAGIC, VERSION, CODES[dtype], documents, documents + 1))
        out.write(lengths.astype("<i4").data)
        end = 0
        for first in range(0, documents, CHUNK):
            ends = end + np.cumsum(lengths[first : first + CHUNK], dtype=np.int64) * dtype.itemsize
            out.write(np.r_[end, ends[:-1]].astype("<i8").data)
            end = int(ends[-1])
        for first in range(0, documents + 1, CHUNK):
            out.write(np.arange(first, min(first + CHUNK, documents + 1), dtype="<i8").data)
        out.flush()
        os.fsync(out.fileno())
    with open(f"{prefix}.bin", "wb") as out:
        out.truncate(end)
    facts = {"dtype": dtype.name, "documents": documents, "tokens": end // dtype.itemsize}
    # A builder's manifest has the hash, so that nobody reads the whole index for it at the start.
    hashes = {"idx_sha256": "0" * 64, "bin_sha256": "0" * 64}
    Path(f"{prefix}.manifest.json").write_text(json.dumps(facts | hashes))
    return facts


def start_windows(prefix: str, cold: bool) -> dict:
    """Open a pair as training does: check it, know its fingerprint, draw a batch with positions by document."""
    from megalite.data.dataset import WindowDataset  # imports torch

    def open_pair() -> WindowDataset:
        dataset = WindowDataset([prefix], SEQUENCE, 65000, reset_positions=True, mask_documents=True)
        assert dataset.fingerprint
        return dataset

    def draw(dataset: WindowDataset) -> None:
        order = KeyedPermutation(len(dataset), seed=1, epoch=0)
        dataset.batch([order(k) for k in range(BATCH)])

    return time_start(open_pair, draw, [f"{prefix}.idx"], cold)


def start_samples(megatron: str, prefix: str, cold: bool, first: bool) -> dict:
    """The same of Megatron's GPTDataset, which makes its index at the `first` start."""
    make = gpt_dataset(megatron, prefix, 65000, 0, documents=True)
    from torch.utils.data import default_collate

    if first:
        shutil.rmtree(f"{prefix}.cache", ignore_errors=True)
    files = [f"{prefix}.idx", *map(str, Path(f"{prefix}.cache").glob("*.npy"))]
    return time_start(make, lambda data: default_collate([data[k] for k in range(BATCH)]), files, cold)


def time_start(make: Callable[[], Any], draw: Callable[[Any], Any], files: list[str], cold: bool) -> dict:
    """Seconds to open and to draw the first batch, imports left out; MiB of memory that is no file's."""
    for path in files:
        drop_from_memory(path) if cold else read_through(path)
    before, cpu, start = own_memory(), time.process_time(), time.perf_counter()
    dataset = make()
    opened = time.perf_counter() - start
    draw(dataset)
    drawn = time.perf_counter() - start - opened
    cpu = time.process_time() - cpu
    return {"open_s": opened, "first_batch_s": drawn, "cpu_s": cpu, "own_mib": own_memory() - before}


# -------------------------------------------------------------------------------------------------------------- helpers


def drop_from_memory(path: str) -> None:
    """Ask the system to forget what it holds of a file, so that it is read from the disk (or its host's memory)."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: str) -> None:
    with open(path, "rb") as file:
        while file.read(2**24):
            pass


def own_memory() -> float:
    """MiB of this process that are not pages of files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


PROGRAMS = (encode_batch_fast, repeat_pair, read_windows, read_samples, make_pair, start_windows, start_samples)


def main() -> None:
    [program] = [each for each in PROGRAMS if each.__name__ == sys.argv[1]]
    print(json.dumps(program(**json.loads(sys.argv[2]))))


if __name__ == "__main__":
    run_main(main)

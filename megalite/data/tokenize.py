"""Text to token files: documents -> PREFIX.bin, PREFIX.idx and PREFIX.manifest.json.

The calling process reads the inputs in order and hands out batches of raw documents; workers parse and encode them; the
caller writes the results in the same order. So the output does not depend on the number of workers.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from megalite.data.documents import SPLIT_ON, InputFile, RawDocument, expand_inputs, name_files, parse_document
from megalite.data.indexed import IndexedDataset, PairWriter, pair_paths, token_dtype
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

MANIFEST_VERSION = 1
BATCH_BYTES = 1_000_000  # of raw input; large enough that sending it costs nothing, small enough to spread evenly
IN_FLIGHT = 4  # batches per worker that are read ahead
REPORT_SECONDS = 5.0


# ------------------------------------------------------------------------------------------------------------- encoding


class Encoded(NamedTuple):
    """One batch of n documents, encoded."""

    tokens: bytes  # of all documents, in order, of the output's dtype
    lengths: np.ndarray  # int64 [n], tokens with EOD; 0: an empty document
    text_bytes: np.ndarray  # int64 [n], UTF-8
    raw_bytes: int


class Encoder:
    """Parses and encodes batches of raw documents."""

    def __init__(self, tokenizer_dir: str, json_key: str, append_eod: bool) -> None:
        self.tokenizer = Tokenizer(tokenizer_dir)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.json_key = json_key
        self.end = [self.tokenizer.eod_id] if append_eod else []

    def __call__(self, batch: list[RawDocument]) -> Encoded:
        texts = [parse_document(*document, self.json_key) for document in batch]
        ids = [each + self.end if each else [] for each in self.tokenizer.encode_batch(texts)]
        return Encoded(
            b"".join(np.array(each, dtype=self.dtype).tobytes() for each in ids),
            np.array([len(each) for each in ids], dtype=np.int64),
            np.array([len(text.encode()) for text in texts], dtype=np.int64),
            sum(len(document.raw) for document in batch),
        )


def _start_worker(*arguments: Any) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(*arguments)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()  # a killed parent leaves its workers waiting for work for ever
    os._exit(1)


def _encode(batch: list[RawDocument]) -> Encoded:
    return _encoder(batch)


def _submit(pool: ProcessPoolExecutor, batch: list[RawDocument]) -> Future[Encoded]:
    """Hand a batch to the pool, which may start a worker for it.

    Ctrl-C reaches the whole group, and the parent alone answers it: a worker inherits that SIGINT is blocked, and so is
    deaf to it even while it still starts.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, batch)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _batches(inputs: list[InputFile], split_on: str) -> Iterator[list[RawDocument]]:
    batch, size = [], 0
    for source in inputs:
        for document in source.documents(split_on):
            batch.append(document)
            size += len(document.raw)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _encode_in_order(
    batches: Iterable[list[RawDocument]], workers: int, arguments: tuple[str, str, bool]
) -> Iterator[Encoded]:
    """Encode with several processes, bounded batches ahead; the results come in the order of `batches`."""
    if workers == 1:
        yield from map(Encoder(*arguments), batches)
        return
    # spawn: the tokenizer's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=arguments)
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(_submit(pool, batch))
            if len(pending) >= workers * IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process died (out of memory? a document takes up to 140 times its size): try fewer --workers, "
            "or --split-on for a large .txt"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


# --------------------------------------------------------------------------------------------------------------- output


@dataclass(frozen=True)
class BuildSummary:
    """One pair of files that `build_indexed` made, or found up to date."""

    prefix: str
    documents: int
    tokens: int
    text_bytes: int  # UTF-8, of the documents
    empty_documents: int  # skipped, over all of the input
    blank_lines: int  # of .jsonl, skipped, over all of the input
    up_to_date: bool


class Split:
    """Puts a document into the first part (0) or the second (1) by its number and a seed, as in "98,2".

    With f the second part's share, numbers fall into strata of 1/f documents and one of each, chosen by a hash, goes to
    the second part: the shares hold to within one document, and no period in the data can line up with the choice.
    """

    def __init__(self, text: str, seed: int) -> None:
        self.text, self.seed = text, seed
        try:
            first, second = (Fraction(part.strip()) for part in text.split(","))
        except (ValueError, ZeroDivisionError):
            first = second = Fraction(0)
        if first <= 0 or second <= 0:
            raise UserError(f'split "{text}" is not two positive numbers, such as 98,2')
        self.share = second / (first + second)

    def __call__(self, number: int) -> int:
        stratum = int(number * self.share)
        start, end = (-(-k * self.share.denominator // self.share.numerator) for k in (stratum, stratum + 1))
        key = hashlib.blake2b(f"{self.seed} {stratum}".encode(), digest_size=8).digest()
        return int(number == start + int.from_bytes(key, "little") % (end - start))


class _Progress:
    """A bar on a terminal, otherwise a plain line every few seconds; on stderr."""

    def __init__(self, total_bytes: int, show: bool) -> None:
        self.total, self.done, self.documents, self.tokens = total_bytes, 0, 0, 0
        self.start = self.reported = time.monotonic()
        self.show = show
        terminal = show and sys.stderr.isatty()
        self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing") if terminal else None

    def add(self, encoded: Encoded) -> None:
        self.done += encoded.raw_bytes
        self.documents += len(encoded.lengths)
        self.tokens += int(encoded.lengths.sum())
        now = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix(documents=self.documents, tokens=self.tokens, refresh=False)
            self.bar.update(encoded.raw_bytes)
        elif self.show and now - self.reported >= REPORT_SECONDS:
            self.reported = now
            print(
                f"tokenizing: {self.done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB, {self.documents:,} documents, "
                f"{self.tokens:,} tokens, {self.done / 1e6 / (now - self.start):.1f} MB/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def build_indexed(
    inputs: Sequence[str],
    tokenizer_dir: str | Path,
    output_prefix: str | Path,
    *,
    json_key: str = "text",
    split_on: str = "none",
    workers: int = 2,
    split: str | None = None,
    append_eod: bool = True,
    seed: int = 1234,
    overwrite: bool = False,
    progress: bool = True,
) -> list[BuildSummary]:
    """Tokenize .txt and .jsonl (paths or globs) into PREFIX.bin/.idx; with `split`, PREFIX-train and PREFIX-validation.

    The output's bytes follow from the inputs, the tokenizer and the options alone, not from `workers` (1: this process,
    with the tokenizer's own threads). Each document ends with EOD if `append_eod`; empty ones are skipped and counted.
    What is there and was made of the same is left alone ("up to date"); anything else is refused unless `overwrite`.
    Final names appear only when all is written; after a failure what was there before is still there.

    Raises `UserError` for anything wrong with the inputs (file:line), the options or the disk, and for a dead worker.
    """
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}")
    if split_on not in SPLIT_ON:
        raise UserError(f'split_on "{split_on}" is none of {", ".join(SPLIT_ON)}')
    if str(output_prefix).endswith(("/", os.sep)) or not str(output_prefix):
        raise UserError(f'output prefix "{output_prefix}" has no file name: give FOLDER/NAME')
    chooser = None if split is None else Split(split, seed)
    sources = [InputFile(path) for path in expand_inputs(inputs)]
    tokenizer = Tokenizer(tokenizer_dir)
    prefixes = [f"{output_prefix}{part}" for part in (("",) if chooser is None else ("-train", "-validation"))]
    facts = [
        {
            "version": MANIFEST_VERSION,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "append_eod": append_eod,
            "options": {"json_key": json_key, "split_on": split_on, "split": split, "part": part, "seed": seed},
        }
        for part in range(len(prefixes))
    ]
    existing = [path for each in prefixes for path in pair_paths(each) if path.exists()]
    if existing and not overwrite:
        done = _up_to_date(prefixes, facts, sources)
        if done is None:
            raise UserError(f"{existing[0]} exists, not of these inputs and options: pass --overwrite, or remove it")
        return done

    pairs: list[PairWriter] = []
    try:
        Path(output_prefix).parent.mkdir(parents=True, exist_ok=True)
        for prefix in prefixes:
            pairs.append(PairWriter(prefix, token_dtype(tokenizer.vocab_size)))
        report = _Progress(sum(os.path.getsize(source.path) for source in sources), progress)
        number = empty = 0
        arguments = (str(tokenizer_dir), json_key, append_eod)
        for encoded in _encode_in_order(_batches(sources, split_on), workers, arguments):
            _distribute(encoded, pairs, chooser, number)
            number += len(encoded.lengths)
            empty += int((encoded.lengths == 0).sum())
            report.add(encoded)
        report.close()
        _refuse_empty(pairs, split, sources, number)
        blank = sum(source.blank_lines for source in sources)
        counts = {"inputs": [source.record() for source in sources], "empty_documents": empty, "blank_lines": blank}
        for pair, fact in zip(pairs, facts, strict=True):
            pair.finish(fact | counts)
        for pair in pairs:
            pair.commit()
    except OSError as error:
        raise UserError(f"cannot write {output_prefix}: {error.strerror}") from error
    finally:
        for pair in pairs:
            pair.abort()
    return [BuildSummary(p.prefix, p.documents, p.tokens, p.text_bytes, empty, blank, up_to_date=False) for p in pairs]


def _distribute(encoded: Encoded, pairs: list[PairWriter], chooser: Split | None, first: int) -> None:
    """Write a batch, whose first document has the number `first`, to the pairs that its documents belong to."""
    if chooser is None:
        pairs[0].write(encoded.tokens, encoded.lengths, encoded.text_bytes)
        return
    tokens = np.frombuffer(encoded.tokens, dtype=pairs[0].dtype)
    part = np.array([chooser(first + i) for i in range(len(encoded.lengths))])
    for k, pair in enumerate(pairs):
        mine = part == k
        chosen = tokens[np.repeat(mine, encoded.lengths)]
        pair.write(chosen.tobytes(), encoded.lengths[mine], encoded.text_bytes[mine])


def _refuse_empty(pairs: list[PairWriter], split: str | None, sources: list[InputFile], num_documents: int) -> None:
    if not any(pair.documents for pair in pairs):
        raise UserError(f"no text in {name_files([source.path for source in sources])}: there is nothing to tokenize")
    for pair in pairs:
        if not pair.documents:
            raise UserError(
                f'split "{split}" leaves {pair.prefix} without a document, of {num_documents}: give it a larger share, '
                "or give more documents (a .txt is one, unless --split-on blank or line)"
            )


def _up_to_date(prefixes: list[str], facts: list[dict], sources: list[InputFile]) -> list[BuildSummary] | None:
    """What is there, if all of it was made of the same inputs, tokenizer and options; else None."""
    found = []
    records: list[dict] = []
    for prefix, fact in zip(prefixes, facts, strict=True):
        if not all(path.is_file() for path in pair_paths(prefix)):
            return None
        manifest = IndexedDataset(prefix).manifest or {}
        if any(manifest.get(key) != value for key, value in fact.items()):
            return None
        records = records or [source.hashed() for source in sources]
        if manifest.get("inputs") != records:
            return None
        counts = [manifest.get(key) for key in ("documents", "tokens", "text_bytes", "empty_documents", "blank_lines")]
        if not all(isinstance(count, int) for count in counts):
            return None
        found.append(BuildSummary(prefix, *counts, up_to_date=True))
    return found

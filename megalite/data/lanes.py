"""Endless streams of tokens out of text files, which can be gone on with from any place. s: block_size.

The files are cut into segments, and the segments of each epoch, in an order of its own, dealt out to lanes. A lane is a
stream of documents, each with EOD behind it, and what comes next in it is a function of a position in it.
"""

import codecs
import contextlib
import multiprocessing
import queue
import threading
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from megalite.data.children import begin_child, deaf_to_interrupts
from megalite.data.documents import BOM, Part, PartReader, Reject, divisible, first_line
from megalite.data.encoders import open_encoder, pieces
from megalite.data.indexed import token_dtype
from megalite.data.inputs import InputFile, name_files
from megalite.data.permutation import KeyedPermutation
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

SEGMENTS = 4096  # about; 17 for each of 240 lanes, so that all read about as much
SEGMENT_BYTES = (2**10, 2**22)  # at least and at most
PIECE = 4096  # characters that are encoded at once, where text can be cut: at most about these are encoded twice
BATCH_PIECES = 1000
BORDER = 2**12  # bytes in which a place to cut is looked for first
READ = 2**16  # bytes of a .txt that are read at once, where it can be cut
CONTINUATION = bytes(range(0x80, 0xC0))  # UTF-8: what is no character's first byte


class Position(NamedTuple):
    """A token of a lane."""

    segment: int
    """Counted over the epochs: in epoch e, those from e * segments on."""
    offset: int = -1
    """Byte of the file where the document, or the piece of a .txt, begins that the token is in; -1: not read yet."""
    characters: int = 0
    """Characters of the document before the piece that the token is in."""
    tokens: int = 0
    """Tokens of the piece before it."""


class Chunk(NamedTuple):
    """Some text that is encoded by itself, at its position (tokens: 0)."""

    position: Position
    text: str
    opens: bool
    """Whether a document begins with it."""
    ends: bool
    """Whether a document ends with it."""


Block = tuple[np.ndarray, Position]


@dataclass(frozen=True)
class Corpus:
    """What is read, and how. cuttable: whether the tokenizer's encoders can cut text into pieces."""

    files: tuple[InputFile, ...]
    tokenizer_dir: str
    encoder: str
    json_key: str
    split_on: str
    cuttable: bool
    block_size: int
    seed: int

    @cached_property
    def unit(self) -> int:
        """Bytes of a segment."""
        low, high = SEGMENT_BYTES
        return min(max(sum(file.size for file in self.files) // SEGMENTS, low), high)

    @cached_property
    def ends(self) -> list[int]:
        """ends[k]: segments in files 0..k. A text that can't be cut is one."""
        counts = (-(-file.size // self.unit) if self._is_cut(file) else min(file.size, 1) for file in self.files)
        return list(accumulate(counts))

    def _is_cut(self, file: InputFile) -> bool:
        return self.cuttable or divisible(file, self.split_on)

    def segment(self, number: int) -> tuple[InputFile, int, int]:
        """(file, first byte, end) of segment `number`, as `Position.segment` counts them."""
        epoch, place = divmod(number, self.ends[-1])
        place = KeyedPermutation(self.ends[-1], self.seed, epoch)(place)
        k = bisect_right(self.ends, place)
        file = self.files[k]
        if not self._is_cut(file):
            return file, 0, file.size
        start = (place - (self.ends[k - 1] if k else 0)) * self.unit
        return file, start, min(start + self.unit, file.size)


class BlockReader:
    """Reads windows of the lanes: a pure function of where one is.

    Segment after segment, a lane takes every `lanes`-th. Documents follow each other, each with EOD behind it; those
    without a token are left out.
    """

    def __init__(self, corpus: Corpus, lanes: int) -> None:
        self.corpus, self.lanes = corpus, lanes
        tokenizer = Tokenizer(corpus.tokenizer_dir)
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.end = np.array([tokenizer.eod_id], dtype=self.dtype).tobytes()
        self.encoder = open_encoder(tokenizer, corpus.encoder, self.dtype)
        self._has_tokens = False

    def next_block(self, position: Position, windows: int) -> Block:
        """(tokens [windows * s + 1] of the token's dtype, the position of the last of them).

        Window i is tokens [i * s, (i + 1) * s]: it shares one token with the next, as the block does.

        Raises `UserError` for a document that can't be read, and where there is no token in the corpus.
        """
        needed = windows * self.corpus.block_size + 1
        size = self.dtype.itemsize
        chunks = self._lane(position)
        read: list[tuple[Position, bytes]] = []
        have = -position.tokens
        while have < needed:
            batch: list[Chunk] = []
            room = 3 * (needed - have)  # characters; most tokens are longer, so little is encoded in vain
            while room > 0 and len(batch) < BATCH_PIECES:
                batch.append(next(chunks))
                room -= len(batch[-1].text) + 1
            encoded = self._encode(batch)
            if not any(encoded):
                self._check_tokens()
            read += zip((chunk.position for chunk in batch), encoded, strict=True)
            have += sum(map(len, encoded)) // size
        tokens = np.frombuffer(b"".join(each for _, each in read), self.dtype)[position.tokens :][:needed]
        left = position.tokens + needed - 1  # tokens from the first one read to the last of the block
        for at, each in read:
            if left < len(each) // size:
                return tokens, at._replace(tokens=left)
            left -= len(each) // size
        raise AssertionError("the last token was not read")

    def _encode(self, chunks: Sequence[Chunk]) -> list[bytes]:
        encoded = self.encoder.encode([chunk.text for chunk in chunks])
        return [
            tokens + self.end if chunk.ends and (tokens or not chunk.opens) else tokens
            for chunk, tokens in zip(chunks, encoded, strict=True)
        ]

    def _check_tokens(self) -> None:
        """Find a token anywhere, or a lane would search for ever."""
        segments = self.corpus.ends[-1]
        if not self._has_tokens and not any(
            any(self._encode([chunk])) for n in range(segments) for chunk in self._segment(Position(n))
        ):
            names = name_files([file.path for file in self.corpus.files])
            raise UserError(f"no text in {names}: there is nothing to train on")
        self._has_tokens = True

    def _lane(self, position: Position) -> Iterator[Chunk]:
        """What a lane reads from a position on, without end; of each segment at least one chunk, maybe without text."""
        while True:
            yield Chunk(position, "", True, False)
            yield from self._segment(position)
            position = Position(position.segment + self.lanes)

    def _segment(self, position: Position) -> Iterator[Chunk]:
        file, start, end = self.corpus.segment(position.segment)
        if file.format == "txt" and self.corpus.split_on == "none":
            return self._read_whole(position, file, start, end)
        return self._read_documents(position, Part(file.path, start, end))

    def _read_documents(self, position: Position, part: Part) -> Iterator[Chunk]:
        start_offset = None if position.offset < 0 else position.offset
        split_on = self.corpus.split_on
        for piece in PartReader(part, json_keys=(self.corpus.json_key,), split_on=split_on, start_offset=start_offset):
            if isinstance(piece, Reject):
                raise _bad(part.path, first_line(part, piece.line, split_on, start_offset), piece.reason)
            begin = position.characters if piece.offset == start_offset else 0
            text = piece.texts[0]
            for each in pieces(text[begin:], PIECE, self.encoder.cut):
                at = Position(position.segment, piece.offset, begin)
                begin += len(each)
                yield Chunk(at, each, at.characters == 0, begin == len(text))

    # A .txt that is one document is read in ranges that begin and end where it may be cut.

    def _border(self, file: InputFile, byte: int) -> int | None:
        """Where the range that `byte` begins really begins: at a place to cut; None if there is none in its unit.

        It follows from the file and `byte` alone, so that the ranges on both sides agree.
        """
        if byte == 0 or byte >= file.size:
            return min(byte, file.size)
        for size in (min(BORDER, self.corpus.unit), self.corpus.unit):
            raw = read_bytes(file.path, byte, size)
            skipped = len(raw) - len(raw.lstrip(CONTINUATION))
            text = _valid_text(raw[skipped:])
            if place := self.encoder.cut(text):
                return byte + skipped + _utf8_size(text[:place])
        return None

    def _read_whole(self, position: Position, file: InputFile, start: int, end: int) -> Iterator[Chunk]:
        begin = position.offset if position.offset >= 0 else self._border(file, start)
        if begin is None:
            return  # it is read with the range before it
        while (border := self._border(file, end)) is None:
            end += self.corpus.unit
        end = border
        if begin == 0 and read_bytes(file.path, 0, len(BOM)) == BOM:
            begin = len(BOM)
        decoder, text, here = codecs.getincrementaldecoder("utf-8")(), "", begin
        size = READ if self.encoder.cut is not None else end
        while True:
            raw = read_bytes(file.path, here, min(size, end - here))
            here += len(raw)
            ended = here >= end or not raw
            try:
                text += decoder.decode(raw, final=ended)
            except UnicodeDecodeError as error:
                byte = here - len(error.object) + error.start
                line = first_line(Part(file.path, 0, file.size), 1, "none", byte)
                raise _bad(file.path, line, f"invalid UTF-8 ({error.reason})") from error
            *cut, text = pieces(text, PIECE, self.encoder.cut)
            for each in cut:
                yield Chunk(Position(position.segment, begin), each, begin <= len(BOM), False)
                begin += _utf8_size(each)
            if ended:
                yield Chunk(Position(position.segment, begin), text, begin <= len(BOM), end >= file.size)
                return
            if not cut:
                size *= 2  # or a long text without a place would be searched again and again


def read_bytes(path: str, start: int, size: int) -> bytes:
    """Up to `size` bytes of a file. Raises `UserError` where it can't be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            return file.read(size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _valid_text(raw: bytes) -> str:
    """What comes before the first byte that is no UTF-8, which may be in a character that breaks off."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return raw[: error.start].decode("utf-8")


def _utf8_size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _bad(path: str, line: int, reason: str) -> UserError:
    return UserError(
        f"{path}:{line}: {reason}; mend it, or leave such documents out with tools/preprocess_data.py --on-error skip"
    )


# ------------------------------------------------------------------------------------------------------------ processes


class Worker:
    """A process that reads blocks, in the order in which they are asked for.

    A `ProcessPoolExecutor` waits for ever where a process is killed while it sends a block: this process holds the
    sending end, too, of the pipe that all of a pool's processes share.
    """

    def __init__(self, corpus: Corpus, lanes: int) -> None:
        # spawn: neither CUDA nor the tokenizer's threads survive a fork.
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, corpus, lanes), daemon=True)
        with deaf_to_interrupts():
            self._process.start()
        there.close()
        self._asked: queue.SimpleQueue[Future[Block] | None] = queue.SimpleQueue()
        # What the worker sends must be taken at once, or it could not go on with the next block.
        self._thread = threading.Thread(target=self._receive, name="receive blocks", daemon=True)
        self._thread.start()

    def submit(self, position: Position, windows: int) -> Callable[[], Block]:
        """Have `BlockReader.next_block` done; returns what waits for the result, and raises what it raised.

        Raises `UserError` there where the process has died.
        """
        future: Future[Block] = Future()
        self._asked.put(future)
        with contextlib.suppress(OSError):  # it is dead, as the other thread finds out
            self._connection.send((position, windows))
        return future.result

    def _receive(self) -> None:
        while (future := self._asked.get()) is not None:
            try:
                block, error = self._connection.recv()
            except (EOFError, OSError):
                error = UserError(
                    "a process that tokenizes died, perhaps for want of memory: start the run again to go on, with "
                    "fewer data.num_workers or a smaller data.shuffle_buffer"
                )
            if error is None:
                future.set_result(block)
            else:
                future.set_exception(error)

    def close(self) -> None:
        """End the process at once, whatever it is at."""
        self._process.kill()
        self._process.join()
        self._asked.put(None)
        self._thread.join()
        self._connection.close()


def _serve(connection: Connection, corpus: Corpus, lanes: int) -> None:
    begin_child()

    @cache
    def open_reader() -> BlockReader:
        return BlockReader(corpus, lanes)

    def answer(position: Position, windows: int) -> tuple[Block | None, Exception | None]:
        try:
            return open_reader().next_block(position, windows), None
        except UserError as error:
            return None, error
        except Exception:  # its trace is here, and it may not be one that can be sent
            return None, RuntimeError(f"in a process that tokenizes:\n{traceback.format_exc()}")

    with contextlib.suppress(EOFError, OSError):  # when the parent is gone
        while True:
            connection.send(answer(*connection.recv()))

"""Training straight from text, without a build before: which windows each data-parallel rank reads at each step.

A sample's number says which lane (`lanes`) it comes from, and which of that lane's windows it is. So what a step holds
depends neither on the number of ranks nor on that of workers. b: micro_batch, s: block_size.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from megalite.data.batch import Batch, document_fields
from megalite.data.documents import SPLIT_ON
from megalite.data.encoders import open_encoder
from megalite.data.indexed import token_dtype
from megalite.data.inputs import InputFile, name_files
from megalite.data.lanes import Block, BlockReader, Corpus, Position, Worker, read_bytes
from megalite.data.permutation import KeyedPermutation
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError

LANES = 240  # 2^4 * 3 * 5: most numbers of ranks divide it
HASHED = 2**16  # bytes at each end of a file


class _Lane:
    """What one lane has ready. Windows are counted from the lane's first."""

    def __init__(self, position: Position) -> None:
        self.position = position  # of the block that the next window is in
        self.tokens: np.ndarray | None = None  # of that block
        self.next: Position | None = None  # of the block after it
        self.ahead: Callable[[], Block] | None = None  # waits for the block that is not taken yet


def block_of(window: int, most: int) -> tuple[int, int]:
    """(first window, number of windows) of the block that a lane's window is in; most: a power of 2.

    Blocks of 1, 1, 2, 4, ... windows come before those of `most`: the first step waits for few windows.
    """
    if window >= most:
        return window - window % most, most
    first = 1 << window.bit_length() - 1 if window else 0
    return first, max(1, first)


class StreamingLoader:
    """This rank's micro-batches, step after step, without end, of text that `workers` processes tokenize meanwhile.

    Has the face of `TrainLoader`. Sample k comes from lane k mod lanes, and rank r reads the samples with
    k mod dp_size = r, ascending, so each lane is one rank's. Every token of a lane but its first is a label exactly
    once, and every epoch reads every document once; a lane begins its next one when it is through, which is about when
    the others are.

    A lane's windows are emitted in blocks, shuffled inside. `shuffle_buffer`: the windows of the blocks of all lanes
    together, at most; up to twice as many are held in memory, in the token's dtype. A resumed lane reads no more than
    its block again. A block is shuffled, as a segment is chosen, by the seed and its number alone.

    Where the tokenizer's text can't be cut (`Encoder.cut`), a document is encoded anew for each block that it reaches
    into, so long ones are slow: build indexed data of them.

    files: .jsonl and .txt (`split_on` as `PartReader` has it), not compressed. workers 0: tokenize in this process,
    when a block is asked for. gather: gives what each data-parallel rank calls it with, in a list; for `state_dict`.
    reset_positions, mask_documents: as `WindowDataset` has them. For a GPU as `device` batches are in pinned memory.
    allow_changed_data: where the position was reached on other data, begin with these. Call `close` in the end.

    Raises `UserError` for a file that is compressed or .parquet, where all are empty, and for a number of ranks that
    the lanes can't be dealt out to; `next_step` does for a document that can't be read, and for a dead worker.
    """

    def __init__(
        self,
        files: Sequence[InputFile],
        tokenizer_dir: str,
        *,
        block_size: int,
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        json_key: str = "text",
        split_on: str = "none",
        encoder: str = "auto",
        shuffle_buffer: int = 8192,
        workers: int = 2,
        reset_positions: bool = False,
        mask_documents: bool = False,
        device: torch.device | None = None,
        allow_changed_data: bool = False,
        gather: Callable[[list], list[list]] = lambda own: [own],
    ) -> None:
        if min(micro_batch, accumulation, block_size, shuffle_buffer) < 1 or not 0 <= dp_rank < dp_size or workers < 0:
            raise ValueError(
                f"impossible loader: micro_batch {micro_batch}, accumulation {accumulation}, block_size {block_size}, "
                f"shuffle_buffer {shuffle_buffer}, dp_rank {dp_rank}, dp_size {dp_size}, workers {workers}"
            )
        self.micro_batch, self.accumulation, self.block_size = micro_batch, accumulation, block_size
        self.dp_rank, self.dp_size, self.seed = dp_rank, dp_size, seed
        self.shuffle_buffer, self.workers = shuffle_buffer, workers
        self.reset_positions, self.mask_documents = reset_positions, mask_documents
        self.device, self.allow_changed_data, self.gather = device, allow_changed_data, gather
        self.corpus, tokenizer = _open_corpus(files, tokenizer_dir, encoder, json_key, split_on, block_size, seed)
        self.eod_id = tokenizer.eod_id
        self.fingerprint = _fingerprint(self.corpus, tokenizer, shuffle_buffer)
        self.consumed_samples = 0
        """Samples of the steps that `next_step` has returned: what is only prefetched does not count."""
        self.first_sample = 0
        """At which the lanes began: where the data was changed, not at 0."""
        self.lanes = -(-LANES // dp_size) * dp_size if LANES % dp_size else LANES
        self._positions = {lane: Position(lane) for lane in self._own_lanes()}
        self._lanes: dict[int, _Lane] = {}  # from the first step on
        self._workers: list[Worker] = []
        self._reader: BlockReader | None = None  # where there are no workers
        self._closed = False

    @property
    def global_batch(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.micro_batch * self.accumulation * self.dp_size

    def _own_lanes(self) -> range:
        return range(self.dp_rank, self.lanes, self.dp_size)

    @property
    def _most(self) -> int:
        """Windows of a block: a power of 2."""
        return 1 << max(1, self.shuffle_buffer // self.lanes).bit_length() - 1

    def next_step(self) -> list[Batch]:
        """This rank's `accumulation` batches [b, s] of the next step; moves the position by `global_batch`.

        Waits where they are not ready, and raises what reading them raised.
        """
        if self._closed:
            raise RuntimeError("the loader is closed")
        try:
            if not self._lanes:
                self._start()
            last = self.consumed_samples + self.global_batch
            windows = np.stack([self._window(k) for k in range(self._next_sample(), last, self.dp_size)])
        except BaseException:
            self.close()  # the lanes are somewhere inside the step
            raise
        batches = [self._batch(each) for each in windows.reshape(self.accumulation, self.micro_batch, -1)]
        self.consumed_samples += self.global_batch
        self._positions = {number: lane.position for number, lane in self._lanes.items()}
        return batches

    def _start(self) -> None:
        """Have every lane's first block read, in the order in which they are asked for."""
        if not self.workers:
            self._reader = BlockReader(self.corpus, self.lanes)
        for _ in range(min(self.workers, len(self._positions))):
            self._workers.append(Worker(self.corpus, self.lanes))
        first = self._next_sample()
        for sample in range(first, first + self.lanes, self.dp_size):
            number = sample % self.lanes
            lane = _Lane(self._positions[number])
            lane.ahead = self._ask(number, lane.position, self._block_of(sample)[1])
            self._lanes[number] = lane

    def _ask(self, lane: int, position: Position, windows: int) -> Callable[[], Block]:
        """Have a block read; returns what waits for it. A lane is always the same worker's."""
        if self._reader is not None:
            return partial(self._reader.next_block, position, windows)
        return self._workers[lane // self.dp_size % len(self._workers)].submit(position, windows)

    def _next_sample(self) -> int:
        """The first sample of the next step that is this rank's."""
        return self.consumed_samples + (self.dp_rank - self.consumed_samples) % self.dp_size

    def _block_of(self, sample: int) -> tuple[int, int]:
        return block_of((sample - self.first_sample) // self.lanes, self._most)

    def _window(self, sample: int) -> np.ndarray:
        """[s + 1] of a sample; they are asked for in rising order."""
        lane = self._lanes[sample % self.lanes]
        place = (sample - self.first_sample) // self.lanes
        first, count = self._block_of(sample)
        if lane.tokens is None:
            lane.tokens, lane.next = lane.ahead()
            lane.ahead = self._ask(sample % self.lanes, lane.next, block_of(first + count, self._most)[1])
        # Minus: other numbers than those of the epochs.
        number = KeyedPermutation(count, self.seed, -1 - (first * self.lanes + sample % self.lanes))(place - first)
        start = number * self.block_size
        window = lane.tokens[start : start + self.block_size + 1]
        if place == first + count - 1:
            lane.position, lane.tokens = lane.next, None
        return window

    def _batch(self, windows: np.ndarray) -> Batch:
        positions = documents = None
        if self.reset_positions or self.mask_documents:
            # No text has EOD's id among its tokens: where it stands, a document ends.
            breaks = [(np.flatnonzero(window[:-2] == self.eod_id) + 1).tolist() for window in windows]
            positions, documents = document_fields(breaks, self.block_size)
        batch = Batch.from_windows(
            windows,
            positions=positions if self.reset_positions else None,
            documents=documents if self.mask_documents else None,
        )
        return batch.pin_memory() if self.device is not None and self.device.type == "cuda" else batch

    def progress(self) -> dict[str, float]:
        """{"epoch"}: how often this rank's lanes have passed over the corpus, for metrics."""
        passed = sum(position.segment - lane for lane, position in self._positions.items())
        return {"epoch": passed / len(self._positions) / self.corpus.ends[-1]}

    def close(self) -> None:
        """End the workers; no step can be had after."""
        self._closed = True
        for worker in self._workers:
            worker.close()
        self._workers = []

    def state_dict(self) -> dict[str, Any]:
        """The position, the same on every rank; all of them have to call it, for `gather`.

        "lanes" has a `Position` for each lane: that of the block which its next window is in.
        """
        own = [[lane, *position] for lane, position in self._positions.items()]
        lanes = {lane: position for of_rank in self.gather(own) for lane, *position in of_rank}
        if len(lanes) != self.lanes:
            raise ValueError(f"gather gave {len(lanes)} of {self.lanes} lanes: it must give those of every rank")
        return {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "consumed_samples": self.consumed_samples,
            "first_sample": self.first_sample,
            "lanes": [lanes[lane] for lane in range(self.lanes)],
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on from a position, before the first step; returns what the user should know of it, if anything.

        Raises `UserError` if it was reached in another order, on other data and `allow_changed_data` is not set, or in
        lanes that can't be dealt out to this number of ranks.
        """
        if self._lanes:
            raise RuntimeError("the position must be set before the first step")
        if state["seed"] != self.seed:
            raise UserError(
                f"the seed changed: {state['seed']} in the checkpoint, {self.seed} now; "
                "the order of the data depends on it, so restore it, or start a new run"
            )
        consumed = int(state["consumed_samples"])
        if state["fingerprint"] != self.fingerprint:
            changed = (
                "the training text, how it is read, the tokenizer, block_size or shuffle_buffer changed: fingerprint "
                f"{str(state['fingerprint'])[:12]} in the checkpoint, {self.fingerprint[:12]} now"
            )
            if not self.allow_changed_data:
                raise UserError(
                    f"{changed}; restore them, start a new run, or go on with other data: --data.allow_changed_data"
                )
            self.consumed_samples = self.first_sample = consumed
            return f"{changed}; going on from the start of the data that is there now"
        lanes = len(state["lanes"])
        if lanes % self.dp_size:
            sizes = ", ".join(str(size) for size in range(1, lanes + 1) if lanes % size == 0)
            raise UserError(
                f"the run reads its text in {lanes} lanes, which can't be dealt out to {self.dp_size} data-parallel "
                f"ranks: go on with one of {sizes}"
            )
        self.lanes = lanes
        self.consumed_samples, self.first_sample = consumed, int(state["first_sample"])
        self._positions = {lane: Position(*state["lanes"][lane]) for lane in self._own_lanes()}
        return None


def _open_corpus(
    files: Sequence[InputFile],
    tokenizer_dir: str,
    encoder: str,
    json_key: str,
    split_on: str,
    block_size: int,
    seed: int,
) -> tuple[Corpus, Tokenizer]:
    if split_on not in SPLIT_ON:
        raise UserError(f'split_on "{split_on}" is none of {", ".join(SPLIT_ON)}')
    for file in files:
        if file.compression or file.format == "parquet":
            raise UserError(
                f"{file.path}: streaming needs plain .jsonl or .txt, as it goes on from a place in the file; "
                "decompress it, or build indexed data of it with tools/preprocess_data.py"
            )
    if not any(file.size for file in files):
        raise UserError(f"no text in {name_files([file.path for file in files])}: there is nothing to train on")
    tokenizer = Tokenizer(tokenizer_dir)
    whole = split_on == "none" and any(file.format == "txt" for file in files)
    # Every encoder cuts in the same places, and this one needs no check.
    cuttable = whole and open_encoder(tokenizer, "tokenizers", token_dtype(tokenizer.vocab_size)).cut is not None
    return Corpus(tuple(files), tokenizer_dir, encoder, json_key, split_on, cuttable, block_size, seed), tokenizer


def _fingerprint(corpus: Corpus, tokenizer: Tokenizer, shuffle_buffer: int) -> str:
    """SHA-256 (hex) of what the samples follow from, but for the seed and the number of lanes.

    Of each file: its name without the folder, its size, and its first and last 64 KiB. All of terabytes can't be read
    at each start, so a change inside a file that leaves its size is not noticed.
    """
    options = [
        tokenizer.sha256,
        tokenizer.eod_id,
        corpus.json_key,
        corpus.split_on,
        corpus.cuttable,
        corpus.unit,
        corpus.block_size,
        shuffle_buffer,
    ]
    digest = hashlib.sha256(json.dumps(options).encode())
    for file in corpus.files:
        ends = read_bytes(file.path, 0, HASHED) + read_bytes(file.path, max(0, file.size - HASHED), HASHED)
        named = [os.path.basename(file.path), file.size, hashlib.sha256(ends).hexdigest()]
        digest.update(json.dumps(named).encode())
    return digest.hexdigest()

"""Windows over token files, and the order in which they are visited.

s: block_size, tokens of one training sequence.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np

from megalite.data.batch import Batch, document_fields
from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError


class WindowDataset:
    """Consecutive windows of `block_size + 1` tokens over each source; item i is int64 [s + 1].

    Neighbouring windows share one token, so each token but a source's first is a label exactly once. No window crosses
    from one source into the next, and what remains at a source's end, fewer than `block_size` labels, is dropped.

    reset_positions: in `batch`, positions restart at 0 with each document. mask_documents: its `documents` are given,
    by which the model keeps them apart. Both take a document to begin where the window does: of one that began before,
    the window does not know how much. No label is left out: an EOD's is the next document's first token.

    Raises `UserError` when there is no window at all, or the sources were made with different tokenizers; reading does
    where a token id is not below `vocab_size` (data without a manifest may come from any tokenizer).
    """

    def __init__(
        self,
        sources: list[IndexedDataset | str | Path],
        block_size: int,
        vocab_size: int | None = None,
        *,
        reset_positions: bool = False,
        mask_documents: bool = False,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size, self.vocab_size = block_size, vocab_size
        self.reset_positions, self.mask_documents = reset_positions, mask_documents
        self.sources = [each if isinstance(each, IndexedDataset) else IndexedDataset(each) for each in sources]
        known: dict[str, str] = {}  # tokenizer -> a source that was made with it
        for source in self.sources:
            if source.manifest is not None:
                known.setdefault(str(source.manifest.get("tokenizer_sha256")), source.prefix)
        if len(known) > 1:
            first, second, *_ = known.values()
            raise UserError(f"{first} and {second} were made with different tokenizers: build them again with one")
        # Plain arrays over the same maps: slicing the memmap class itself takes several times as long.
        self._streams = [np.asarray(source.tokens) for source in self.sources]
        # ends[k]: windows in sources 0..k
        self.ends = list(accumulate(max(0, source.num_tokens - 1) // block_size for source in self.sources))
        if not self.sources or self.ends[-1] == 0:
            most = max((source.num_tokens for source in self.sources), default=0)
            raise UserError(
                f"no window of block_size {block_size} fits: it takes {block_size + 1} tokens, and the largest of "
                f"{len(self.sources)} source(s) has {most}; give more data or a smaller block_size"
            )

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        return self._checked(index).astype(np.int64)

    def _checked(self, index: int) -> np.ndarray:
        """A window as it is stored, [s + 1] of the source's dtype, once its ids are known to be in the vocabulary."""
        source, start = self._place(index)
        window = self._streams[source][start : start + self.block_size + 1]
        if self.vocab_size is not None:
            most = int(window.max())
            least = 0 if window.dtype.kind == "u" else int(window.min())
            if most >= self.vocab_size or least < 0:
                worst = most if most >= self.vocab_size else least
                raise UserError(
                    f"{self.sources[source].bin_path}: token id {worst} near token {start}, but model.vocab_size is "
                    f"{self.vocab_size}; the data is of another tokenizer, or damaged: build it again"
                )
        return window

    def batch(self, indices: Sequence[int], loss_mask: np.ndarray | None = None) -> Batch:
        """These windows as one micro-batch [b, s]; `loss_mask`, bool [b] or [b, s], default: every label counts."""
        windows = np.empty((len(indices), self.block_size + 1), dtype=np.int64)
        for row, index in enumerate(indices):
            windows[row] = self._checked(index)
        if not (self.reset_positions or self.mask_documents):
            return Batch.from_windows(windows, loss_mask)
        positions, documents = document_fields([self.document_breaks(i) for i in indices], self.block_size)
        return Batch.from_windows(
            windows,
            loss_mask,
            positions=positions if self.reset_positions else None,
            documents=documents if self.mask_documents else None,
        )

    def document_breaks(self, index: int) -> list[int]:
        """Where in a window other documents begin than the one at its start: rising, each in 1 .. s - 1."""
        source, start = self._place(index)
        return [token - start for token in self.sources[source].document_breaks(start, start + self.block_size)]

    def _place(self, index: int) -> tuple[int, int]:
        """(source, first token in it) of a window."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        source = bisect_right(self.ends, index)
        return source, (index - (self.ends[source - 1] if source else 0)) * self.block_size

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the windows' content: block_size and each source's fingerprint, in order."""
        parts = [str(self.block_size), *(source.fingerprint for source in self.sources)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def evaluated_windows(total: int, limit: int | None) -> list[int]:
    """At most `limit` of the windows 0 .. total - 1, evenly spread: the first ones may all be of one long document."""
    count = total if limit is None else min(limit, total)
    return [i * total // count for i in range(count)]

"""Windows over token files, and the order in which they are visited.

s: block_size, tokens of one training sequence.
"""

import hashlib
from bisect import bisect_right
from itertools import accumulate
from math import isqrt
from pathlib import Path

import numpy as np

from megalite.data.indexed import IndexedDataset
from megalite.errors import UserError

MASK64 = 2**64 - 1
ROUNDS = 6  # 4 make a strong pseudo-random permutation (Luby and Rackoff 1988); 2 more for domains of a few windows.


class WindowDataset:
    """Consecutive windows of `block_size + 1` tokens over each source; item i is int64 [s + 1].

    Neighbouring windows share one token, so each token but a source's first is a label exactly once. No window crosses
    from one source into the next, and what remains at a source's end, fewer than `block_size` labels, is dropped.

    Raises `UserError` when there is no window at all, or the sources were made with different tokenizers; reading does
    where a token id is not below `vocab_size` (data without a manifest may come from any tokenizer).
    """

    def __init__(
        self, sources: list[IndexedDataset | str | Path], block_size: int, vocab_size: int | None = None
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, not {block_size}")
        self.block_size, self.vocab_size = block_size, vocab_size
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
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        source = bisect_right(self.ends, index)
        start = (index - (self.ends[source - 1] if source else 0)) * self.block_size
        window = self._streams[source][start : start + self.block_size + 1].astype(np.int64)
        if self.vocab_size is not None and not 0 <= int(window.min()) <= int(window.max()) < self.vocab_size:
            worst = int(window.max()) if window.max() >= self.vocab_size else int(window.min())
            raise UserError(
                f"{self.sources[source].bin_path}: token id {worst} near token {start}, but model.vocab_size is "
                f"{self.vocab_size}; the data is of another tokenizer, or damaged: build it again"
            )
        return window

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the windows' content: block_size and each source's fingerprint, in order."""
        parts = [str(self.block_size), *(source.fingerprint for source in self.sources)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def evaluated_windows(total: int, limit: int | None) -> list[int]:
    """At most `limit` of the windows 0 .. total - 1, evenly spread: the first ones may all be of one long document."""
    count = total if limit is None else min(limit, total)
    return [i * total // count for i in range(count)]


class KeyedPermutation:
    """A bijection of [0, n) keyed by (seed, epoch): no table, O(1) memory and time, any n from 1.

    A balanced Feistel network over Z_a x Z_a, a = ceil(sqrt(n)), whose results of n and above are enciphered again
    ("cycle walking"). As a^2 < n + 2 sqrt(n) + 1, a second turn is rare. Method: Black and Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002. The round function is the finalizer of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", OOPSLA 2014): good enough to shuffle, no cipher.
    """

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, not {n}")
        self.n = n
        self.side = isqrt(n - 1) + 1
        key = hashlib.blake2b(f"megalite permutation {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
        self.keys = [int.from_bytes(key[i : i + 8], "little") for i in range(0, len(key), 8)]

    def __call__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside [0, {self.n})")
        while True:
            left, right = divmod(i, self.side)
            for key in self.keys:
                z = (right ^ key) & MASK64
                z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
                z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
                left, right = right, (left + (z ^ (z >> 31))) % self.side
            i = left * self.side + right
            if i < self.n:
                return i

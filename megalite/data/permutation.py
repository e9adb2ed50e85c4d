"""A random order without a table."""

import hashlib
from math import isqrt

MASK64 = 2**64 - 1
ROUNDS = 6  # 4 make a strong pseudo-random permutation (Luby and Rackoff 1988); 2 more for domains of a few windows.


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

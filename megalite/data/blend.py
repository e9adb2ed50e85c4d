"""Which window a run's sample number k is: of one shuffled pass over the data after another, or of a blend of sources.

Everything here is a pure function of the data, the weights, the seed and k.
"""

import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from heapq import heapify, heappop, heappush
from itertools import count, islice, pairwise
from math import gcd, inf, lcm

from megalite.data.permutation import KeyedPermutation


def exact_shares(weights: Sequence[float]) -> list[int]:
    """The smallest integers in the ratio of `weights`, which stand for their decimal text: 0.1 is a tenth."""
    if not weights or not all(0 < weight < inf for weight in weights):
        raise ValueError(f"weights must be positive numbers, not {weights}")
    exact = [Fraction(repr(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * common) for weight in exact]
    return [share // gcd(*shares) for share in shares]


class Apportionment:
    """Which source each sample comes from: source i gets shares[i] of every sum(shares) samples, evenly spread.

    With w_i = shares[i] / sum(shares), more than w_i p - 1 and fewer than w_i p + 1 of the first p samples are source
    i's, whatever p: its j-th sample comes at a position p (from 1) with w_i p > j - 1 and p <= ceil(j / w_i), and among
    the sources that may come the one with the earliest such end does. (Tijdeman, "The chairman assignment problem",
    Discrete Mathematics 32, 1980; as deadlines: Steiner and Yeomans, "Level schedules for mixed-model, just-in-time
    processes", Management Science 39, 1993.) In integers throughout, since sums of floats would drift.

    The order repeats after sum(shares) samples: its period. Rising samples cost about 2 us a call. Going elsewhere, as
    a resumed run does, simulates the present period from its first sample: 1 us for each with two sources, 1.5 us with
    30. Weights of few digits have short periods; with token counts for weights it is the whole run so far.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        if not shares or min(shares) < 1:
            raise ValueError(f"shares must be positive integers, not {shares}")
        self.shares, self.period = list(shares), sum(shares)
        self._start(0)

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, which of its own samples, from 0) of the sample number `sample`, from 0."""
        first = sample - sample % self.period
        if sample < self._next or first > self._next:
            self._start(first)
        source, taken = next(islice(self._walk, sample - self._next, None))
        self._next = sample + 1
        return source, taken

    def _start(self, first: int) -> None:
        self._next, self._walk = first, self._simulate(first // self.period)

    def _simulate(self, periods: int) -> Iterator[tuple[int, int]]:
        """(source, which of its own) of every sample from the first after so many whole periods on."""
        shares, period = self.shares, self.period
        taken = [0] * len(shares)  # since the start
        ready = [(-(-period // share), source) for source, share in enumerate(shares)]  # (deadline, source)
        waiting: list[tuple[int, int]] = []  # (position from which it may come again, source)
        heapify(ready)
        for position in count(1):
            while waiting and waiting[0][0] <= position:
                source = heappop(waiting)[1]
                heappush(ready, (-(-(taken[source] + 1) * period // shares[source]), source))
            source = heappop(ready)[1]
            yield source, periods * shares[source] + taken[source]
            taken[source] += 1
            heappush(waiting, (taken[source] * period // shares[source] + 1, source))


class Blend:
    """Consecutive parts of one dataset's windows, each with a weight.

    names: what to call the sources; ends: part k is the windows [ends[k - 1], ends[k]), none of them empty.
    """

    def __init__(self, names: Sequence[str], weights: Sequence[float], ends: Sequence[int]) -> None:
        self.names, self.ends = list(names), list(ends)
        self.windows = [end - start for start, end in pairwise([0, *ends])]
        if not len(names) == len(weights) == len(ends) or min(self.windows) < 1:
            raise ValueError(f"no blend: {len(names)} names, {len(weights)} weights, {self.windows} windows")
        self.shares = exact_shares(weights)
        self.fractions = [share / sum(self.shares) for share in self.shares]

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples pass over each source, by name, to within one window."""
        rates = zip(self.names, self.fractions, self.windows, strict=True)
        return {name: samples * fraction / windows for name, fraction, windows in rates}

    def fingerprint(self, of_dataset: str) -> str:
        """SHA-256 (hex) of the dataset's fingerprint and of what is drawn from where."""
        parts = [of_dataset, *(f"{end} {share}" for end, share in zip(self.ends, self.shares, strict=True))]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class SampleOrder:
    """order(k) is the window that the run's sample number k is, counted from 0 over all epochs.

    Each epoch of a source visits every window of it once, in an order of its own. Remembers where it is, so that rising
    k are cheap; not for several threads at a time.
    """

    def __init__(self, windows: int, seed: int, blend: Blend | None = None) -> None:
        self._passes = [_Passes(windows, seed)]
        self._apportionment = None
        if blend is not None:
            # A seed of its own for each source: two of the same size would be visited in the same order.
            self._passes = [
                _Passes(size, _source_seed(seed, i), end - size)
                for i, (size, end) in enumerate(zip(blend.windows, blend.ends, strict=True))
            ]
            self._apportionment = Apportionment(blend.shares)

    def __call__(self, sample: int) -> int:
        source, own = self._apportionment(sample) if self._apportionment else (0, sample)
        return self._passes[source](own)


class _Passes:
    """One source's windows, `first` to first + windows - 1, permuted anew in each epoch."""

    def __init__(self, windows: int, seed: int, first: int = 0) -> None:
        self.windows, self.seed, self.first = windows, seed, first
        self._epoch = -1

    def __call__(self, sample: int) -> int:
        epoch, offset = divmod(sample, self.windows)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, KeyedPermutation(self.windows, self.seed, epoch)
        return self.first + self._order(offset)


def _source_seed(seed: int, source: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"megalite blend {seed} {source}".encode(), digest_size=8).digest(), "little")

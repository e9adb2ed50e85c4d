"""Which windows each data-parallel rank reads at each step. b: micro_batch, s: block_size.

The order is a pure function of the data, the seed and a sample's number, so the position is one integer, and a run may
go on with another number of ranks or another batch size without skipping or repeating a sample.
"""

from collections.abc import Iterator

import numpy as np

from megalite.data.batch import Batch
from megalite.data.dataset import KeyedPermutation, WindowDataset, evaluated_windows
from megalite.errors import UserError


class TrainLoader:
    """This rank's micro-batches, step after step, without end; each epoch visits every window once, in its own order.

    Sample k of the run is window perm(k mod n) of epoch k div n, n = len(dataset). Micro-step m on rank r reads samples
    consumed + (m * dp_size + r) * micro_batch + [0, micro_batch).
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        consumed_samples: int = 0,
    ) -> None:
        _check_shard(micro_batch, dp_rank, dp_size)
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, not {accumulation}")
        self.dataset = dataset
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.consumed_samples = consumed_samples
        self._epoch = -1  # of self._order

    @property
    def global_batch(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.micro_batch * self.accumulation * self.dp_size

    def window_of(self, sample: int) -> int:
        """The window that is the run's sample number `sample`, counted from 0 over all epochs."""
        epoch, offset = divmod(sample, len(self.dataset))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, KeyedPermutation(len(self.dataset), self.seed, epoch)
        return self._order(offset)

    def next_step(self) -> list[Batch]:
        """This rank's `accumulation` batches [b, s] of the next step; moves the position by `global_batch`."""
        batches = []
        for micro_step in range(self.accumulation):
            first = self.consumed_samples + (micro_step * self.dp_size + self.dp_rank) * self.micro_batch
            windows = [self.dataset[self.window_of(k)] for k in range(first, first + self.micro_batch)]
            batches.append(Batch.from_windows(np.stack(windows)))
        self.consumed_samples += self.global_batch
        return batches

    def state_dict(self) -> dict[str, str | int]:
        """The position, the same on every rank."""
        return {
            "fingerprint": self.dataset.fingerprint,
            "seed": self.seed,
            "consumed_samples": self.consumed_samples,
        }

    def load_state_dict(self, state: dict[str, str | int]) -> None:
        """Go on from a position; raises `UserError` if it was reached on other data or in another order."""
        here = self.state_dict()
        if state["fingerprint"] != here["fingerprint"]:
            raise UserError(
                f"the training data or block_size changed: fingerprint {str(state['fingerprint'])[:12]} in the "
                f"checkpoint, {str(here['fingerprint'])[:12]} now; restore them, or start a new run"
            )
        if state["seed"] != here["seed"]:
            raise UserError(
                f"the seed changed: {state['seed']} in the checkpoint, {here['seed']} now; "
                "the order of the data depends on it, so restore it, or start a new run"
            )
        self.consumed_samples = int(state["consumed_samples"])


def eval_batches(
    dataset: WindowDataset, micro_batch: int, dp_rank: int, dp_size: int, windows: int | None = None
) -> Iterator[Batch]:
    """This rank's batches [b, s] of one pass over `dataset` in order, or over `windows` of it (`evaluated_windows`).

    Every rank gets the same number. Where windows run out, window 0 fills in with its loss_mask False, so the loss over
    all ranks counts each window exactly once, for any dp_size.
    """
    _check_shard(micro_batch, dp_rank, dp_size)
    chosen = evaluated_windows(len(dataset), windows)
    for step in range(-(-len(chosen) // (micro_batch * dp_size))):
        index = (step * dp_size + dp_rank) * micro_batch + np.arange(micro_batch)
        real = index < len(chosen)
        tokens = np.stack([dataset[chosen[int(i)]] for i in np.where(real, index, 0)])
        yield Batch.from_windows(tokens, loss_mask=real)


def _check_shard(micro_batch: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"impossible shard: micro_batch {micro_batch}, dp_rank {dp_rank}, dp_size {dp_size}")

"""Which windows each data-parallel rank reads at each step. b: micro_batch, s: block_size.

The order is a pure function of the data, the seed and a sample's number, so the position is one integer, and a run may
go on with another number of ranks or another batch size without skipping or repeating a sample.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from megalite.data.batch import Batch
from megalite.data.blend import Blend, SampleOrder
from megalite.data.dataset import WindowDataset, evaluated_windows
from megalite.errors import UserError


class TrainLoader:
    """This rank's micro-batches, step after step, without end, prepared `prefetch` steps ahead in a thread.

    Sample k of the run is the window `SampleOrder` gives, by `blend` where there is one. Micro-step m on rank r reads
    samples consumed + (m * dp_size + r) * micro_batch + [0, micro_batch). For a GPU as `device` batches are in pinned
    memory. allow_changed_data: take a position that was reached on other data for one in this.
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
        blend: Blend | None = None,
        prefetch: int = 2,
        device: torch.device | None = None,
        allow_changed_data: bool = False,
        consumed_samples: int = 0,
    ) -> None:
        _check_shard(micro_batch, dp_rank, dp_size)
        if accumulation < 1 or prefetch < 1:
            raise ValueError(f"accumulation and prefetch must be at least 1, not {accumulation} and {prefetch}")
        self.dataset, self.blend = dataset, blend
        self.micro_batch = micro_batch
        self.accumulation = accumulation
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.seed = seed
        self.prefetch = prefetch
        self.device = device
        self.allow_changed_data = allow_changed_data
        self.consumed_samples = consumed_samples
        """Samples of the steps that `next_step` has returned: what is only prefetched does not count."""
        self._prefetcher: Prefetcher | None = None

    @property
    def global_batch(self) -> int:
        """Sequences of one step, over all ranks."""
        return self.micro_batch * self.accumulation * self.dp_size

    def next_step(self) -> list[Batch]:
        """This rank's `accumulation` batches [b, s] of the next step; moves the position by `global_batch`.

        Waits where they are not ready, and raises what reading them raised.
        """
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._steps(self.consumed_samples), self.prefetch, self.device)
        batches = next(self._prefetcher)
        self.consumed_samples += self.global_batch
        return batches

    def _steps(self, first: int) -> Iterator[list[Batch]]:
        """Each step's batches from sample `first` on."""
        order = SampleOrder(len(self.dataset), self.seed, self.blend)
        pinned = self.device is not None and self.device.type == "cuda"
        first += self.dp_rank * self.micro_batch
        while True:
            batches = []
            for _ in range(self.accumulation):
                batch = self.dataset.batch([order(k) for k in range(first, first + self.micro_batch)])
                batches.append(batch.pin_memory() if pinned else batch)
                first += self.dp_size * self.micro_batch
            yield batches

    def progress(self) -> dict[str, Any]:
        """How often the data was passed over up to here, for metrics: {"epoch"}, or {"epochs"} by source of a blend."""
        if self.blend is not None:
            return {"epochs": self.blend.epochs(self.consumed_samples)}
        return {"epoch": self.consumed_samples / len(self.dataset)}

    def close(self) -> None:
        """End the thread; no step can be had after."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def state_dict(self) -> dict[str, str | int]:
        """The position, the same on every rank."""
        fingerprint = self.dataset.fingerprint
        return {
            "fingerprint": fingerprint if self.blend is None else self.blend.fingerprint(fingerprint),
            "seed": self.seed,
            "consumed_samples": self.consumed_samples,
        }

    def load_state_dict(self, state: dict[str, str | int]) -> str | None:
        """Go on from a position, before the first step; returns what the user should know of it, if anything.

        Raises `UserError` if it was reached in another order, or on other data and `allow_changed_data` is not set.
        """
        if self._prefetcher is not None:
            raise RuntimeError("the position must be set before the first step")
        here = self.state_dict()
        if state["seed"] != here["seed"]:
            raise UserError(
                f"the seed changed: {state['seed']} in the checkpoint, {here['seed']} now; "
                "the order of the data depends on it, so restore it, or start a new run"
            )
        changed = None
        if state["fingerprint"] != here["fingerprint"]:
            changed = (
                f"the training data, its blend or block_size changed: fingerprint {str(state['fingerprint'])[:12]} in "
                f"the checkpoint, {str(here['fingerprint'])[:12]} now"
            )
            if not self.allow_changed_data:
                raise UserError(
                    f"{changed}; restore them, start a new run, or go on with other data: --data.allow_changed_data"
                )
        self.consumed_samples = int(state["consumed_samples"])
        return changed and f"{changed}; going on with sample {self.consumed_samples:,} of the data that is there now"


class Prefetcher:
    """next() of it is the next of `items`, which a thread takes, at most `depth` of them before they are asked for.

    What `items` raises is raised where the item is asked for. One thread is enough for indexed data: a window of
    2,048 tokens costs some 30 us, far less than training on it, and a process would have to send it over. device: the
    GPU in whose context the thread may pin memory.
    """

    def __init__(self, items: Iterator[list[Batch]], depth: int, device: torch.device | None = None) -> None:
        self._items, self._device = items, device
        self._room = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue[tuple[list[Batch] | None, BaseException | None]] = queue.SimpleQueue()
        self._error: BaseException | None = None  # after which there are no more items
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.set_device(self._device)  # of a new thread it is the first GPU, whose memory it would take
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put((next(self._items), None))
        except BaseException as error:  # the main thread has to hear of it, or it waits for ever
            self._ready.put((None, error))

    def __next__(self) -> list[Batch]:
        if self._closed:
            raise RuntimeError("the prefetcher is closed")
        if self._error is None:
            item, self._error = self._ready.get()
            self._room.release()
        if self._error is not None:
            raise self._error
        return item

    def close(self) -> None:
        """End the thread once the item at hand is done; one that is stuck in a read ends with the process."""
        self._closed = True
        self._room.release()
        self._thread.join(timeout=5)


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
        yield dataset.batch([chosen[int(i)] for i in np.where(real, index, 0)], loss_mask=real)


def _check_shard(micro_batch: int, dp_rank: int, dp_size: int) -> None:
    if micro_batch < 1 or not 0 <= dp_rank < dp_size:
        raise ValueError(f"impossible shard: micro_batch {micro_batch}, dp_rank {dp_rank}, dp_size {dp_size}")

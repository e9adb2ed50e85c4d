"""What the model is fed. b: sequences in a micro-batch, s: tokens in a sequence."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch on one data-parallel rank; every field is [b, s]."""

    tokens: torch.Tensor
    """int64: what the model reads."""
    labels: torch.Tensor
    """int64: the token that follows each token."""
    loss_mask: torch.Tensor
    """bool: which labels count in the loss."""
    positions: torch.Tensor
    """int64: each token's place in its sequence, or in its document, from 0."""
    documents: torch.Tensor | None = None
    """int32: which document of its sequence each token belongs to, 0, 1, ...; None where all attend to all before."""

    @classmethod
    def from_windows(
        cls,
        windows: np.ndarray,
        loss_mask: np.ndarray | None = None,
        *,
        positions: np.ndarray | None = None,
        documents: np.ndarray | None = None,
    ) -> Self:
        """From `windows`, int64 [b, s + 1]; `loss_mask`, bool [b] or [b, s], default: every label counts.

        positions int64 [b, s], default: 0 .. s - 1; documents int32 [b, s], default: None.
        """
        stream = torch.from_numpy(np.ascontiguousarray(windows, dtype=np.int64))
        tokens = stream[:, :-1].contiguous()
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        if loss_mask is not None:
            kept = torch.from_numpy(np.asarray(loss_mask, dtype=bool))
            mask &= kept[:, None] if kept.ndim == 1 else kept
        return cls(
            tokens,
            stream[:, 1:].contiguous(),
            mask,
            torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
            if positions is None
            else torch.from_numpy(positions),
            None if documents is None else torch.from_numpy(documents),
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        return self._each(lambda field: field.to(device, non_blocking=non_blocking))

    def part(self, rank: int, size: int) -> Self:
        """Part number `rank` of `size` equal ones along the sequence; `documents`, for attention, stay whole."""
        if size == 1:
            return self
        cut = self._each(lambda field: field.chunk(size, 1)[rank].contiguous())
        return replace(cut, documents=self.documents)

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory, from which `to(non_blocking=True)` copies while the GPU computes."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(None if value is None else change(value) for value in values))


def document_fields(breaks: Sequence[Sequence[int]], block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions int64, documents int32), both [b, s], where row i's documents begin at 0 and at each of breaks[i].

    breaks: rising, each in 1 .. s - 1.
    """
    # Over all rows as one stream of b * s tokens: numpy's overhead is paid once. (np.diff alone costs as much as this.)
    starts = [start for row in breaks for start in (0, *row)]
    ends = (end for row in breaks for end in (*row, block_size))
    lengths = [end - start for start, end in zip(starts, ends, strict=True)]
    numbers = [number for row in breaks for number in range(len(row) + 1)]
    shape = (len(breaks), block_size)
    documents = np.repeat(np.array(numbers, dtype=np.int32), lengths).reshape(shape)
    positions = np.arange(block_size) - np.repeat(np.array(starts, dtype=np.int64), lengths).reshape(shape)
    return positions, documents

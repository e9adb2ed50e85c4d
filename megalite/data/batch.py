"""What the model is fed. b: sequences in a micro-batch, s: tokens in a sequence."""

from dataclasses import dataclass
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
    """int64: each token's place in its sequence, from 0."""

    @classmethod
    def from_windows(cls, windows: np.ndarray, loss_mask: np.ndarray | None = None) -> Self:
        """From `windows`, int64 [b, s + 1]; `loss_mask`, bool [b] or [b, s], default: every label counts."""
        stream = torch.from_numpy(np.ascontiguousarray(windows, dtype=np.int64))
        tokens = stream[:, :-1].contiguous()
        mask = torch.ones(tokens.shape, dtype=torch.bool)
        if loss_mask is not None:
            kept = torch.from_numpy(np.asarray(loss_mask, dtype=bool))
            mask &= kept[:, None] if kept.ndim == 1 else kept
        positions = torch.arange(tokens.shape[1]).expand(tokens.shape).contiguous()
        return cls(tokens, stream[:, 1:].contiguous(), mask, positions)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same batch on another device."""
        fields = (self.tokens, self.labels, self.loss_mask, self.positions)
        return type(self)(*(field.to(device, non_blocking=non_blocking) for field in fields))

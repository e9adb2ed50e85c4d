"""Dropout (Srivastava et al., 2014) whose masks are the same in every layout. s positions, b batch, h hidden.

Whether an element is dropped is a hash of (seed, place in the model, sample, position, hidden index), not the next
number of a generator: it depends neither on who computes it nor on when, so ranks agree where they hold the same thing,
and recomputation repeats it, without any state to keep.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 2^64 / golden ratio, as int64: SplitMix64's increment
_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # its 0xbf58476d1ce4e5b9 and 0x94d049bb133111eb


@dataclass(frozen=True)
class Dropout:
    """What one forward pass drops.

    samples: [b] int64, each sequence's number in the run. first: position of this rank's first element (under sequence
    or context parallelism it holds a part of the sequence).
    """

    probability: float
    seed: int
    samples: Tensor
    first: int

    def __call__(self, x: Tensor, site: int) -> Tensor:
        """x [s, b, h] with some elements 0, the others scaled by 1 / (1 - probability). site: where in the model."""
        s, _, h = x.shape
        positions = torch.arange(self.first, self.first + s, device=x.device)[:, None]
        # Filled on the device: a tensor copied there would have the host wait for it.
        place = _mix(torch.full((), self.seed, dtype=torch.int64, device=x.device) * _STEP + site)
        rows = _mix(_mix(place + self.samples) + positions)  # [s, b]
        numbers = _mix(rows[..., None] + torch.arange(h, device=x.device) * _STEP)
        keep = (numbers & 0xFFFFFF) >= int(self.probability * 2**24)
        return torch.where(keep, x * (1.0 / (1.0 - self.probability)), 0.0)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al., 2014), on int64, whose products wrap around."""
    z = z + _STEP
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        z = (z ^ _shift(z, shift)) * multiplier
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """z >> bits of an unsigned number."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)

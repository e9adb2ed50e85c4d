"""The angles of the rotary position embedding; `kernels.rope` applies them."""

import torch
from torch import Tensor


def rope_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d): positions [b, s] -> two fp32 tensors [s, b, 1, d/2].

    Computed in fp32 whatever the model's precision: in bf16, positions above 256 would collide.
    """
    exponent = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    with torch.autocast(positions.device.type, enabled=False):
        angles = positions.t().float()[..., None, None] * (1.0 / theta**exponent)  # [s, b, 1, d/2]
        return angles.cos(), angles.sin()

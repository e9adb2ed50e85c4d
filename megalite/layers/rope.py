"""The angles of the rotary position embedding; `kernels.rope` applies them."""

import torch
from torch import Tensor


def rope_angles(positions: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i/d): positions [b, s] -> two fp32 tensors [s, b or 1, 1, d/2].

    Computed in fp32 whatever the model's precision: in bf16, positions above 256 would collide. [s, 1, 1, d/2] where
    all rows are seen to have the same positions; nobody asks a GPU for their values.
    """
    if positions.stride(0) == 0 or (positions.device.type == "cpu" and bool((positions == positions[:1]).all())):
        positions = positions[:1]
    exponent = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    with torch.autocast(positions.device.type, enabled=False):
        angles = positions.t().float()[..., None, None] * (1.0 / theta**exponent)  # [s, b, 1, d/2]
        return angles.cos(), angles.sin()

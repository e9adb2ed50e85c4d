"""Muon (Keller Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for matrices, AdamW for the rest.

With the weight decay and the scale of Moonlight (arXiv:2502.16982): an element of an update has the root mean square
that AdamW's typically has, so AdamW's learning rate and decay carry over. It wants whole matrices and their whole
gradients, the same on all ranks.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Of x -> a x + b x^3 + c x^5, which after 5 steps takes singular values from about 0.002 to 1 into 0.68 .. 1.14.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTS = ("momentum",)


def split(parameters: dict[str, nn.Parameter]) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """(what Muon trains, what AdamW trains) of parameters by global name: the blocks' matrices, and all others."""
    matrices = {name for name, p in parameters.items() if name.startswith("blocks.") and len(p.global_shape) == 2}
    return (
        {name: p for name, p in parameters.items() if name in matrices},
        {name: p for name, p in parameters.items() if name not in matrices},
    )


def orthogonalise(matrix: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Nearly U V^T of the matrix's singular value decomposition U S V^T, by `steps` of Newton and Schulz in `dtype`.

    The singular values of the result lie around 1, within 0.68 .. 1.14 after 5 steps. [m, n] -> [m, n].
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if tall else matrix).to(dtype)
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1 then; a gradient of zeros stays zeros
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrix.dtype)


class MuonAdamW(torch.optim.Optimizer):
    """Muon on `matrices`, torch's AdamW on the groups `rest`; one learning rate for both.

    matrices: parameters that carry `tp_dim` and `tp_segments`; each segment (q, k and v; gate and up) is a matrix of
    its own. scale: the root mean square of an update's element, as a part of the learning rate. steps: of
    `orthogonalise`, in bf16 on a GPU. State of a matrix: {"momentum"}; of the others as AdamW's.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        momentum: float,
        scale: float,
        steps: int,
    ):
        super().__init__([{"params": list(matrices), "weight_decay": weight_decay}, *rest], {"lr": lr})
        self.momentum, self.scale, self.steps = momentum, scale, steps
        # The groups are these very dicts, and the state this very mapping: who sets a rate or reads a moment here,
        # does so there.
        self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=betas, eps=eps, fused=True)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        group = self.param_groups[0]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1.0 - self.momentum)
            ahead = parameter.grad.lerp(momentum, self.momentum)  # Nesterov's
            parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            dtype = torch.bfloat16 if parameter.is_cuda else parameter.dtype
            parts = (each.split(parameter.tp_segments, parameter.tp_dim) for each in (parameter, ahead))
            for weight, part in zip(*parts, strict=True):
                rate = group["lr"] * self.scale * math.sqrt(max(part.shape))
                weight.add_(orthogonalise(part, self.steps, dtype), alpha=-rate)
        self.adamw.step()

"""x @ weight^T, in fp32 on a CPU by oneDNN. Shapes: `...` any leading dimensions, in and out: features.

torch's own products of fp32 matrices are MKL's there. On an AMD EPYC, oneDNN was 10 to 20 % faster (more on busy cores)
in those with the weight, forward and backward; in the third, the weight's gradient, MKL was.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# Not public: where a version of torch is without it, or built without oneDNN, F.linear does everything.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """F.linear(x, weight): x [..., in], weight [out, in] -> [..., out]. No second derivative from oneDNN."""
    if not _by_onednn(x, weight):
        return F.linear(x, weight)
    # Reshaped out here: what a Function gives may be written into, as the head does, only if it is no view.
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], weight.shape[0])


def product(x: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """x @ weight^T, unknown to autograd, for results that are used for a while: in `out`, or anew by oneDNN."""
    if _by_onednn(x, weight):
        return _PRODUCT(x, weight, None, "none", [], "")
    return torch.mm(x, weight.t(), out=out)


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return _PRODUCT is not None and x.device.type == "cpu" and fp32 and not torch.compiler.is_compiling()


class _Linear(torch.autograd.Function):
    """x: [rows, in]. Keeps the weight itself, not a view of it, as F.linear does: ZeRO-3 empties and refills it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _PRODUCT(x, weight, None, "none", [], "")

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx = _PRODUCT(dy, weight.t(), None, "none", [], "") if needs_x else None
        return dx, dy.t() @ x if needs_weight else None

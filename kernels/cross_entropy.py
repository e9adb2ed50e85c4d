"""Cross-entropy over a vocabulary that may be split over a process group (Megatron-LM, arXiv:1909.08053, section 3),
with the z-loss of PaLM (arXiv:2204.02311, section 5)."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss of each token: log Z - logit[target] + z_loss * (log Z)^2; 0 where target is ignore_index.

    logits: [..., v/tp]: rank r of `group` holds the ids from r * v/tp on. targets: [...], global ids -> [...] in fp32,
    or in fp64 from fp64 logits. No second derivative.
    A logit of -inf has probability and gradient 0.
    """
    return _CrossEntropy.apply(logits, targets, group, ignore_index, z_loss)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, group, ignore_index: int, z_loss: float) -> Tensor:
        split = group is not None and dist.get_world_size(group) > 1
        local = logits.shape[-1]
        first = dist.get_rank(group) * local if split else 0

        dtype = torch.promote_types(logits.dtype, torch.float32)
        maximum = logits.detach().amax(-1, keepdim=True).to(dtype)
        if split:
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        # In place where the conversion has made a copy: a copy of all logits is gigabytes.
        shifted = logits - maximum if logits.dtype == dtype else logits.to(dtype).sub_(maximum)  # [..., v/tp]
        ignored = targets == ignore_index
        here = (targets >= first) & (targets < first + local) & ~ignored
        index = torch.where(here, targets - first, 0).unsqueeze(-1)
        target_logit = shifted.gather(-1, index).squeeze(-1).masked_fill(~here, 0.0)
        probability = shifted.exp_()
        sums = torch.stack((probability.sum(-1), target_logit))  # [2, ...]
        if split:
            dist.all_reduce(sums, group=group)
        total, target_logit = sums
        log_z = total.log() + maximum.squeeze(-1)
        loss = total.log() - target_logit + z_loss * log_z.square()

        probability.div_(total.unsqueeze(-1))
        ctx.save_for_backward(probability, index, here, ignored, log_z)
        ctx.z_loss, ctx.dtype = z_loss, logits.dtype
        return loss.masked_fill(ignored, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        probability, index, here, ignored, log_z = ctx.saved_tensors
        upstream = upstream.masked_fill(ignored, 0.0)
        # In place; autograd notices the change of a saved tensor, so a second backward raises instead of being wrong.
        grad = probability.mul_((upstream * (1.0 + 2.0 * ctx.z_loss * log_z)).unsqueeze(-1))
        grad.scatter_add_(-1, index, -(upstream * here).unsqueeze(-1))
        return grad.to(ctx.dtype), None, None, None, None

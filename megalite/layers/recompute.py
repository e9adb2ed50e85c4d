"""What a block keeps for backward: it may compute it again (arXiv:1604.06174), or keep it in the host's memory."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Results that cost a matrix product to get again. Everything else of a block (norms, RoPE, SwiGLU) is cheap.
# By name, as the last of them is registered by an import of a second that only its users make.
_KEEP = {
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::linear",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "megalite::gather_linear",  # with their collectives; see layers/linear.py
    "megalite::linear_reduce",
    "mkldnn::_linear_pointwise",  # kernels/linear.py
    "torch_attn::_varlen_attn",
}


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    keep = op.name() in _KEEP
    if op.name() == "aten::bmm":  # [b, m, k] x [b, k, n]
        (_, m, k), n = args[0].shape, args[1].shape[-1]
        # Attention's scores, of which there are s^2: that product is computed again from its short factors.
        keep = m * n <= k * (m + n)
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(mode: str, block, *args):
    """block(*args) under `mode`, which changes no result.

    none: keep all. selective: keep matmul outputs, but for the scores of attention that has them. full: keep the
    inputs alone. offload: keep all in the host's memory (pinned, where the block runs on a GPU), except parameters and
    what args[1:] hold, which other blocks hold too.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    if mode == "offload":
        with _on_host(*args[1:]):
            return block(*args)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    # There is no dropout to replay, and saving the RNG state costs a device synchronisation per block.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **contexts)


def _on_host(*shared) -> saved_tensors_hooks:
    """As torch's save_on_cpu, which would move parameters too, and once a block what all blocks share."""
    stays = {tensor.data_ptr() for tensor in shared if isinstance(tensor, Tensor)}

    def pack(tensor: Tensor):
        if _of_parameter(tensor) or tensor.data_ptr() in stays:
            return tensor
        # Of what is expanded, as a mask over heads, only what is there.
        stored = tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
        host = torch.empty_like(stored, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(stored, non_blocking=True), tensor.device, tensor.shape, tensor.stride()

    def unpack(packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        host, device, shape, stride = packed
        tensor = host.to(device, non_blocking=True).expand(shape)
        if tensor.stride() == stride or 0 in stride:
            return tensor
        # A slice of something larger went without what it was a slice of. In another layout, sums have another order.
        return torch.empty_strided(shape, stride, dtype=tensor.dtype, device=device).copy_(tensor)

    return saved_tensors_hooks(pack, unpack)


def _of_parameter(tensor: Tensor) -> bool:
    """Whether it is a parameter, a view of one, or autocast's copy of one: no activation."""
    whole = tensor if tensor._base is None else tensor._base
    if isinstance(whole, nn.Parameter):
        return True
    made_by = whole.grad_fn
    if made_by is None or made_by.name() != "ToCopyBackward0":
        return False
    return isinstance(getattr(made_by.next_functions[0][0], "variable", None), nn.Parameter)

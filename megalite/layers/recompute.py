"""Activation checkpointing: what a block keeps for backward, and what it computes again (arXiv:1604.06174)."""

from functools import partial

import torch
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
    "torch_attn::_varlen_attn",
}


def _policy(ctx, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in _KEEP else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(mode: str, block, *args):
    """block(*args) under `mode`: none (keep all), selective (keep matmul outputs), full (keep the inputs alone)."""
    if mode == "none" or not torch.is_grad_enabled():
        return block(*args)
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _policy)} if mode == "selective" else {}
    # There is no dropout to replay, and saving the RNG state costs a device synchronisation per block.
    return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, **contexts)

"""A decoder small enough to try everything on, with a batch for it."""

import torch
from torch import Tensor

from megalite.config import ModelConfig
from megalite.model.gpt import Stage

BASE = {
    "vocab_size": 61,
    "vocab_multiple": 1,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "n_positions": 32,
    "rope_theta": 100.0,  # so that 12 positions turn the slow pairs too
    "init_std": 0.2,  # activations of a size at which a mistake shows
}
CHECKPOINTING = ["none", "selective", "full"]


def make_model(**changes) -> ModelConfig:
    return ModelConfig(**(BASE | changes))


def make_stage(seed: int = 1, activation_checkpointing: str = "none", z_loss: float = 0.0, **changes) -> Stage:
    """A stage whose norms have weights of their own: at 1, a norm in the wrong place would not show."""
    stage = Stage(make_model(**changes), seed=seed, activation_checkpointing=activation_checkpointing, z_loss=z_loss)
    generator = torch.Generator().manual_seed(5)
    for parameter in stage.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return stage


def make_batch(b: int = 2, s: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, loss_mask with about a third left out."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(BASE["vocab_size"], (b, s + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:], torch.rand(b, s, generator=generator) > 0.3


def loss_and_gradients(stage: Stage, tokens, labels, mask, **options) -> tuple[Tensor, dict[str, Tensor]]:
    stage.zero_grad()
    loss = stage(tokens, labels=labels, loss_mask=mask, **options)
    loss.backward()
    return loss.detach(), {p.global_name: p.grad.clone() for p in stage.parameters()}

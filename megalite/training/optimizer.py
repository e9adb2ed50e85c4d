"""AdamW, or Muon and AdamW, over this rank's parameters."""

import torch
from torch import nn

from megalite.config import TrainingConfig
from megalite.training import muon


def make_optimizer(
    parameters: dict[str, nn.Parameter], training: TrainingConfig, tied: nn.Parameter | None = None
) -> torch.optim.Optimizer:
    """AdamW for all parameters, or Muon for the blocks' matrices and AdamW for the rest. tied: see `decay_groups`."""
    options = {
        "lr": training.learning_rate,
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_eps,
    }
    if training.optimizer == "adamw":
        return torch.optim.AdamW(decay_groups(parameters, training.weight_decay, tied), fused=True, **options)
    matrices, rest = muon.split(parameters)
    return muon.MuonAdamW(
        matrices.values(),
        decay_groups(rest, training.weight_decay, tied),
        weight_decay=training.weight_decay,
        momentum=training.muon_momentum,
        scale=training.muon_scale,
        steps=training.muon_steps,
        **options,
    )


def decay_groups(
    parameters: dict[str, nn.Parameter], weight_decay: float, tied: nn.Parameter | None = None
) -> list[dict]:
    """AdamW's groups: matrices decay, vectors (norms) do not. `global_shape`, as ZeRO-3 leaves an empty shape.

    tied: a weight that another stage has too; a group of its own, the last.
    """
    own = [parameter for parameter in parameters.values() if parameter is not tied]
    matrices = [p for p in own if len(p.global_shape) >= 2]
    vectors = [p for p in own if len(p.global_shape) < 2]
    groups = [(matrices, weight_decay), (vectors, 0.0), ([] if tied is None else [tied], weight_decay)]
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]

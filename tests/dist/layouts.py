"""A training pass of a tiny model in any layout of context and tensor parallelism, to hold against one process."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from megalite.comms.collectives import Group, TensorParallel
from megalite.config import ModelConfig
from megalite.layers.sharded_init import shard
from megalite.model.gpt import Stage
from megalite.topology import Grid

BASE = {
    "vocab_size": 64,
    "vocab_multiple": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "n_positions": 32,
    "init_std": 0.2,
}
LENGTH = 12
# Row-parallel layers add partial sums where one process has one sum: fp32 rounding, 6e-8 a step. bf16 rounds at 2^-9.
FP32 = {"loss": 1e-5, "relative": 1e-4, "absolute": 1e-5}
BF16 = {"loss": 1e-2, "relative": 0.0, "absolute": 0.1}


def groups_of(grid: Grid, *axes: str) -> Group:
    """This rank's group along `axes`. All ranks make all groups."""
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in grid.groups(*axes)}
    return next(group for ranks, group in groups.items() if dist.get_rank() in ranks)


def kv_group(grid: Grid, sharers: int) -> Group:
    parts = [ranks[i : i + sharers] for ranks in grid.groups("tensor") for i in range(0, len(ranks), sharers)]
    groups = {tuple(part): dist.new_group(part) for part in parts}
    return next(group for part, group in groups.items() if dist.get_rank() in part)


class Layout:
    """The groups of a grid without data parallelism, made once; none of them: one process."""

    def __init__(self, grid: Grid, attend: Callable[[Group], Callable] | None = None):
        self.grid = grid
        _, _, self.context_rank, _ = grid.coordinates(dist.get_rank())
        self.tensor = groups_of(grid, "tensor") if grid.tensor > 1 else None
        self.context = groups_of(grid, "context") if grid.context > 1 else None
        self.attend = attend(self.context) if grid.context > 1 else None
        self.kv_groups = {n: kv_group(grid, n) for n in (2, 4) if grid.tensor % n == 0}

    def tensor_parallel(self, sequence: bool, kv_heads: int) -> TensorParallel:
        return TensorParallel(self.tensor, sequence, self.kv_groups.get(self.grid.tensor // kv_heads))


def loss_and_gradients(case: dict, layout: Layout | None = None) -> dict:
    """A training pass of the case's model. Every rank has the same batch, or its part of the same sequences.

    case: changes to BASE, and any of checkpointing, prefix (vectors), sequence (parallelism), bf16 (by autocast) and
    documents.
    """
    changes = dict(case)
    checkpointing, p = changes.pop("checkpointing", "none"), changes.pop("prefix", 0)
    sequence, bf16, packed = (changes.pop(name, False) for name in ("sequence", "bf16", "documents"))
    model = ModelConfig(**(BASE | changes))
    where = {}
    if layout is not None:
        tp = layout.tensor_parallel(sequence, model.kv_heads)
        where = {"tp": tp, "context": layout.context, "attend": layout.attend}
    stage = Stage(model, seed=1, activation_checkpointing=checkpointing, z_loss=0.01, **where)
    generator = torch.Generator().manual_seed(0)
    for parameter in stage.parameters():
        if parameter.dim() == 1:  # at 1, a norm in the wrong place would not show
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    ids = torch.randint(model.vocab_size, (2, LENGTH + 1), generator=generator)
    tokens, labels, mask = ids[:, :-1], ids[:, 1:], torch.rand(2, LENGTH, generator=generator) > 0.3
    prefix = torch.randn(2, p, 32, generator=generator).requires_grad_() if p else None
    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 8 + [1] * 4]) if packed else None
    if layout is not None and layout.context is not None:
        cp = layout.grid.context
        tokens, labels, mask = (x.chunk(cp, dim=1)[layout.context_rank] for x in (tokens, labels, mask))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = stage(tokens, labels=labels, loss_mask=mask, prefix_embeddings=prefix, documents=documents)
    loss.backward()
    return {
        "loss": loss.detach(),
        "weights": {parameter.global_name: parameter.detach() for parameter in stage.parameters()},
        "gradients": {parameter.global_name: parameter.grad for parameter in stage.parameters()},
        "prefix": None if prefix is None else prefix.grad,
        "split": {
            parameter.global_name: [parameter.tp_dim, list(parameter.tp_segments)] for parameter in stage.parameters()
        },
    }


def assert_equal_to_one_process(ranks: list[dict], tensor: int, case: dict) -> None:
    """ranks: what `loss_and_gradients` gave on each rank of a grid [context, tensor]."""
    want, near = loss_and_gradients(case), BF16 if case.get("bf16") else FP32
    assert sum(dim is not None for dim, _ in want["split"].values()) >= 9  # most parameters are split
    for rank in range(tensor):
        # Of the ranks of a context group each has its tokens' part of the sums.
        parts = ranks[rank::tensor]
        loss = torch.stack([part["loss"] for part in parts]).sum()
        torch.testing.assert_close(loss, want["loss"], rtol=near["loss"], atol=0)
        for name, (dim, segments) in want["split"].items():
            full = want["gradients"][name]
            for part in parts:
                assert part["split"][name] == [dim, segments]
                assert torch.equal(part["weights"][name], shard(want["weights"][name], dim, segments, tensor, rank))
            scale = full.abs().max().item()
            assert scale > 1e-3, name
            torch.testing.assert_close(
                torch.stack([part["gradients"][name] for part in parts]).sum(dim=0),
                shard(full, dim, segments, tensor, rank),
                rtol=near["relative"],
                atol=near["absolute"] * scale,
                msg=lambda m, n=name: f"{n}: {m}",
            )
        if want["prefix"] is not None:
            torch.testing.assert_close(parts[0]["prefix"], want["prefix"], rtol=1e-4, atol=1e-5)


def assert_replicas_are_equal(ranks: list[dict], tensor: int) -> None:
    """To the bit, or the ranks' copies drift apart."""
    for first in range(0, len(ranks), tensor):
        group = ranks[first : first + tensor]
        for name, (dim, _) in group[0]["split"].items():
            if dim is None:
                for other in group[1:]:
                    assert torch.equal(group[0]["gradients"][name], other["gradients"][name]), name
        assert all(torch.equal(group[0]["loss"], other["loss"]) for other in group[1:])

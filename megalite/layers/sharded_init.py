"""Initial weights that depend on a parameter's global name alone, so that every layout starts from the same model.

The full fp32 tensor is drawn from a generator seeded by (seed, global name), and each rank keeps its slice.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.comms.collectives import Group, group_rank, group_size


@dataclass(frozen=True)
class InitSpec:
    """How weights are drawn: the run's seed, the standard deviation, the dtype whose rounding the values carry.

    DeepSpeed's bf16 modes make their fp32 masters from bf16 weights. Rounding here gives the mode that does not
    (ZeRO-0, by autocast) the same start.
    """

    seed: int
    std: float
    rounding: torch.dtype = torch.float32


def sharded_parameter(
    name: str,
    shape: tuple[int, ...],
    init: InitSpec,
    *,
    std: float | None = None,
    fill: float | None = None,
    group: Group = None,
    dim: int | None = None,
    segments: tuple[int, ...] | None = None,
    valid_rows: int | None = None,
) -> nn.Parameter:
    """This rank's slice of the global parameter `name`, initialised.

    shape: the global shape. dim: the dimension split over `group`, None if replicated. segments: sizes along `dim` of
    parts that are split one by one (q, k and v in one matrix); default: one part. fill: a constant instead of a normal
    draw of `std` (default: init.std). valid_rows: rows from here on are padding and zero.
    Sets `global_name`, `global_shape`, `tp_dim` and `tp_segments` on the parameter. On the meta device it draws
    nothing. Raises ValueError where a part does not divide by the group's size.
    """
    tp = group_size(group) if dim is not None else 1
    segments = segments or ((shape[dim],) if dim is not None else ())
    for size in segments:
        if size % tp:
            raise ValueError(f"{name}: a part of size {size} does not divide over {tp} tensor-parallel ranks")
    local_shape = list(shape)
    if dim is not None:
        local_shape[dim] = sum(segments) // tp
    parameter = nn.Parameter(torch.empty(local_shape, dtype=torch.float32))
    if not parameter.is_meta:
        with torch.no_grad():
            if fill is not None:
                parameter.fill_(fill)
            else:
                full = draw(name, shape, init, init.std if std is None else std, valid_rows)
                parameter.copy_(shard(full, dim, segments, tp, group_rank(group)))
    parameter.global_name, parameter.global_shape = name, tuple(shape)
    parameter.tp_dim, parameter.tp_segments = dim, segments
    return parameter


def draw(name: str, shape: tuple[int, ...], init: InitSpec, std: float, valid_rows: int | None = None) -> Tensor:
    """The full tensor of `name`: normal(0, std) in fp32, on the CPU.

    The draw covers the valid rows only, so that the amount of padding changes no weight.
    """
    digest = hashlib.sha256(f"{init.seed}:{name}".encode()).digest()
    # torch's CPU generator takes 64-bit seeds; 63 bits keep it positive everywhere.
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    rows = shape[0] if valid_rows is None else valid_rows
    # float(): under deepspeed.zero.Init torch.zeros may give bf16, in which normal_ draws other numbers.
    full = torch.zeros(shape, device="cpu").float()
    full[:rows].normal_(0.0, std, generator=generator)
    return full.to(init.rounding).float()


def shard(full: Tensor, dim: int | None, segments: tuple[int, ...], tp: int, rank: int) -> Tensor:
    """Rank `rank`'s slice of `full`: of each segment along `dim`, its part number `rank` of `tp`."""
    if dim is None or tp == 1:
        return full
    return torch.cat([part.chunk(tp, dim)[rank] for part in full.split(segments, dim)], dim)


def unshard(parts: list[Tensor], dim: int, segments: tuple[int, ...]) -> Tensor:
    """The inverse of `shard`: `parts` by rank."""
    sizes = [segment // len(parts) for segment in segments]
    by_segment = zip(*(part.split(sizes, dim) for part in parts), strict=True)
    return torch.cat([piece for pieces in by_segment for piece in pieces], dim)

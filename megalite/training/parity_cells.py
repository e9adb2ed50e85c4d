"""Cells: a layout of ranks under a kind of ZeRO, and what else may change how a step is computed, but not its result.

Pure: which are legal for a model, and small sets of them in which every pair of choices occurs.
"""

import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache

from megalite.config import Config
from megalite.config_check import check, resolve_batch
from megalite.errors import ConfigError
from megalite.model.partition import partition
from megalite.pipeline.schedules import build

SEQUENCE = 16  # tokens
GLOBAL_BATCH = 16  # sequences
STEPS = 3
BETA1 = 0.9
ZERO = ("0", "1", "2", "3", "1-offload", "2-offload", "3-offload")
RECOMPUTE = ("none", "selective", "full")
PRECISIONS = ("fp32", "bf16")
VARIANTS = ("plain", "documents", "dropout")


@dataclass(frozen=True)
class Cell:
    """One way to train."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1
    sequence: bool = False
    virtual: int = 1
    schedule: str = "1f1b"
    zero: str = "0"  # with -offload: the optimizer in the host's memory
    recompute: str = "none"
    precision: str = "fp32"
    variant: str = "plain"  # documents: kept apart, with positions of their own. dropout: of a tenth

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.context * self.tensor

    @property
    def reference(self) -> tuple[int, str, str]:
        """(decoder layers, arithmetic, variant): cells that share it are compared with one and the same run."""
        arithmetic = "autocast" if self.precision == "bf16" and self.zero == "0" else self.precision
        return self.layers, arithmetic, self.variant

    @property
    def layers(self) -> int:
        """Decoder layers of the model: one in each part, and one more, so that parts are uneven."""
        return self.pipeline * self.virtual + 1

    @property
    def accumulation(self) -> int:
        """Micro-batches: twice the stages reach the steady state of every schedule."""
        return min(2 * self.pipeline, GLOBAL_BATCH // self.data)

    def __str__(self) -> str:
        sizes = {"tp": self.tensor, "pp": self.pipeline, "v": self.virtual, "cp": self.context, "dp": self.data}
        layout = [f"{name}{size}{'+sp' * (name == 'tp' and self.sequence)}" for name, size in sizes.items() if size > 1]
        rest = [self.schedule] * (self.schedule == "gpipe") + [self.recompute] * (self.recompute != "none")
        rest += [self.precision] + [self.variant] * (self.variant != "plain")
        return " ".join([*layout, f"zero{self.zero}", *rest])


LAYOUT = ("pipeline", "data", "context", "tensor", "sequence", "virtual", "zero")
CHOICES = ("schedule", "recompute", "precision", "variant")
AXES = (*LAYOUT, *CHOICES)


def shrink(config: Config) -> Config:
    """`config` with a tiny model that has the same options and the same ratios of heads; trained on random data.

    The optimizer is AdamW with a large epsilon, so that a step is a smooth function of its gradient: divided by its own
    size, a gradient that is all rounding would give a step of any sign.
    """
    model, training = config.model, config.training
    per_group = model.num_heads // model.kv_heads
    kv_heads = max(1, 8 // per_group)
    tiny = {
        "vocab_size": 60,  # and 4 rows of padding
        "vocab_multiple": 64,
        "hidden_size": 32,
        "num_heads": kv_heads * per_group,
        "num_kv_heads": kv_heads,
        "head_dim": 8,
        "intermediate_size": 48,
        "n_positions": SEQUENCE,
        "init_std": 0.1,  # else all tokens have nearly the same loss
        "kernels": "auto",
    }
    return Config.model_validate(
        {
            "model": model.model_dump() | tiny,
            "data": {"train_files": ["random"], "block_size": SEQUENCE},
            "training": {
                "seed": training.seed,
                "z_loss": training.z_loss,
                "weight_decay": training.weight_decay,
                "precision": "fp32",
                "learning_rate": 1e-2,
                "lr_schedule": "constant",
                "adam_beta1": BETA1,
                "adam_eps": 1e-3,
                "max_grad_norm": 0.5,  # below what these models have, so that it acts
                "max_steps": STEPS,
                "global_batch_size": GLOBAL_BATCH,
            },
        }
    )


def config_of(cell: Cell, config: Config) -> Config:
    """What `pretrain.py` would be given for a cell; `config` is of `shrink`. Raises ConfigError where it is illegal."""
    changed = config.model_dump()
    micro_batch, rest = divmod(GLOBAL_BATCH, cell.data * cell.accumulation)
    if rest:
        raise ConfigError(f"{GLOBAL_BATCH} sequences do not divide over {cell.data} ranks")
    dropout = 0.1 if cell.variant == "dropout" else config.model.dropout
    changed["model"] |= {"num_layers": cell.layers, "dropout": dropout}
    changed["data"] |= {key: cell.variant == "documents" for key in ("reset_positions", "mask_documents")}
    changed["training"] |= {
        "per_device_train_batch_size": micro_batch,
        "precision": cell.precision,
        "activation_checkpointing": cell.recompute,
    }
    changed["parallel"] = {
        "tensor": cell.tensor,
        "sequence": cell.sequence,
        "context": cell.context,
        "pipeline": cell.pipeline,
        "virtual": cell.virtual,
        "schedule": cell.schedule if cell.virtual == 1 else "interleaved",
    }
    changed["deepspeed"] = f"ds_configs/zero{cell.zero.replace('-', '_')}.json"
    result = Config.model_validate(changed)
    check(result)
    resolve_batch(result, cell.data)
    build(result.parallel.schedule_name, 0, cell.pipeline, cell.virtual, cell.accumulation)
    partition(result.model, cell.pipeline * cell.virtual, SEQUENCE)
    return result


def layouts(config: Config, ranks: int) -> list[Cell]:
    """Every legal layout of so many ranks, under every kind of ZeRO."""
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    found = []
    for pipeline, data, context, tensor in itertools.product(sizes, repeat=4):
        if pipeline * data * context * tensor != ranks:
            continue
        for sequence, virtual in itertools.product((False, True)[: 1 + (tensor > 1)], (1, 2)):
            cell = Cell(pipeline, data, context, tensor, sequence, virtual)
            if _is_legal(cell, config):
                found += [replace(cell, zero=zero) for zero in ZERO]
    return found


def full(config: Config, ranks: int) -> list[Cell]:
    """Every legal layout under every kind of ZeRO, in fp32 and then in bf16; the other choices by `_vary`."""
    cells = layouts(config, ranks)
    return [cell for precision in PRECISIONS for cell in _vary(cells, (precision,))]


def quick(config: Config, ranks: int) -> list[Cell]:
    """Few cells, of up to `ranks` ranks, with every legal pair of sizes (1, 2, more) and kinds of ZeRO in one."""
    sizes = [2**power for power in range(ranks.bit_length())]
    candidates = [cell for size in sizes for cell in layouts(config, size)]
    wanted = {pair for cell in candidates for pair in _pairs(cell, LAYOUT)}
    chosen = []
    while wanted:
        # Of cells that add as many pairs for each rank, the first.
        best = max(candidates, key=lambda cell: len(_pairs(cell, LAYOUT) & wanted) / (cell.ranks + 2))
        wanted -= _pairs(best, LAYOUT)
        chosen.append(best)
    return _vary(sorted(chosen, key=lambda cell: cell.ranks), PRECISIONS)


def _vary(cells: list[Cell], precisions: tuple[str, ...]) -> list[Cell]:
    """`cells` with the other choices made such that pairs that did not occur yet do, and then in turns."""
    seen: set[tuple] = set()
    used: Counter[tuple] = Counter()
    varied = []
    for cell in cells:
        schedules = ("1f1b", "gpipe") if cell.pipeline > 1 and cell.virtual == 1 else ("1f1b",)
        choices = list(itertools.product(schedules, RECOMPUTE, precisions, VARIANTS))
        options = {choice: replace(cell, **dict(zip(CHOICES, choice, strict=True))) for choice in choices}
        best = max(choices, key=lambda choice: (len(_pairs(options[choice], AXES) - seen), -used[choice]))
        seen |= _pairs(options[best], AXES)
        used[best] += 1
        varied.append(options[best])
    return varied


@cache
def _pairs(cell: Cell, axes: tuple[str, ...]) -> frozenset:
    values = [getattr(cell, axis) for axis in axes]
    values = [min(value, 4) if isinstance(value, int) else value for value in values]
    return frozenset(itertools.combinations(zip(axes, values, strict=True), 2))


def _is_legal(cell: Cell, config: Config) -> bool:
    try:
        config_of(cell, config)
    except ConfigError:
        return False
    return True

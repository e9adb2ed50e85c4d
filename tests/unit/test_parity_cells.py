"""Which cells there are: all that are legal for a model, and the few that cover them."""

from itertools import combinations

import pytest

from megalite.config import Config
from megalite.config_check import check
from megalite.errors import ConfigError
from megalite.training.parity_cells import (
    PRECISIONS,
    RECOMPUTE,
    VARIANTS,
    ZERO,
    Cell,
    config_of,
    full,
    layouts,
    quick,
    shrink,
)

LAYOUT = ("pipeline", "data", "context", "tensor", "sequence", "virtual", "zero")


def config(**model) -> Config:
    return shrink(Config.model_validate({"model": model}))


def pairs(cells: list[Cell]) -> set:
    """Pairs of choices that go together in some cell; sizes as 1, 2 or more."""
    found = set()
    for cell in cells:
        values = [(axis, min(value, 4) if isinstance(value := getattr(cell, axis), int) else value) for axis in LAYOUT]
        found |= set(combinations(values, 2))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_quick_has_every_pair_that_is_legal(ranks):
    every = [cell for size in (1, 2, 4, 8) if size <= ranks for cell in layouts(config(), size)]
    chosen = quick(config(), ranks)
    assert pairs(chosen) == pairs(every)
    assert len(chosen) < len(every) or ranks == 1
    assert max(cell.ranks for cell in chosen) == ranks


def test_quick_has_every_other_choice():
    chosen = quick(config(), 8)
    assert len(chosen) < 50
    for axis, values in (("recompute", RECOMPUTE), ("precision", PRECISIONS), ("variant", VARIANTS)):
        for value in values:
            beside = {cell.zero for cell in chosen if getattr(cell, axis) == value}
            assert beside == set(ZERO), value
    assert {cell.schedule for cell in chosen} == {"1f1b", "gpipe"}


def test_full_has_every_layout_under_every_zero_in_both_precisions():
    cells = full(config(), 8)
    assert all(cell.ranks == 8 for cell in cells)
    where = {(*(getattr(cell, axis) for axis in LAYOUT), cell.precision) for cell in cells}
    assert len(where) == len(cells) == 2 * len(layouts(config(), 8))
    grids = {(cell.pipeline, cell.data, cell.context, cell.tensor) for cell in cells}
    assert len(grids) == 20 - 0  # ways to write 8 as a product of four sizes
    assert {(cell.tensor, cell.sequence) for cell in cells} == {(1, False)} | {
        (t, s) for t in (2, 4, 8) for s in (0, 1)
    }


def test_the_model_decides_which_are_legal():
    """Six heads in groups of three go to one or two tensor-parallel ranks, and sixteen tokens to no three."""
    cells = layouts(config(num_heads=6, num_kv_heads=2), 8)
    assert {cell.tensor for cell in cells} == {1, 2}
    with pytest.raises(ConfigError, match=r"num_heads = 6 is not divisible by parallel\.tensor = 4"):
        config_of(Cell(tensor=4), config(num_heads=6, num_kv_heads=2))


def test_a_tiny_copy_has_the_models_options():
    options = {"qk_norm": True, "tie_embeddings": False, "fused_loss": True, "dropout": 0.2, "attention": "softmax"}
    model = config(**options, num_heads=32, num_kv_heads=8, hidden_size=4096, norm_eps=1e-6, rope_theta=5e5).model
    assert {name: getattr(model, name) for name in options} == options
    assert (model.num_heads, model.kv_heads, model.norm_eps, model.rope_theta) == (8, 2, 1e-6, 5e5)
    assert model.hidden_size < 64


@pytest.mark.parametrize("cell", [Cell(), Cell(pipeline=4, virtual=2, zero="3-offload", variant="documents")], ids=str)
def test_a_cell_is_a_configuration_that_pretrain_takes(cell):
    made = config_of(cell, config())
    check(made)
    assert made.parallel.pipeline == cell.pipeline
    assert made.data.mask_documents == (cell.variant == "documents")


def test_names_tell_cells_apart():
    cells = full(config(), 8)
    assert len({str(cell) for cell in cells}) == len(cells)
    cell = Cell(2, 2, 2, 2, True, 1, "gpipe", "3-offload", "full", "bf16", "dropout")
    assert str(cell) == "tp2+sp pp2 cp2 dp2 zero3-offload gpipe full bf16 dropout"

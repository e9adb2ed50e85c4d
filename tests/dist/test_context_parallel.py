"""Context parallelism through DeepSpeed's Ulysses attention, alone and with tensor parallelism, beside one process."""

import os
import sys

import pytest

from megalite.topology import Grid
from tests.dist.harness import run_ranks
from tests.dist.layouts import Layout, assert_equal_to_one_process, assert_replicas_are_equal, loss_and_gradients

pytestmark = pytest.mark.dist

RANKS = 4
PACKED = {"documents": True}
# By the sizes of context and tensor parallelism.
CASES = {
    (4, 1): {
        "key/value heads for each rank": {"num_kv_heads": 4},
        "two key/value heads": {"qk_norm": True, "tie_embeddings": False},
        "one key/value head": PACKED | {"num_kv_heads": 1, "checkpointing": "selective"},
        "full": PACKED | {"checkpointing": "full", "fused_loss": True},
        "bf16": {"bf16": True, "checkpointing": "offload"},
    },
    (2, 2): {
        "key/value heads for each rank": {"num_kv_heads": 4, "qk_norm": True},
        "two key/value heads": PACKED | {"attention": "softmax", "checkpointing": "full"},
        "one key/value head": {"num_kv_heads": 1, "checkpointing": "selective", "tie_embeddings": False},
        "sequence": {"sequence": True, "qk_norm": True, "checkpointing": "selective"},
        "sequence, documents": PACKED | {"sequence": True, "num_kv_heads": 1, "fused_loss": True},
    },
}


def every_case() -> dict[str, dict]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from megalite.training.engine import deepspeed, ulysses

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # as the engine does
    deepspeed.init_distributed(verbose=False)
    results = {}
    for context, tensor in CASES:
        layout = Layout(Grid.of(RANKS, context=context, tensor=tensor), ulysses)
        for name, case in CASES[context, tensor].items():
            results[f"{context} {tensor} {name}"] = loss_and_gradients(case, layout)
    return results


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict]]:
    return run_ranks(every_case, RANKS, timeout=180)


def of_case(ranks: list[dict[str, dict]], sizes: tuple[int, int], case: str) -> list[dict]:
    return [results[f"{sizes[0]} {sizes[1]} {case}"] for results in ranks]


@pytest.mark.parametrize(("sizes", "case"), [(sizes, case) for sizes in CASES for case in CASES[sizes]], ids=str)
def test_ranks_compute_what_one_process_does(ranks, sizes, case):
    assert_equal_to_one_process(of_case(ranks, sizes, case), sizes[1], CASES[sizes][case])


@pytest.mark.parametrize("case", CASES[2, 2])
def test_what_is_replicated_has_the_same_gradient_to_the_bit(ranks, case):
    """Among the ranks of a tensor group; those of a context group have different tokens, and their sums are added."""
    assert_replicas_are_equal(of_case(ranks, (2, 2), case), 2)

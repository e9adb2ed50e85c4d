"""Messages between stages: which come, in which order, from where; and what happens where stages disagree."""

import pytest
import torch
import torch.distributed as dist

from megalite.comms.p2p import Link
from tests.dist.harness import RankFailure, run_ranks

pytestmark = pytest.mark.dist


def link(ranks: list[int], wraps: bool = True) -> Link:
    stage = ranks.index(dist.get_rank())
    return Link(ranks, stage, dist.new_group, torch.device("cpu"), wraps)


def pass_on(dtype: torch.dtype) -> list:
    """Two messages forward around the ring and one back, asked for early and in another order than they are waited for."""
    n = dist.get_world_size()
    ranks = list(reversed(range(n)))  # stages need not be in the order of ranks
    ring = link(ranks)
    ring.agree((2, 3), dtype)
    before, after = (ring.stage - 1) % n, (ring.stage + 1) % n
    first, second = (ring.receive((2, 3), dtype, before, "forward", tag) for tag in (0, 1))
    back = ring.receive((2, 3), dtype, after, "backward", 7)
    for tag in (0, 1):
        # Sent from a view that is not contiguous.
        ring.send(torch.full((3, 2), 10.0 * ring.stage + tag, dtype=dtype).t(), after, "forward", tag)
    ring.send(torch.full((2, 3), -1.0 - ring.stage, dtype=dtype), before, "backward", 7)
    got = [wait().float().unique().tolist() for wait in (second, back, first)]
    ring.finish()
    return [ring.stage, got]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_messages_arrive_by_tag_and_direction(size, dtype):
    for stage, got in run_ranks(pass_on, size, dtype):
        before, after = (stage - 1) % size, (stage + 1) % size
        assert got == [[10.0 * before + 1], [-1.0 - after], [10.0 * before]]


def disagree(what: str) -> None:
    pair = link([0, 1], wraps=False)
    shape, dtype = (4, 1, 8), torch.float32
    if dist.get_rank() == 1:
        shape, dtype = ((2, 1, 8), dtype) if what == "shape" else (shape, torch.bfloat16)
    pair.agree(shape, dtype)


@pytest.mark.parametrize(("what", "told"), [("shape", r"\[0, 3, 2, 1, 8\]"), ("dtype", r"\[1, 3, 4, 1, 8\]")])
def test_stages_that_take_messages_for_something_else_are_stopped(what, told):
    with pytest.raises(RankFailure, match=rf"stage 0 sends messages of .* \[0, 3, 4, 1, 8\], but stage 1 takes {told}"):
        run_ranks(disagree, 2, what)

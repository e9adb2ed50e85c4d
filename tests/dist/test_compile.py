"""Compiled blocks: the same training, one graph for all blocks, nothing compiled after warm-up, under every ZeRO."""

import json
import os
import shutil
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.dist.conftest import REPOSITORY, free_port
from tests.dist.harness import run_ranks

pytestmark = pytest.mark.dist

LAYERS = 9  # more than the 8 graphs that torch keeps of one function: with one a block, the last would not be compiled
MODEL = {"vocab_size": 64, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "num_kv_heads": 2}
# (ZeRO's stage, precision), and how what each block keeps is to be treated
CASES = [((0, "bf16"), "none"), ((1, "fp32"), "full")]
CASES += [((3, "fp32"), mode) for mode in ("none", "selective", "offload")]


def train(topology, zero: int, precision: str, mode: str, compile: str) -> dict[str, float | list[float]]:
    """Three steps of two micro-batches, with an evaluation after the first."""
    from torch._dynamo.utils import counters

    from megalite.config import Config
    from megalite.data.batch import Batch
    from megalite.model.gpt import Stage
    from megalite.training.engine import DTYPES, Engine

    training = {"precision": precision, "per_device_train_batch_size": 2, "compile": compile}
    settings = {"model": MODEL | {"intermediate_size": 96, "n_positions": 32}, "training": training}
    config = Config.model_validate(settings)
    ds_config = json.loads((REPOSITORY / "ds_configs" / f"zero{zero}.json").read_text())
    if zero == 3:  # every parameter is partitioned
        small = {"param_persistence_threshold": 0, "prefetch_bucket_size": 3000, "max_live_parameters": 10000}
        ds_config["zero_optimization"] |= {f"stage3_{key}": value for key, value in small.items()}

    def build_chunks(attend) -> list[Stage]:
        return [Stage(config.model, seed=1, activation_checkpointing=mode, init_rounding=DTYPES[precision])]

    torch._dynamo.reset()
    counters.clear()
    engine = Engine(config, ds_config, topology, build_chunks, 2)
    generator = torch.Generator().manual_seed(topology.rank)
    losses, norms = [], []

    def batch() -> Batch:
        return Batch.from_windows(torch.randint(64, (2, 33), generator=generator).numpy())

    for step in range(3):
        torch.compiler.set_stance("fail_on_recompile" if step else "default")
        engine.begin_step()
        for micro_step in range(2):
            loss = engine.forward(0, batch())
            engine.backward(loss / 128, micro_step == 1)
            losses.append(loss.item())
        norms.append(engine.step(1e-3)[0])
        with engine.evaluation(), torch.no_grad():
            losses.append(engine.forward(0, batch()).item())
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        engine.forward(0, batch())
    torch.compiler.set_stance("default")
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return {"losses": losses, "norms": norms, "graphs": graphs, "breaks": breaks, "kept": sum(kept.values())}


def train_all(port: int) -> dict:
    """Results of a run by (ZeRO's stage, precision) for eager ones, and by case for compiled ones."""
    from megalite.topology import LaunchEnvironment, Topology
    from megalite.training import engine

    rank = dist.get_rank()
    dist.destroy_process_group()  # the topology makes its own
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    topology = Topology(LaunchEnvironment.read(), timeout=timedelta(minutes=2))
    engine.COMPILER = "aot_eager"  # all of torch.compile but the code that it would generate, which takes long
    results: dict = {}
    for kind, mode in CASES:
        if kind not in results:
            results[kind] = train(topology, *kind, "none", "none")
        results[kind, mode] = train(topology, *kind, mode, "blocks")
    return results


@pytest.fixture(scope="module")
def results() -> dict:
    return run_ranks(train_all, 2, free_port(), timeout=240)[0]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiled_equals_eager(results, case):
    eager, compiled = results[case[0]], results[case]
    # The same operators in fp32, fused in no other order; bf16's rounding may move with a cast.
    relative = 1e-5 if case[0][1] == "fp32" else 2e-3
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=relative)
    assert compiled["norms"] == pytest.approx(eager["norms"], rel=10 * relative)
    assert len(set(eager["losses"])) == 9


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_graph_for_all_blocks_and_another_for_evaluation(results, case):
    """And no third later: the last two steps would have failed."""
    assert results[case[0]]["graphs"] == 0
    assert (results[case]["graphs"], results[case]["breaks"]) == (2, 0)


def test_compiled_blocks_keep_what_the_mode_says(results):
    """Under ZeRO-3 not even the gathered parameters: fewer bytes than the blocks have of them."""
    kept = {mode: results[kind, mode]["kept"] for kind, mode in CASES if kind[0] == 3}
    assert kept["selective"] < 0.8 * kept["none"]
    assert kept["none"] < 1.1 * results[3, "fp32"]["kept"]


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_the_program_compiles(job):
    short = ("--max-steps", "3", "--warmup-steps", "0")
    compiled = job.train("compiled", *short, "--compile", "blocks")
    eager = job.train("eager", *short)
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in eager], rel=1e-4)
    assert compiled[0]["step_seconds"] > 3 * compiled[2]["step_seconds"]  # it was compiled, once

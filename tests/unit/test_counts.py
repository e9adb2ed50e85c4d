"""Parameter, FLOP and memory counts; and every shipped config, built without memory on the meta device."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from megalite.config import ModelConfig
from megalite.config_check import check
from megalite.config_loader import load_config
from megalite.kernels.linear_cross_entropy import _CHUNK_BYTES
from megalite.model.flops import FUSED_LOSS_CHUNK, count_parameters, flops_per_token, peak_tflops, predict_memory
from megalite.model.gpt import Stage

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
EVERY_CONFIG = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
LLAMA_3_8B = ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    intermediate_size=14336,
    n_positions=8192,
    tie_embeddings=False,
)


def stored_parameters(model: ModelConfig) -> int:
    """What the built model holds, without the rows of padding."""
    with torch.device("meta"):
        stage = Stage(model, seed=0)
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    return sum(p.numel() for p in stage.parameters()) - padding * (1 if model.tie_embeddings else 2)


def test_there_are_configs():
    assert CONFIGS


@EVERY_CONFIG
def test_config_is_legal(path):
    config = load_config(["--config", str(path)]).config
    if not config.data.train_files:
        config.data.train_files = ["corpus"]
    check(config)


@EVERY_CONFIG
def test_count_parameters_of_every_config(path):
    model = load_config(["--config", str(path)]).config.model
    assert count_parameters(model) == stored_parameters(model)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_count_parameters_of_uncommon_shapes(tied, qk_norm):
    model = ModelConfig(
        vocab_size=1001,
        vocab_multiple=64,
        hidden_size=60,
        num_layers=3,
        num_heads=6,
        num_kv_heads=2,
        head_dim=14,
        intermediate_size=70,
        tie_embeddings=tied,
        qk_norm=qk_norm,
    )
    assert count_parameters(model) == stored_parameters(model)


def test_llama_3_8b_has_the_published_number_of_parameters():
    assert count_parameters(LLAMA_3_8B) == 8_030_261_248  # the model card's weights, summed


def test_flops_per_token_by_hand():
    """Two FLOPs a multiply-add, and backward costs twice forward: 6 for each weight that a token meets."""
    h, n_kv, d, f, v, layers, s = 4096, 8, 128, 14336, 128256, 32, 8192
    weights = layers * (2 * h * h + 2 * h * n_kv * d + 3 * h * f + 2 * h) + h + v * h  # the look-up is no product
    attention = layers * 2 * 2 * 3 * s * h  # q k^T and p v, all s keys: the convention leaves causality out
    assert flops_per_token(LLAMA_3_8B, s) == 6 * weights + attention


def test_flops_count_the_head_tied_or_not_and_no_padding():
    tied = LLAMA_3_8B.model_copy(update={"tie_embeddings": True})
    assert flops_per_token(tied, 1024) == flops_per_token(LLAMA_3_8B, 1024)
    padded = LLAMA_3_8B.model_copy(update={"vocab_multiple": 4096})
    assert flops_per_token(padded, 1024) == flops_per_token(LLAMA_3_8B, 1024)


def test_flops_of_attention_follow_head_dim_and_sequence():
    wide = ModelConfig(hidden_size=64, num_heads=4, head_dim=32)
    assert flops_per_token(wide, 200) - flops_per_token(wide, 100) == 12 * wide.num_layers * 4 * 32 * 100


def memory(**changes) -> dict[str, float]:
    settings = {
        "zero_stage": 1,
        "offload": False,
        "data_parallel": 8,
        "low_precision": True,
        "micro_batch": 2,
        "sequence": 1024,
        "recompute": "none",
    }
    return predict_memory(LLAMA_3_8B, **(settings | changes))


@pytest.mark.parametrize("low_precision", [True, False])
@pytest.mark.parametrize("data_parallel", [2, 8, 64])
def test_each_zero_stage_needs_less(low_precision, data_parallel):
    """From two ranks on. (On one, ZeRO shares nothing and has a second copy of the weights.)"""
    states = [
        memory(zero_stage=z, low_precision=low_precision, data_parallel=data_parallel)["states"] for z in range(4)
    ]
    assert all(later < earlier for earlier, later in pairwise(states))


def test_states_by_hand():
    """bf16: 2 weight + 4 gradient + 12 fp32 weight and moments; plain fp32: 4 + 4 + 8. (ZeRO's paper, section 3.)"""
    n = count_parameters(LLAMA_3_8B)
    assert memory(zero_stage=0, low_precision=False)["states"] == 16 * n
    assert memory(zero_stage=1)["states"] == (2 + 4 + 12 / 8) * n
    assert memory(zero_stage=2)["states"] == (2 + 4 / 8 + 12 / 8) * n
    assert memory(zero_stage=3)["states"] == (2 + 4 + 12) / 8 * n
    assert memory(zero_stage=2, offload=True)["states"] == (2 + 4 / 8) * n


def test_the_head_by_hand():
    """Of bf16 logits their gradient takes the place. Fused: 512 MiB of them, and the gradients of weight and input."""
    tokens, vocabulary, h = 2 * 1024, 128256, 4096
    fused = LLAMA_3_8B.model_copy(update={"fused_loss": True})
    most, least = (
        predict_memory(
            model, zero_stage=1, offload=False, data_parallel=8, low_precision=True, micro_batch=16, sequence=1024,
            recompute="none",
        )["activations"]
        for model in (LLAMA_3_8B, fused)
    )  # fmt: skip
    assert most - least == pytest.approx(
        8 * tokens * vocabulary * 2 - (2**29 + 4 * vocabulary * h + 8 * tokens * h * 2), rel=1e-9
    )
    assert FUSED_LOSS_CHUNK == _CHUNK_BYTES


def test_recomputation_keeps_less_and_more_tokens_keep_more():
    kept = [memory(recompute=mode)["activations"] for mode in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] > 0
    assert memory(micro_batch=4)["activations"] == pytest.approx(2 * kept[0])
    assert memory()["total"] == memory()["states"] + memory()["activations"]


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GeForce RTX 4090", 165.0),
        ("NVIDIA RTX A1000 Laptop GPU", None),  # not an A100
        ("NVIDIA A10", None),
        ("Some Other Device", None),
        ("", None),
    ],
)
def test_peak_tflops(device, peak):
    assert peak_tflops(device) == peak


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_parallel_layouts_divide(recompute):
    whole = memory(recompute=recompute)
    for layout in ({"tensor": 2, "pipeline": 2}, {"tensor": 4, "sequence_parallel": True}):
        assert memory(recompute=recompute, **layout)["states"] == whole["states"] / 4
    half = memory(recompute=recompute, context=2)
    assert (half["states"], half["activations"]) == (whole["states"], whole["activations"] / 2)
    # Sequence parallelism divides all that tensor parallelism leaves whole.
    split = memory(recompute=recompute, tensor=4, sequence_parallel=True)["activations"]
    assert split == whole["activations"] / 4
    assert split < memory(recompute=recompute, tensor=4)["activations"] < whole["activations"]

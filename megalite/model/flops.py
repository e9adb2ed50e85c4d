"""What a model costs: parameters, FLOPs of a token, bytes of memory. Pure arithmetic on the config; no torch."""

import re

from megalite.config import ModelConfig

# Dense bf16 peak of a device, TFLOP/s, from NVIDIA's data sheets (without sparsity), by a part of its name.
PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A10G": 70.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}

FUSED_LOSS_CHUNK = 2**29  # bytes of logits at a time on a GPU (kernels/linear_cross_entropy.py)


def peak_tflops(device_name: str) -> float | None:
    """The peak of the first entry above that is a word of `device_name` (an A1000 is no A100); None if none is."""
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def count_parameters(model: ModelConfig) -> int:
    """Parameters without the padding of the vocabulary; a tied head counts once."""
    h, d = model.hidden_size, model.head_size
    attention = h * d * (2 * model.num_heads + 2 * model.kv_heads) + (2 * d if model.qk_norm else 0)
    block = attention + 3 * h * model.ffn_size + 2 * h
    embeddings = model.vocab_size * h * (1 if model.tie_embeddings else 2)
    return model.num_layers * block + embeddings + h


def flops_per_token(model: ModelConfig, sequence: int) -> float:
    """Forward and backward of one token: 6 N + 12 L (n d) s (PaLM, arXiv:2204.02311, appendix B).

    N counts the matrix of the head, tied or not, and not the embedding's look-up. Attention counts as if it were not
    causal, and recomputation does not count: the usual convention of MFU.
    """
    look_up = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    matrices = count_parameters(model) - look_up
    return 6.0 * matrices + 12.0 * model.num_layers * model.num_heads * model.head_size * sequence


def predict_memory(
    model: ModelConfig,
    *,
    zero_stage: int,
    offload: bool,
    data_parallel: int,
    low_precision: bool,
    micro_batch: int,
    sequence: int,
    recompute: str,
    tensor: int = 1,
    sequence_parallel: bool = False,
    context: int = 1,
    pipeline: int = 1,
) -> dict[str, float]:
    """Predicted peak bytes on one device: {"states", "activations", "total"}, and "host": activations moved there.

    data_parallel: ranks that ZeRO divides among. States: ZeRO (arXiv:1910.02054, section 3), with fp32 gradient
    accumulation, of an even share of the model. Activations: what autograd keeps of each block, counted in the layers'
    own operators, and the head's, as it runs on a GPU; of a pipeline, what 1f1b's first stage holds, with as many
    micro-batches alive as there are stages. Allocator slack and communication buckets are not in it.
    """
    parameters = count_parameters(model) / (tensor * pipeline)
    width = 2 if low_precision and zero_stage > 0 else 4
    split = [data_parallel if zero_stage >= stage else 1 for stage in (1, 2, 3)]
    optimizer = 0 if offload else (8 + (4 if zero_stage > 0 else 0)) * parameters / split[0]
    states = width * parameters / split[2] + 4 * parameters / split[1] + optimizer

    tokens = micro_batch * sequence / context
    act = 2 if low_precision else 4
    h, d, f = model.hidden_size, model.head_size, model.ffn_size
    heads = model.num_heads * d
    kv = model.kv_heads * d
    between = h / (tensor if sequence_parallel else 1)  # of a token, on this rank, between the split layers
    matmuls = (heads + 2 * kv + heads + 2 * f) / tensor + 2 * between  # qkv, attention, gate_up; output, down
    cheap = (heads + kv + 2 * f) / tensor + 4 * between  # RoPE, SwiGLU; norms, residual sums
    if model.attention == "softmax":
        cheap += model.num_heads * sequence / tensor  # the probabilities
    kept = {"none": matmuls + cheap, "selective": matmuls + between, "full": between, "offload": 0}[recompute]
    working = matmuls + cheap if recompute != "none" else 0
    vocabulary = model.padded_vocab_size / tensor
    head = act * tokens * vocabulary  # the logits, whose gradient takes their place
    if model.fused_loss:  # a chunk of them, and the gradients of the head's weight, in fp32, and input
        head = min(head, FUSED_LOSS_CHUNK) + 4 * vocabulary * h + act * tokens * h
    activations = act * tokens * (kept * model.num_layers + working) + head
    host = tokens * act * (matmuls + cheap) * model.num_layers if recompute == "offload" else 0
    return {
        "states": states,
        "activations": float(activations),
        "total": states + activations,
        "host": float(host),
    }

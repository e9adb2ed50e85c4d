"""The configuration: typed sections. Imports no torch.

Each field's description is its manual: `--help` is generated from this file. How values are read from YAML and the
command line is in `config_loader.py`, what goes together in `config_check.py`; precedence is defaults < YAML < command
line.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
SetName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]+$")]  # becomes the name of a metric
KernelChoice = Literal["auto", "triton", "torch"]
KernelName = Annotated[str, StringConstraints(pattern=r"^[a-z_]+$")]


class Section(BaseModel):
    """Strict: unknown keys and wrong types are errors, nothing is coerced; nan and inf are no settings."""

    model_config = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(Section):
    vocab_size: PositiveInt = Field(32000, description="Token ids that exist; at least the tokenizer's vocabulary.")
    vocab_multiple: PositiveInt = Field(
        128, description="The embedding is padded to a multiple of this for fast matmuls; padding is never predicted."
    )
    hidden_size: PositiveInt = Field(768, description="Width of the residual stream.")
    num_layers: PositiveInt = Field(12, description="Number of decoder blocks.")
    num_heads: PositiveInt = Field(12, description="Number of query heads.")
    num_kv_heads: PositiveInt | None = Field(None, description="Number of key/value heads (GQA); default: num_heads.")
    head_dim: PositiveInt | None = Field(None, description="Width of one head; default: hidden_size / num_heads.")
    intermediate_size: PositiveInt | None = Field(
        None, description="Width of the SwiGLU MLP; default: 8/3 of hidden_size, rounded up to a multiple of 128."
    )
    n_positions: PositiveInt = Field(1024, description="Longest context, in tokens, that the model is built for.")
    rope_theta: Annotated[float, Field(gt=0)] = Field(10000.0, description="Base of the rotary embedding.")
    norm_eps: Annotated[float, Field(gt=0)] = Field(1e-5, description="Epsilon of RMSNorm.")
    qk_norm: bool = Field(False, description="RMSNorm on each head's queries and keys, before RoPE (Qwen3).")
    attention: Literal["auto", "sdpa", "varlen", "softmax"] = Field(
        "auto",
        description="How attention is computed; the results are the same. sdpa: torch's fused kernels. varlen: each "
        "document by itself, in one call on a GPU (bf16 or fp16), in a call a document on the CPU; with a key/value "
        "cache it is sdpa. softmax: all probabilities are made, by our softmax. auto: varlen for documents where it "
        "can be, else sdpa.",
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Dropped, in training, of the embedding and of what each attention and MLP adds."
    )
    tie_embeddings: bool = Field(True, description="The output head shares the token embedding's weight.")
    init_std: Annotated[float, Field(gt=0)] = Field(
        0.02, description="Standard deviation of the initial weights; output projections get it / sqrt(2 * num_layers)."
    )
    fused_loss: bool = Field(
        False,
        description="Compute the head and its loss chunk by chunk, never holding all logits: less memory, the same "
        "numbers.",
    )
    kernels: KernelChoice | dict[KernelName, str] = Field(
        "auto",
        description="What runs the fused operators. auto: Triton on a GPU, torch on a CPU. In YAML also {NAME: CHOICE} "
        "for some of them (rms_norm, rope, swiglu, softmax, cross_entropy, linear_cross_entropy), others auto.",
    )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def ffn_size(self) -> int:
        return self.intermediate_size or -(-self.hidden_size * 8 // 3 // 128) * 128

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


class BlendEntry(Section):
    prefix: str = Field(min_length=1, description="What an entry of train_files may be: indexed data, a glob, text.")
    weight: Annotated[float, Field(gt=0)] = Field(
        description="Its part of the samples, beside the others': 0.7 and 0.3, 7 and 3, or numbers of tokens."
    )


class DataConfig(Section):
    train_files: list[str] = Field(
        [], description="Paths or globs to train on: indexed data (PREFIX or PREFIX.bin) or text (.txt, .jsonl)."
    )
    blend: list[BlendEntry] = Field(
        [],
        description="Instead of train_files: what to train on, and each one's part of the samples. On the command "
        "line: --blend PATH=0.7 PATH=0.3.",
    )
    eval_files: list[str] | dict[SetName, list[str]] = Field(
        [],
        description="The same as train_files for validation; empty: no evaluation. Several sets, each with its own "
        "loss, by name: {NAME: [PATH, ...], ...}, on the command line --eval-files NAME=PATH NAME=PATH (./A=B for a "
        "path of that form).",
    )
    tokenizer_dir: str = Field("artifacts/tokenizer", description="Folder of the tokenizer (tokenizer.json).")
    block_size: PositiveInt = Field(1024, description="Tokens in one training sequence; at most model.n_positions.")
    reset_positions: bool = Field(False, description="Positions restart at 0 in each document of a window.")
    mask_documents: bool = Field(False, description="Tokens attend only within their own document.")
    format: Literal["indexed", "text", "jsonl"] = Field(
        "indexed",
        description="indexed: train on indexed data, and on text once that is indexed. text, jsonl: train straight "
        "from .txt or .jsonl files, which are tokenized meanwhile.",
    )
    json_key: str = Field("text", description="The field of a .jsonl line that holds the text.")
    split_on: Literal["none", "blank", "line"] = Field(
        "none", description="What is one document in a .txt: the whole file, what stands between blank lines, a line."
    )
    shuffle_buffer: PositiveInt = Field(
        8192, description="format text or jsonl: sequences over all ranks that are held to be shuffled."
    )
    cache_dir: str = Field(
        "artifacts/data/cache", description="Where text given as train_files or eval_files is indexed, once."
    )
    num_workers: PositiveInt = Field(
        2, description="Processes that tokenize: into cache_dir; for format text or jsonl on each rank."
    )
    prefetch: PositiveInt = Field(2, description="Steps whose batches are prepared ahead, beside training.")
    allow_changed_data: bool = Field(
        False, description="Resume on other data, blend or block_size than the checkpoint's, at the same sample number."
    )

    @property
    def eval_sets(self) -> dict[str, list[str]]:
        """Files of each validation set by name; the name is empty where they were given as a list."""
        if isinstance(self.eval_files, dict):
            return self.eval_files
        return {"": self.eval_files} if self.eval_files else {}


class TrainingConfig(Section):
    seed: Annotated[int, Field(ge=0)] = Field(1234, description="Seed of initial weights and of the order of the data.")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "bf16", description="Arithmetic of forward and backward; weights and optimizer are fp32. fp16 needs a GPU."
    )
    per_device_train_batch_size: PositiveInt = Field(8, description="Sequences in one micro-batch on one device.")
    gradient_accumulation_steps: PositiveInt | None = Field(
        None, description="Micro-batches of one step on one device; default: from global_batch_size, else 1."
    )
    global_batch_size: PositiveInt | None = Field(
        None, description="Sequences in one step over all devices; default: from gradient_accumulation_steps."
    )
    max_steps: PositiveInt | None = Field(None, description="Optimizer steps to train for.")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the training data to train for, instead of max_steps."
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="Peak learning rate.")
    min_learning_rate: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Learning rate at the end of the schedule (cosine, linear, wsd)."
    )
    lr_schedule: Literal["cosine", "linear", "constant", "wsd"] = Field(
        "cosine", description="Shape after the warm-up; wsd: constant, then a linear decay over the last decay_steps."
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps of linear warm-up from 0; may be longer than a short trial run."
    )
    decay_steps: PositiveInt | None = Field(None, description="Length of wsd's decay; default: a tenth of the run.")
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: Muon for the blocks' matrices, AdamW for the rest, at one learning rate; ZeRO-0."
    )
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="Muon's decay of its momentum.")
    muon_scale: Annotated[float, Field(gt=0)] = Field(
        0.2, description="Root mean square of Muon's update, over the learning rate; AdamW's is about 0.2."
    )
    muon_steps: Annotated[int, Field(ge=1, le=20)] = Field(5, description="Newton-Schulz iterations of Muon.")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.1, description="Decay of the weights, on matrices only.")
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="AdamW's decay of the first moment.")
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="AdamW's decay of the second moment.")
    adam_eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's epsilon.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="Clip the global gradient norm; 0: don't.")
    z_loss: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Weight of log(Z)^2 in the training loss (PaLM); evaluation never includes it."
    )
    activation_checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        "none",
        description="Recompute in backward: nothing, what is cheap (matmul outputs are kept), or every block. offload: "
        "recompute nothing, and keep what backward needs in the host's memory.",
    )
    compile: Literal["none", "blocks"] = Field(
        "none", description="blocks: torch.compile each block, one graph for all; the first steps take long."
    )
    eval_every: PositiveInt | None = Field(None, description="Evaluate each N steps; always at the end.")
    eval_sequences: PositiveInt | None = Field(
        None, description="Sequences evaluated of each validation set, evenly spread over it; default: all of it."
    )
    timeout_minutes: Annotated[float, Field(gt=0)] = Field(
        30.0, description="A rank that waits longer for another ends the run, naming the one that it waits for."
    )


class ParallelConfig(Section):
    """What is left of the ranks is data parallel."""

    tensor: PositiveInt = Field(1, description="Tensor-parallel size: ranks that share each layer.")
    sequence: bool = Field(
        False,
        description="Between the layers that tensor-parallel ranks share, each holds its part of the sequence "
        "(sequence parallelism): less memory, the same traffic.",
    )
    context: PositiveInt = Field(1, description="Ranks that share each sequence (DeepSpeed-Ulysses), for long ones.")
    pipeline: PositiveInt = Field(1, description="Pipeline stages: ranks that hold consecutive layers.")
    virtual: PositiveInt = Field(
        1, description="Parts of the model on each stage, in turns: a smaller bubble, more messages (interleaved)."
    )
    schedule: Literal["auto", "gpipe", "1f1b", "interleaved"] = Field(
        "auto",
        description="Order of the micro-batches' forwards and backwards on a stage. auto: interleaved where virtual is "
        "above 1, else 1f1b. gpipe: all forwards first, with all their activations alive.",
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="Decoder layers of each of the pipeline * virtual parts, in the model's order; default: balanced "
        "by FLOPs, the head counted.",
    )

    @property
    def schedule_name(self) -> str:
        if self.schedule == "auto":
            return "interleaved" if self.virtual > 1 else "1f1b"
        return self.schedule


class CheckpointConfig(Section):
    output_dir: str = Field("artifacts/checkpoints", description="Folder of the run's checkpoints.")
    save_every: PositiveInt | None = Field(None, description="Save each N steps; always at the end.")
    keep_last: PositiveInt = Field(3, description="How many of the newest checkpoints stay.")
    keep_every: PositiveInt | None = Field(None, description="Checkpoints of each N steps stay for good, besides.")
    resume: str = Field(
        "auto",
        description="auto: go on from the newest in output_dir, if any. A step-N folder: branch off from that. none: "
        "start afresh, moving what is in output_dir aside (so for the first start only).",
    )
    resume_fallback: bool = Field(
        False, description="Where the newest checkpoint is damaged, go on from the one before, and say so."
    )
    init_from: str | None = Field(
        None, description="A checkpoint, or an imported model, whose weights a new run starts from, and nothing else."
    )


class LoggingConfig(Section):
    run_dir: str | None = Field(
        None, description="Folder of metrics.jsonl and TensorBoard; default: runs/NAME, NAME from output_dir."
    )
    log_every: PositiveInt = Field(10, description="Print a line each N steps; metrics.jsonl has every step.")
    tensorboard: bool = Field(True, description="Write TensorBoard event files under run_dir.")
    deepspeed_level: Literal["debug", "info", "warning", "error"] = Field(
        "error", description="Least severe message of DeepSpeed's own log that is shown."
    )


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    deepspeed: str = Field(
        "ds_configs/zero1.json", description="DeepSpeed settings; --zero 0..3 picks ds_configs/zeroN.json."
    )

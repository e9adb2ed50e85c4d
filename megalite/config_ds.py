"""DeepSpeed's settings file: only what DeepSpeed alone decides; the rest follows from our own configuration."""

import json
from pathlib import Path
from typing import Any, NoReturn

from megalite.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent

# DeepSpeed's key -> the key of ours that decides it.
DERIVED = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.per_device_train_batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation_steps",
    "managed_gradient_accumulation": "training.gradient_accumulation_steps",
    "optimizer": "training.learning_rate, adam_*, weight_decay",
    "scheduler": "training.lr_schedule",
    "bf16": "training.precision",
    "bfloat16": "training.precision",
    "fp16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "data_types": "training.precision",
    "gradient_clipping": "training.max_grad_norm",
    "activation_checkpointing": "training.activation_checkpointing",
    "pipeline": "parallel.pipeline",
    "tensor_parallel": "parallel.tensor",
}


def find_ds_config(path: str) -> Path:
    """The file of that name, relative to the working directory or else to the repository; ConfigError if none."""
    for candidate in (Path(path), REPOSITORY / path):
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(f"ds_configs/{file.name}" for file in (REPOSITORY / "ds_configs").glob("*.json")))
    raise ConfigError(f"deepspeed: {path}: no such file; there are {known or 'none'}")


def read_ds_config(path: str) -> dict[str, Any]:
    """Read DeepSpeed settings (found as `find_ds_config` does) without the values "auto", which MegaLite fills in.

    ConfigError, a line for each problem: not strict JSON, a key that MegaLite derives, a setting that breaks training.
    """
    text = _read(path)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for name, value in items:
            if name in seen:
                raise ConfigError(f"{path}: {name}: given twice; keep one of the two")
            seen[name] = value
        return seen

    def constant(name: str) -> NoReturn:
        raise ConfigError(f"{path}: {name} is not JSON; write a number")

    try:
        settings = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (RecursionError, ValueError) as error:  # nested too deep; an integer of thousands of digits
        raise ConfigError(f"{path}: not JSON that can be read: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f'{path}: got {type(settings).__name__}, wants an object such as {{"zero_optimization": ...}}'
        )
    settings = _drop_auto(settings)
    problems = [
        f'{key} is decided by MegaLite ({own}); remove it or write "auto"'
        for key, own in DERIVED.items()
        if key in settings
    ]
    problems += _unsafe(settings)
    if problems:
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems))
    return settings


def _read(path: str) -> str:
    try:
        return find_ds_config(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"deepspeed: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from error


def _drop_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """Without "auto" (Hugging Face's way to leave a value to the trainer), nor objects that held nothing else."""
    kept = {}
    for name, value in settings.items():
        inner = _drop_auto(value) if isinstance(value, dict) else value
        if inner != "auto" and (inner != {} or value == {}):
            kept[name] = inner
    return kept


# What divides or reduces among neighbouring ranks first, which hold other tensor-parallel parts: settings, and their
# values when it is off.
_NEIGHBOURS = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}


def _unsafe(settings: dict[str, Any]) -> list[str]:
    """Settings under which the result is wrong, or that were never tested."""
    problems = []
    if settings.get("gradient_predivide_factor", 1) != 1:
        problems.append("gradient_predivide_factor: the gradient norm would be wrong; remove it")
    if settings.get("gradient_allreduce_op", "mean") != "mean":
        problems.append("gradient_allreduce_op: the loss is normalised for mean; remove it")
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*problems, 'zero_optimization: wants an object such as {"stage": 1}']
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in range(4):
        problems.append(f"zero_optimization.stage: got {json.dumps(stage)}, wants 0 | 1 | 2 | 3")
    if zero.get("round_robin_gradients"):
        problems.append("zero_optimization.round_robin_gradients: checkpoints would hold wrong weights; remove it")
    if zero.get("compute_grad_norm") is False:
        problems.append("zero_optimization.compute_grad_norm: clipping and metrics need the norm; remove it")
    for key, off in _NEIGHBOURS.items():
        if zero.get(key, off) != off:
            problems.append(f"zero_optimization.{key}: got {json.dumps(zero[key])}, and is not supported; remove it")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero:
            problems.append(f"zero_optimization.{old}: is deprecated; remove it (today's name is {new})")
    if _device(zero.get("offload_param")) != "none":
        problems.append("zero_optimization.offload_param: not supported; remove it (offload_optimizer is)")
    device = _device(zero.get("offload_optimizer"))
    if device not in ("none", "cpu"):
        problems.append(f"zero_optimization.offload_optimizer.device: got {json.dumps(device)}, wants none | cpu")
    elif device == "cpu" and stage == 0:
        problems.append("zero_optimization.offload_optimizer: needs zero_optimization.stage 1, 2 or 3")
    return problems


def _device(offload: Any) -> Any:
    """Where an offload section puts things; as in DeepSpeed, no section or no device means none."""
    if offload is None:
        return "none"
    return offload.get("device", "none") if isinstance(offload, dict) else offload

"""What a configuration asks of ZeRO and of this machine, checked once both are known."""

import importlib.util

from megalite.config import Config
from megalite.errors import ConfigError


def zero_stage(ds_config: dict) -> int:
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def check_training(config: Config, zero_stage: int, device: str) -> None:
    """Refuse, with a ConfigError, what does not go together on this type of device under this stage of ZeRO."""
    training = config.training
    _check_precision(training.precision, zero_stage, device)
    if training.optimizer == "muon" and zero_stage:
        raise ConfigError(
            f"training.optimizer: muon works on whole matrices, of which ZeRO-{zero_stage} gives each rank a part;"
            " add --zero 0, or take adamw"
        )
    if training.compile == "none":
        return
    if config.data.mask_documents and config.model.attention not in ("sdpa", "softmax"):
        raise ConfigError(
            f"training.compile: with data.mask_documents and model.attention {config.model.attention} each batch would"
            " be compiled anew, as its documents have other lengths; set model.attention to sdpa, or compile to none"
        )
    if problem := _no_compiler(device):
        raise ConfigError(f"training.compile: blocks needs {problem}, or set it to none")


def _no_compiler(device: str) -> str | None:
    """What torch.compile lacks here, and how to get it; None if nothing."""
    if device == "cuda":
        return None if importlib.util.find_spec("triton") else "Triton, which is not installed: pip install triton"
    # Only now: this takes seconds.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler, and found none: install g++"
    return None


def _check_precision(precision: str, zero_stage: int, device: str) -> None:
    if precision == "fp16" and device == "cpu":
        raise ConfigError("training.precision: fp16 needs a GPU; use fp32 or bf16 here")
    if precision == "fp16" and zero_stage == 0:
        raise ConfigError("training.precision: fp16 needs ZeRO 1 to 3, whose optimizers scale the loss; add --zero 1")

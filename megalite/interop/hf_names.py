"""What our models are called at Hugging Face: Llama, or Qwen3 with QK-norm; config.json and the names of the weights.

Shapes: h hidden, f width of the MLP, d of a head, q and kv of all query and key/value heads, v vocabulary.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megalite.config import ModelConfig
from megalite.errors import UserError

Shape = tuple[int, ...]

# Ours, as it is in effect -> theirs.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn_size": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
    "init_std": "initializer_range",
}
_SETTINGS = {"kv_heads": "num_kv_heads", "head_size": "head_dim", "ffn_size": "intermediate_size"}  # where not the same
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen3ForCausalLM": "qwen3"}
# What their config.json may ask for, and the only values with which their model is ours.
_ONLY = {
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1.0,),
    "quantization_config": (),
    "auto_map": (),  # the model's own code, which is never run
}


def weight_names(model: ModelConfig) -> dict[str, dict[str, Shape]]:
    """By our parameters' names, their tensors that stand under each other in it, [out, in]: {name: shape}.

    The embedding and the head go on with padding: see `parameter_shapes`.
    """
    h, f, v = model.hidden_size, model.ffn_size, model.vocab_size
    q, kv = model.num_heads * model.head_size, model.kv_heads * model.head_size
    names: dict[str, dict[str, Shape]] = {"embedding.weight": {"model.embed_tokens.weight": (v, h)}}
    for i in range(model.num_layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
        names[f"{ours}.attention_norm.weight"] = {f"{theirs}.input_layernorm.weight": (h,)}
        names[f"{ours}.attention.qkv.weight"] = {
            f"{attention}.q_proj.weight": (q, h),
            f"{attention}.k_proj.weight": (kv, h),
            f"{attention}.v_proj.weight": (kv, h),
        }
        names[f"{ours}.attention.output.weight"] = {f"{attention}.o_proj.weight": (h, q)}
        if model.qk_norm:
            for norm in ("q_norm", "k_norm"):
                names[f"{ours}.attention.{norm}.weight"] = {f"{attention}.{norm}.weight": (model.head_size,)}
        names[f"{ours}.mlp_norm.weight"] = {f"{theirs}.post_attention_layernorm.weight": (h,)}
        names[f"{ours}.mlp.gate_up.weight"] = {f"{mlp}.gate_proj.weight": (f, h), f"{mlp}.up_proj.weight": (f, h)}
        names[f"{ours}.mlp.down.weight"] = {f"{mlp}.down_proj.weight": (h, f)}
    names["final_norm.weight"] = {"model.norm.weight": (h,)}
    if not model.tie_embeddings:
        names["head.weight"] = {"lm_head.weight": (v, h)}
    return names


def parameter_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of each of our parameters, in the order of the model."""
    shapes = {}
    for ours, theirs in weight_names(model).items():
        parts = list(theirs.values())
        padding = model.padded_vocab_size - model.vocab_size if ours in ("embedding.weight", "head.weight") else 0
        shapes[ours] = (sum(shape[0] for shape in parts) + padding, *parts[0][1:])
    return shapes


def to_their_config(model: ModelConfig, dtype: str, special_ids: dict[str, int | None]) -> dict[str, Any]:
    """config.json of the exported model; special_ids: bos_token_id, eos_token_id and pad_token_id.

    In the spelling of transformers 4, which 5 reads too.
    """
    architecture = "Qwen3ForCausalLM" if model.qk_norm else "LlamaForCausalLM"
    return {
        "architectures": [architecture],
        "model_type": _FAMILIES[architecture],
        **{theirs: getattr(model, ours) for ours, theirs in _FIELDS.items()},
        "hidden_act": "silu",
        "attention_bias": False,
        **({} if model.qk_norm else {"mlp_bias": False}),
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        **special_ids,
    }


def from_their_config(config: dict[str, Any], path: Path) -> ModelConfig:
    """Our model with which `config`, read from `path`, means the same.

    Raises UserError, one line that names the key, where it asks for something that our model does not have.
    """
    architectures = config.get("architectures")
    known = isinstance(architectures, list) and len(architectures) == 1 and isinstance(architectures[0], str)
    family = _FAMILIES.get(architectures[0]) if known else None
    if family is None or config.get("model_type", family) != family:
        raise UserError(
            f"{path}: architectures {architectures!r:.100} of model_type {config.get('model_type')!r:.100}; only"
            f" {' and '.join(_FAMILIES)} can be imported"
        )
    for key, allowed in _ONLY.items():
        if config.get(key) is not None and config[key] not in allowed:
            raise _refused(path, key, config[key])
    _check_attention(config, path)
    theta = _check_rope(config, path)
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        raise UserError(f"{path} gives no {missing[0]}; is it the config.json of a whole {architectures[0]}?")

    values = {ours: config[theirs] for ours, theirs in _FIELDS.items() if config.get(theirs) is not None}
    # What transformers takes for what is not there; our own defaults are others.
    values = {"norm_eps": 1e-6, "tie_embeddings": False} | values | {"rope_theta": theta, "qk_norm": family == "qwen3"}
    if family == "qwen3":
        values = {"kv_heads": 32, "head_size": 128} | values
    try:
        model = ModelConfig.model_validate({_SETTINGS.get(ours, ours): value for ours, value in values.items()})
    except ValidationError as error:
        first = error.errors()[0]
        ours = next((each for each, setting in _SETTINGS.items() if setting == first["loc"][0]), first["loc"][0])
        raise UserError(f"{path}: {_FIELDS.get(ours, ours)}: {first['msg']}") from error
    if model.num_heads % model.kv_heads or model.head_size % 2:
        raise UserError(
            f"{path}: {model.num_heads} heads of width {model.head_size} on {model.kv_heads} key/value heads; the width"
            " must be even and each key/value head serve as many query heads"
        )
    return model


def _check_attention(config: dict[str, Any], path: Path) -> None:
    """Refuse attention that is not over all that came before."""
    if config.get("sliding_window") is not None and config.get("use_sliding_window") is not False:
        raise _refused(path, "sliding_window", config["sliding_window"])
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _refused(path, "layer_types", kinds)


def _check_rope(config: dict[str, Any], path: Path) -> Any:
    """The base of the rotary embedding, once it is sure that nothing scales it."""
    theta = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):  # of transformers 5, and 4
        rope = config.get(key)
        if rope is None:
            continue
        plain = isinstance(rope, dict) and rope.get("rope_type", rope.get("type", "default")) == "default"
        if not plain or rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise _refused(path, key, rope)
        theta = rope.get("rope_theta", theta)
    return 10000.0 if theta is None else theta


def _refused(path: Path, key: str, value: Any) -> UserError:
    return UserError(f"{path}: {key} is {value!r:.100}, which MegaLite's model does not have; it cannot be imported")

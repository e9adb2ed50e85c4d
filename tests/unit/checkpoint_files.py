"""Checkpoints for tests, written by hand from the description of the format, without an engine."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from megalite.config import Config, ModelConfig
from megalite.model.gpt import Stage

# Large initial weights, so that an untrained model has strong and varied preferences.
MODEL = ModelConfig(
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=64,
    n_positions=64,
    qk_norm=True,
    init_std=0.5,
)


def write_checkpoint(folder: Path, model: ModelConfig, tokenizer_dir: Path | None, seed: int = 1) -> Stage:
    """Write a checkpoint of a new model, with moments of zero, in two shards; returns the model.

    tokenizer_dir: whose files the checkpoint holds; None for a checkpoint without a tokenizer.
    """
    stage = Stage(model, seed=seed).eval()
    folder.mkdir(parents=True)
    weights = {p.global_name: p.detach() for p in stage.parameters()}
    names = list(weights)
    index = {}
    for k, part in enumerate((names[:3], names[3:]), start=1):
        model_file, optimizer_file = (f"{kind}-{k:05d}-of-00002.safetensors" for kind in ("model", "optimizer"))
        moments = {
            f"{name}.{key}": torch.zeros_like(weights[name]) for name in part for key in ("exp_avg", "exp_avg_sq")
        }
        save_file({name: weights[name] for name in part}, folder / model_file)
        save_file(moments, folder / optimizer_file)
        index |= {name: [list(weights[name].shape), model_file, optimizer_file] for name in part}
    write_json(folder / "index.json", index)
    data = {"fingerprint": "0" * 64, "seed": 1234, "consumed_samples": 8}
    write_json(folder / "state.json", {"step": 1, "adam_step": 1, "tokens": 0, "data": data, "loss_scale": None})
    write_json(folder / "config.json", Config(model=model).model_dump())
    if tokenizer_dir is not None:
        shutil.copytree(tokenizer_dir, folder / "tokenizer")
    write_manifest(folder)
    return stage


def write_manifest(folder: Path, **changes) -> None:
    """manifest.json for all files that are there; `changes` replace its keys."""
    files = {
        str(path.relative_to(folder)): {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "bytes": path.stat().st_size,
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    write_json(
        folder / "manifest.json", {"format": "megalite-checkpoint", "version": 1, "step": 1, "files": files} | changes
    )


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content))


def edit_json(path: Path, change: Callable) -> None:
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)

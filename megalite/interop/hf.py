"""Hugging Face folders, out and in: export of a checkpoint, and import of Llama or Qwen3 as one of weights alone.

Both ways go a tensor at a time, from mapped files to files written front to back, so that memory holds one parameter
however large the model is. Only safetensors are read: nothing is unpickled, and no code that came with a model is run.
Format of the files: https://github.com/huggingface/safetensors#format
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.config import ModelConfig
from megalite.data.indexed import atomic_write, sync_folder
from megalite.data.tokenizer import FILES as TOKENIZER_FILES
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from megalite.interop.hf_names import Shape, from_their_config, parameter_shapes, to_their_config, weight_names
from megalite.model.gpt import Stage
from megalite.training.checkpoint_reader import FORMAT, FORMAT_VERSION, Checkpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 4 << 30
_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Exact for the same arithmetic; two implementations sum in another order.
TOLERANCE = 1e-4


def export_model(
    checkpoint: Checkpoint, tokenizer: Tokenizer, output: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write `checkpoint` to the folder `output` as transformers, vLLM and lm-eval load it; padding is left out.

    tokenizer: the checkpoint's own. Raises UserError where `output` holds something, the disk is full, the checkpoint
    is damaged or of another model than it says, or a weight is no finite number in `dtype`.
    """
    model = checkpoint.model
    checkpoint.check_shapes(parameter_shapes(model))
    names = weight_names(model)

    def convert(name: str) -> Iterator[Tensor]:
        rows = sum(shape[0] for shape in names[name].values())  # without padding
        # In small parts, or the conversion would take as much memory as the parameter once more.
        for part in checkpoint.tensors(name, ())["weight"][:rows].split(4096):
            part = part.to(dtype)
            if not part.isfinite().all():
                raise UserError(
                    f"{checkpoint.folder}: {name} has values that {_CODES[dtype]} cannot hold; export as bf16, or an"
                    " earlier checkpoint if the run diverged"
                )
            yield part

    sizes = {ours: dtype.itemsize * sum(map(math.prod, parts.values())) for ours, parts in names.items()}
    with _new_folder(output) as folder:
        weight_map = {}
        files = _plan(sizes, shard_bytes)
        for file, ours in files.items():
            shapes = {theirs: shape for name in ours for theirs, shape in names[name].items()}
            _write_tensors(folder / file, shapes, dtype, chain.from_iterable(map(convert, ours)))
            weight_map |= dict.fromkeys(shapes, file)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
            _write_json(folder / "model.safetensors.index.json", index)
        ids = _special_ids(tokenizer)
        _write_json(folder / "config.json", to_their_config(model, str(dtype).removeprefix("torch."), ids))
        # Here, where no gradient is taken, something may always stand in for padding.
        padding = ids["eos_token_id"] if ids["pad_token_id"] is None else ids["pad_token_id"]
        _write_json(folder / "generation_config.json", ids | {"pad_token_id": padding})
        _copy_tokenizer(Path(tokenizer.folder), folder)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """Documents begin after, and end with, `eod_id`. Other tokens that the tokenizer names are its own.

    Without a padding token there is none: an embedding that has one gives that token no gradient.
    """
    path = Path(tokenizer.folder) / "tokenizer_config.json"
    config = _read_object(path) if path.exists() else {}

    def find(key: str) -> int | None:
        token = config.get(key)
        token = token.get("content") if isinstance(token, dict) else token  # older files hold the token's flags too
        return tokenizer.backend.token_to_id(token) if isinstance(token, str) else None

    bos = find("bos_token")
    return {
        "bos_token_id": tokenizer.eod_id if bos is None else bos,
        "eos_token_id": tokenizer.eod_id,
        "pad_token_id": find("pad_token"),
    }


def import_model(source: Path, output: Path, shard_bytes: int = SHARD_BYTES) -> ModelConfig:
    """Write the model in the folder `source` to `output` as a checkpoint of fp32 weights alone, for --init-from.

    Returns its configuration, which is in model.yaml too, for --config. All that can be wrong with the folder is looked
    for before anything is written. Raises UserError naming the file: for another architecture or setting than our model
    has, for a file that is missing, damaged, a link or outside of its folder, and for tensors that are missing,
    unexpected or of another shape.
    """
    path = _plain_file(source, "config.json")
    model = from_their_config(_read_object(path), path)
    files = _locate(source)
    if model.num_layers > len(files):  # before the names of as many layers are made
        raise UserError(f"{path}: num_hidden_layers is {model.num_layers}, but there are {len(files)} tensors in all")
    names, shapes = weight_names(model), parameter_shapes(model)
    _check_tensors(source, files, {theirs: shape for parts in names.values() for theirs, shape in parts.items()}, model)
    tokenizer_dir = _plain_file(source, "tokenizer.json").parent
    tokenizer = Tokenizer(tokenizer_dir)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"{source}: its tokenizer has {tokenizer.vocab_size} ids, its config.json {model.vocab_size}")

    def parts_of(name: str) -> Iterator[Tensor]:
        rows = 0
        for theirs in names[name]:
            part = _read_tensor(files[theirs], theirs)
            rows += part.shape[0]
            yield part
        if rows < shapes[name][0]:
            yield torch.zeros(shapes[name][0] - rows, *shapes[name][1:])

    with _new_folder(output) as folder:
        entries, index = {}, {}
        for file, ours in _plan({name: 4 * math.prod(shape) for name, shape in shapes.items()}, shard_bytes).items():
            inside = {name: shapes[name] for name in ours}
            sha256 = _write_tensors(folder / file, inside, torch.float32, chain.from_iterable(map(parts_of, ours)))
            entries[file] = {"sha256": sha256}
            index |= {name: [list(shape), file, None] for name, shape in inside.items()}
        entries["index.json"] = {"sha256": _write_json(folder / "index.json", index)}
        entries["config.json"] = {"sha256": _write_json(folder / "config.json", {"model": model.model_dump()})}
        settings = yaml.safe_dump({"model": model.model_dump(exclude_unset=True)}, sort_keys=False)
        entries["model.yaml"] = {"sha256": atomic_write(folder / "model.yaml", [settings.encode()])}
        (folder / "tokenizer").mkdir()
        for name, sha256 in _copy_tokenizer(source, folder / "tokenizer").items():
            entries[f"tokenizer/{name}"] = {"sha256": sha256}
        for name, entry in entries.items():
            entry["bytes"] = (folder / name).stat().st_size
        manifest = {"format": FORMAT, "version": FORMAT_VERSION, "weights_only": True, "step": 0, "files": entries}
        _write_json(folder / "manifest.json", manifest)
    return model


def compare_logits(stage: Stage, folder: Path, dtype: torch.dtype) -> tuple[float, float]:
    """(largest difference, largest size) of the logits that `stage` and transformers on `folder` give random tokens.

    Both compute in fp32. The weights of `stage`, on the CPU, are rounded to `dtype`, as those in `folder` are: what
    remains is the order of sums. Raises ImportError without transformers.
    """
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=False, use_safetensors=True
    ).eval()
    model = stage.model
    for parameter in stage.parameters():
        parameter.data = parameter.data.to(dtype).float()
    length = min(64, model.n_positions)
    tokens = torch.randint(model.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours = stage(tokens)[..., : model.vocab_size].transpose(0, 1)  # [b, s, v]
        logits = theirs(tokens).logits
    if logits.shape != ours.shape:
        raise UserError(f"{folder}: transformers gives logits {list(logits.shape)}, MegaLite {list(ours.shape)}")
    return (ours - logits).abs().max().item(), ours.abs().max().item()


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill beside `output`, which gets that name at the end; after an error nothing of it stays."""
    output = Path(os.path.abspath(output))  # "." has no name to put .tmp behind
    try:
        if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
            raise UserError(f"{output} exists and is not an empty folder; choose another --output")
        folder = output.with_name(f"{output.name}.tmp")
        shutil.rmtree(folder, ignore_errors=True)  # left by one that was killed
        folder.mkdir(parents=True)
        try:
            yield folder
            os.replace(folder, output)
            sync_folder(output.parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def _plan(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> parameters in it, in order, cut where their bytes together pass `limit`; none spans two files."""
    shards: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{k:05d}-of-{len(shards):05d}.safetensors": names for k, names in enumerate(shards, start=1)}


def _write_tensors(path: Path, shapes: dict[str, Shape], dtype: torch.dtype, pieces: Iterable[Tensor]) -> str:
    """A safetensors file of `shapes`, whose content comes in `pieces`, one after the other; returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned

    def chunks() -> Iterator[bytes]:
        yield struct.pack("<Q", len(text)) + text
        for piece in pieces:
            yield piece.contiguous().flatten().view(torch.uint8).numpy().data

    return atomic_write(path, chunks())


def _locate(source: Path) -> dict[str, Path]:
    """Which file of the folder holds each tensor."""
    single, index = source / "model.safetensors", source / "model.safetensors.index.json"
    if single.is_symlink() or single.exists():
        path = _plain_file(source, single.name)
        return dict.fromkeys(_with_tensors(path, lambda file: list(file.keys())), path)
    if index.is_symlink() or index.exists():
        weight_map = _read_object(_plain_file(source, index.name)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} has no weight_map that gives each tensor's file; download the model again")
        paths = {file: _plain_file(source, file) for file in sorted(set(weight_map.values()))}
        return {name: paths[file] for name, file in weight_map.items()}
    pickles = sorted(path.name for path in source.glob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl"))
    if pickles:
        raise UserError(
            f"{source / pickles[0]} is a pickle, which can run code when it is read; only safetensors are: get the"
            " model's safetensors, or convert it where you trust it (transformers: save_pretrained)"
        )
    raise UserError(f"{source} holds no model.safetensors and no model.safetensors.index.json")


def _plain_file(source: Path, name: str) -> Path:
    """The file `name` right in the folder `source`, itself and no link."""
    path = source / name
    if name != os.path.basename(name) or name in ("", ".", "..") or not name.isprintable():
        raise UserError(f"{source} names a file outside its folder: {name[:100]!r}; it cannot be trusted")
    if path.is_symlink():
        raise UserError(f"{path} is a link; copy the folder with what its links point to: cp -rL {source} NEW")
    if not path.is_file():
        raise UserError(f"{path} is missing; download the model again, with all of its files")
    return path


def _check_tensors(source: Path, files: dict[str, Path], wanted: dict[str, Shape], model: ModelConfig) -> None:
    """Refuse a folder whose tensors are not exactly the `wanted`, in a dtype that fp32 holds."""
    ignored = {name for name in files if name.endswith(".rotary_emb.inv_freq")}  # computed from rope_theta
    if model.tie_embeddings:
        ignored.add("lm_head.weight")  # a copy of the embedding
    wrong = [f"{name} is missing" for name in wanted if name not in files]
    wrong += [f"{name[:100]!a} is unexpected" for name in files if name not in wanted and name not in ignored]
    for name, path in files.items():
        if name in wanted:
            shape, dtype = _with_tensors(path, lambda file, name=name: _describe(file.get_slice(name)))
            if shape != list(wanted[name]):
                wrong.append(f"{name} is {shape}, config.json says {list(wanted[name])}")
            if dtype not in _CODES.values():
                wrong.append(f"{name} is of dtype {dtype}, not {', '.join(_CODES.values())}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{source}: not the model that its config.json describes: {'; '.join(wrong[:3])}{more}")


def _describe(stored: Any) -> tuple[list[int], str]:
    return stored.get_shape(), stored.get_dtype()


def _read_tensor(path: Path, name: str) -> Tensor:
    return _with_tensors(path, lambda file: file.get_tensor(name)).float()


def _with_tensors(path: Path, read: Callable[[Any], Any]) -> Any:
    """What `read` makes of the open file; opened anew each time, so that its mapped pages do not stay in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            return read(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({error}); download the model again") from error


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object")
    return content


def _write_json(path: Path, content: Any) -> str:
    return atomic_write(path, [(json.dumps(content, indent=2) + "\n").encode()])


def _copy_tokenizer(source: Path, folder: Path) -> dict[str, str]:
    """Copies the files of a tokenizer that there are; returns the SHA-256 of each."""
    present = [name for name in TOKENIZER_FILES if (source / name).is_symlink() or (source / name).exists()]
    return {name: atomic_write(folder / name, [_plain_file(source, name).read_bytes()]) for name in present}

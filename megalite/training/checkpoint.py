"""Checkpoints that belong to no layout: fp32 weights and moments by global parameter name, in safetensors.

A folder step-N holds
    model-K.safetensors        fp32 weights
    optimizer-K.safetensors    NAME.exp_avg and NAME.exp_avg_sq, fp32
    index.json                 {parameter name: [shape, model file, optimizer file]}
    state.json                 step, tokens, data position, loss scale: all that the curve depends on besides tensors
    config.json, tokenizer/    what trained it
    manifest.json              format version, and size and SHA-256 of every file above; written last
It is written as step-N.tmp, forced to disk and renamed, so a folder named step-N is complete; then `latest` names it.
Nothing here is ever unpickled. All ranks must see one file system.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from megalite.config import Config
from megalite.data.indexed import atomic_write, sync_folder
from megalite.data.tokenizer import FILES as TOKENIZER_FILES
from megalite.errors import ConfigError, UserError
from megalite.topology import Topology
from megalite.training.engine import MOMENTS, Engine

FORMAT_VERSION = 1
# A shard passes through host memory twice while it is written. Its weights are a third of this.
SHARD_BYTES = 1 << 30
_STEP = re.compile(r"step-(\d+)")


def plan_shards(shapes: dict[str, tuple[int, ...]], limit: int = SHARD_BYTES) -> list[list[str]]:
    """Parameters in order, cut where weight and moments together pass `limit` bytes; one never spans two shards."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = 4 * (1 + len(MOMENTS)) * torch.Size(shape).numel()
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def save(
    output_dir: Path, step: int, engine: Engine, topology: Topology, state: dict[str, Any], config: Config
) -> Path:
    """Write output_dir/step-N; collective. Raises UserError on every rank where one could not write; the older
    checkpoints are untouched then, and nothing of the new one stays."""
    final = output_dir / f"step-{step}"
    temporary = output_dir / f"step-{step}.tmp"

    def make_folder() -> None:
        if topology.rank == 0:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                raise UserError(f"cannot write {temporary}: {error.strerror}") from error

    try:
        topology.together(make_folder)
        shapes = {name: p.global_shape for name, p in engine.parameters.items()}
        files, index = _write_shards(temporary, shapes, engine, topology)

        def finish() -> None:
            if topology.rank == 0:
                _write_rest(temporary, files, index, state, config)
                _publish(temporary, final, output_dir)

        topology.together(finish)
    except UserError:
        if topology.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if topology.rank == 0:
        _prune(output_dir, step, config.checkpoint.keep_last)
    return final


def _write_shards(
    folder: Path, shapes: dict[str, tuple[int, ...]], engine: Engine, topology: Topology
) -> tuple[dict[str, dict], dict[str, list]]:
    """The tensor files, shard k by data-parallel rank k mod their number; returns the manifest's entries and the index.

    Gathering is collective, one parameter at a time, so a rank that cannot write goes on gathering and fails after.
    """
    shards = plan_shards(shapes)
    written: dict[str, dict] = {}
    index: dict[str, list] = {}
    failure: UserError | None = None
    engine.begin_gather()
    for k, names in enumerate(shards):
        mine = topology.data_rank == k % topology.grid.data and failure is None
        model_file, optimizer_file = (
            f"{kind}-{k + 1:05d}-of-{len(shards):05d}.safetensors" for kind in ("model", "optimizer")
        )
        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        for name in names:
            tensors = engine.gather_state(name)
            index[name] = [list(shapes[name]), model_file, optimizer_file]
            if mine:
                tensors = {key: tensor.to("cpu", torch.float32).contiguous() for key, tensor in tensors.items()}
                weights[name] = tensors["weight"]
                moments |= {f"{name}.{key}": tensors[key] for key in MOMENTS}
        if mine:
            try:
                for file, content in ((model_file, weights), (optimizer_file, moments)):
                    written[file] = _write(folder / file, to_safetensors(content))
            except UserError as error:
                failure = error

    def fail() -> None:
        if failure is not None:
            raise failure

    topology.together(fail)
    files: dict[str, dict] = {}
    for part in topology.gather_objects(written):
        files |= part
    return files, index


def _write(path: Path, content: bytes) -> dict:
    return {"sha256": atomic_write(path, [content]), "bytes": len(content)}


def _write_rest(folder: Path, files: dict, index: dict, state: dict, config: Config) -> None:
    documents = {"index.json": index, "state.json": state, "config.json": config.model_dump()}
    for name, content in documents.items():
        files[name] = _write(folder / name, _json(content))
    try:
        (folder / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            source = Path(config.data.tokenizer_dir) / name
            if source.exists():
                files[f"tokenizer/{name}"] = _write(folder / "tokenizer" / name, source.read_bytes())
    except OSError as error:
        raise UserError(f"cannot copy the tokenizer into {folder}: {error.strerror}") from error
    manifest = {"format": "megalite-checkpoint", "version": FORMAT_VERSION, "step": state["step"], "files": files}
    _write(folder / "manifest.json", _json(manifest))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _publish(temporary: Path, final: Path, output_dir: Path) -> None:
    try:
        if final.exists():  # of an abandoned continuation: a run resumed from before it
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(output_dir)
    except OSError as error:
        raise UserError(f"cannot rename {temporary} to {final}: {error.strerror}") from error
    atomic_write(output_dir / "latest", [final.name.encode() + b"\n"])


def _prune(output_dir: Path, step: int, keep_last: int) -> None:
    """Keep the newest checkpoints up to `step`; what an abandoned run left beyond it is not ours to count."""
    old = [folder for number, folder in list_checkpoints(output_dir) if number <= step]
    for folder in old[:-keep_last]:
        shutil.rmtree(folder, ignore_errors=True)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each step-N in `output_dir`, oldest first."""
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match.group(1)), folder))
    return sorted(found)


def find_checkpoint(path: Path) -> Path | None:
    """`path` itself if it is a checkpoint, else the newest in it (what `latest` names), else None."""
    if (path / "manifest.json").is_file():
        return path
    try:
        named = (path / "latest").read_text().strip()
    except OSError:
        named = ""
    if _STEP.fullmatch(named) and (path / named).is_dir():
        return path / named
    found = list_checkpoints(path)
    return found[-1][1] if found else None


def set_aside(output_dir: Path) -> Path | None:
    """Move the checkpoints of `output_dir` into a new folder in it, for a run that starts afresh; None if none."""
    found = list_checkpoints(output_dir)
    if not found:
        return None
    number = 1
    while (output_dir / f"replaced-{number}").exists():
        number += 1
    aside = output_dir / f"replaced-{number}"
    try:
        aside.mkdir()
        (output_dir / "latest").unlink(missing_ok=True)
        for _, folder in found:
            os.replace(folder, aside / folder.name)
    except OSError as error:
        raise UserError(f"cannot move the checkpoints of {output_dir} to {aside}: {error.strerror}") from error
    return aside


class Checkpoint:
    """A checkpoint folder opened for reading: its manifest, index and state.

    Raises UserError naming the file where one is missing, has another size, or is not what it should be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = self._read_json("manifest.json")
        if manifest.get("format") != "megalite-checkpoint":
            raise self._broken("manifest.json", "is not a MegaLite checkpoint's")
        if manifest.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{folder}: checkpoint format {manifest.get('version')}, this version reads {FORMAT_VERSION};"
                " use the MegaLite that wrote it"
            )
        self.files: dict[str, dict] = manifest["files"]
        for name, entry in self.files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise self._broken("manifest.json", f"names a file outside its folder: {name}")
            path = folder / name
            size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if size != entry["bytes"]:
                raise self._broken(name, f"has {'no' if size is None else size} bytes, the manifest {entry['bytes']}")
        self.index: dict[str, list] = self._read_json("index.json")
        self.state: dict[str, Any] = self._read_json("state.json")
        self.config = Config.model_validate(self._read_json("config.json"))

    @property
    def step(self) -> int:
        return self.state["step"]

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare SHA-256 of every `parts`-th file, from number `part` on, so that ranks can share the work."""
        for name in sorted(self.files)[part::parts]:
            with open(self.folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != self.files[name]["sha256"]:
                    raise self._broken(name, "has another content than the manifest says")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor) of every parameter, one at a time."""
        for name, (_, model_file, _) in self.index.items():
            yield name, self._tensor(model_file, name)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """A parameter's weight and moments: {"weight", "exp_avg", "exp_avg_sq"}."""
        _, model_file, optimizer_file = self.index[name]
        return {
            "weight": self._tensor(model_file, name),
            **{key: self._tensor(optimizer_file, f"{name}.{key}") for key in MOMENTS},
        }

    def check_shapes(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Refuse a checkpoint whose parameters are not exactly those of the model."""
        stored = {name: tuple(entry[0]) for name, entry in self.index.items()}
        wrong = [f"{name} is missing" for name in shapes if name not in stored]
        wrong += [f"{name} is unexpected" for name in stored if name not in shapes]
        wrong += [
            f"{name} is {list(stored[name])}, the model has {list(shape)}"
            for name, shape in shapes.items()
            if name in stored and stored[name] != tuple(shape)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(f"{self.folder}: not a checkpoint of this model: {'; '.join(wrong[:3])}{more}")

    def _tensor(self, file: str, key: str) -> Tensor:
        if file not in self.files:
            raise self._broken("index.json", f"names {file}, which the manifest does not")
        try:
            with safe_open(self.folder / file, framework="pt") as tensors:
                return tensors.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise self._broken(file, f"cannot give {key} ({error})") from error

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.folder / name).read_text())
        except OSError as error:
            raise self._broken(name, f"cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise self._broken(name, "is not JSON") from error

    def _broken(self, name: str, why: str) -> UserError:
        return UserError(
            f"damaged checkpoint: {self.folder / name} {why}; resume from another one with --resume PATH,"
            " or start afresh with --no-resume"
        )


def check_same_model(checkpoint: Checkpoint, config: Config) -> None:
    """Refuse to continue another model's run: ConfigError naming the keys that differ."""
    theirs, ours = checkpoint.config.model.model_dump(), config.model.model_dump()
    differing = [f"model.{key} {theirs[key]} there, {ours[key]} here" for key in ours if theirs[key] != ours[key]]
    if differing:
        raise ConfigError(
            f"checkpoint.output_dir: {checkpoint.folder} is of another run ({'; '.join(differing)});"
            " choose another --output-dir, or start afresh with --no-resume"
        )


def load(checkpoint: Checkpoint, engine: Engine, topology: Topology) -> None:
    """Weights and optimizer state into the engine, whatever layout wrote them; collective."""
    topology.together(checkpoint.check_shapes, {n: p.global_shape for n, p in engine.parameters.items()})
    topology.together(checkpoint.verify, topology.rank, topology.world_size)
    engine.begin_load(checkpoint.step)
    for name in engine.parameters:
        engine.load_state(name, checkpoint.tensors(name))
    engine.end_load()
    engine.load_loss_scale_state(checkpoint.state["loss_scale"])

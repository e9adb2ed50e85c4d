"""Reading checkpoints: finding them, and their tensors by global parameter name. Needs no engine and no processes.

A folder step-N holds
    model-K.safetensors        fp32 weights
    optimizer-K.safetensors    NAME.exp_avg and NAME.exp_avg_sq, or NAME.momentum of what Muon trains, fp32
    index.json                 {parameter name: [shape, model file, optimizer file]}
    state.json                 step, Adam's step, tokens, data position, loss scale: all that the curve depends on
    config.json, tokenizer/    what trained it
    manifest.json              format version, and size and SHA-256 of every file above; written last
Beside them `latest` holds the name of the newest, for people and scripts. `checkpoint.py` writes all this. Nothing here
is ever unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megalite.config import ModelConfig
from megalite.errors import UserError

FORMAT = "megalite-checkpoint"
FORMAT_VERSION = 1
# The names that torch's AdamW has for its two moments.
MOMENTS = ("exp_avg", "exp_avg_sq")
_STEP = re.compile(r"step-(\d+)")


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each step-N in `output_dir`, oldest first."""
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _STEP.fullmatch(folder.name)
        if match and folder.is_dir():
            found.append((int(match.group(1)), folder))
    return sorted(found)


def find_checkpoint(path: Path) -> Path | None:
    """`path` itself if it is a checkpoint, else the step-N of the highest N in it, else None."""
    if (path / "manifest.json").is_file():
        return path
    found = list_checkpoints(path)
    return found[-1][1] if found else None


class Checkpoint:
    """A checkpoint folder opened for reading: its manifest (`files`), `index`, `state`, `model` and `optimizer`.

    Raises UserError naming the file where one is missing, has another size, or is not what it should be.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        manifest = self._read_object("manifest.json")
        if manifest.get("format") != FORMAT:
            raise self._broken("manifest.json", "is not a MegaLite checkpoint's")
        if manifest.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{folder}: checkpoint format {manifest.get('version')}, this version reads {FORMAT_VERSION};"
                " use the MegaLite that wrote it"
            )
        files = manifest.get("files")
        if not isinstance(files, dict) or not all(map(_is_file_entry, files.values())):
            raise self._broken("manifest.json", "does not give the size and SHA-256 of each file")
        self.files: dict[str, dict] = files
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise self._broken("manifest.json", f"names a file outside its folder: {name}")
            path = folder / name
            size = path.stat().st_size if path.is_file() and not path.is_symlink() else None
            if size != entry["bytes"]:
                raise self._broken(name, f"has {'no' if size is None else size} bytes, the manifest {entry['bytes']}")
        self.index: dict[str, list] = self._read_object("index.json")
        if not all(map(_is_index_entry, self.index.values())):
            raise self._broken("index.json", "does not give the shape and the two files of each parameter")
        self.state: dict[str, Any] = self._read_object("state.json")
        if not _is_state(self.state):
            raise self._broken("state.json", "does not give the step, the tokens and the position in the data")
        # The other sections tell how it was trained. Read no further, so that a key renamed there spoils no checkpoint.
        config = self._read_object("config.json")
        training = config.get("training")
        self.optimizer = training.get("optimizer", "adamw") if isinstance(training, dict) else "adamw"
        try:
            self.model = ModelConfig.model_validate(config.get("model"))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, ("model", *first["loc"])))
            raise self._broken(
                "config.json", f"has no model that this version knows ({key}: {first['msg']})"
            ) from error

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

    def tensors(self, name: str, moments: tuple[str, ...] = MOMENTS) -> dict[str, Tensor]:
        """A parameter's weight and moments: {"weight", and each of `moments`}."""
        _, model_file, optimizer_file = self.index[name]
        return {
            "weight": self._tensor(model_file, name),
            **{key: self._tensor(optimizer_file, f"{name}.{key}") for key in moments},
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

    def _read_object(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text())
        except OSError as error:
            raise self._broken(name, f"cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise self._broken(name, "is not JSON") from error
        if not isinstance(content, dict):
            raise self._broken(name, "is not a JSON object")
        return content

    def _broken(self, name: str, why: str) -> UserError:
        return UserError(
            f"damaged checkpoint: {self.folder / name} {why}; use another step-N folder"
            " (training: --resume PATH, or --no-resume to start afresh)"
        )


def _is_file_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)


def _is_state(state: dict[str, Any]) -> bool:
    data = state.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("fingerprint"), str):
        return False
    counters = (
        *(state.get(key) for key in ("step", "adam_step", "tokens")),
        data.get("seed"),
        data.get("consumed_samples"),
    )
    return all(isinstance(each, int) and each >= 0 for each in counters)


def _is_index_entry(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], list):
        return False
    return all(isinstance(size, int) for size in entry[0]) and all(isinstance(file, str) for file in entry[1:])

"""Reading checkpoints: finding them, and their tensors by global parameter name. Needs no engine and no processes.

`docs/checkpoints.md` describes the files. Tensors are memory-mapped, and a rank reads the part of each that it keeps.
Nothing here is ever unpickled.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
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


class DamagedCheckpoint(UserError):
    """A file of a checkpoint is missing, cut off, changed, or not what it should be."""


@dataclass(frozen=True)
class Slice:
    """A rank's part of a tensor: of each segment along `dim` part `rank` of `size`; of that, flattened, [first, last).

    dim None: not split. last None: to the end.
    """

    dim: int | None = None
    segments: tuple[int, ...] = ()
    size: int = 1
    rank: int = 0
    first: int = 0
    last: int | None = None


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
    """A checkpoint folder opened for reading: its `manifest`, `files`, `index`, `state`, `model` and `optimizer`.

    `weights_only`: it has no optimizer, and its `state` is empty. Raises DamagedCheckpoint naming the file where one is
    missing, has another size, or is not what it should be, and UserError for a format that this version does not know.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._opened: dict[str, Any] = {}
        manifest = self.manifest = self._read_object("manifest.json")
        if manifest.get("format") != FORMAT:
            raise self._broken("manifest.json", "is not a MegaLite checkpoint's")
        if manifest.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{folder}: checkpoint format {manifest.get('version')}, this version reads {FORMAT_VERSION};"
                " use the MegaLite that wrote it"
            )
        self.weights_only = manifest.get("weights_only") is True
        self._check_files(manifest.get("files"))
        self.index: dict[str, list] = self._read_object("index.json")
        if not all(_is_index_entry(entry, self.weights_only) for entry in self.index.values()):
            raise self._broken("index.json", "does not give the shape and the two files of each parameter")
        self.state: dict[str, Any] = {} if self.weights_only else self._read_object("state.json")
        if not self.weights_only and not _is_state(self.state):
            raise self._broken("state.json", "does not give the step, the tokens and the position in the data")
        # The other sections tell how it was trained. Read no further, so that a key renamed there spoils no checkpoint.
        self.config = self._read_object("config.json")
        training = self.config.get("training")
        self.optimizer = training.get("optimizer", "adamw") if isinstance(training, dict) else "adamw"
        try:
            self.model = ModelConfig.model_validate(self.config.get("model"))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, ("model", *first["loc"])))
            raise self._broken(
                "config.json", f"has no model that this version knows ({key}: {first['msg']})"
            ) from error

    def _check_files(self, files: Any) -> None:
        """The files that the manifest names: inside the folder, themselves and no links, of the size that it says."""
        if not isinstance(files, dict) or not all(map(_is_file_entry, files.values())):
            raise self._broken("manifest.json", "does not give the size and SHA-256 of each file")
        self.files: dict[str, dict] = files
        inside = self.folder.resolve()
        for name, entry in files.items():
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise self._broken("manifest.json", f"names a file outside its folder: {name}")
            path = self.folder / name
            real = path.is_file() and path.resolve() == inside / name  # no link, nor in a folder that is one
            size = path.stat().st_size if real else None
            if size != entry["bytes"]:
                raise self._broken(name, f"has {'no' if size is None else size} bytes, the manifest {entry['bytes']}")
        required = ("index.json", "config.json", *([] if self.weights_only else ["state.json"]))
        if missing := [name for name in required if name not in files]:
            raise self._broken("manifest.json", f"does not give the size and SHA-256 of {missing[0]}")

    @property
    def step(self) -> int:
        return self.state.get("step", 0)

    def verify(self, part: int = 0, parts: int = 1) -> None:
        """Compare SHA-256 of every `parts`-th file, from number `part` on, so that ranks can share the work."""
        for name in sorted(self.files)[part::parts]:
            try:
                with open(self.folder / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise self._broken(name, f"cannot be read ({error.strerror})") from error
            if found != self.files[name]["sha256"]:
                raise self._broken(name, "has another content than the manifest says")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 tensor) of every parameter, one at a time."""
        for name in self.index:
            yield name, self.tensors(name, ())["weight"]

    def tensors(self, name: str, moments: tuple[str, ...] = MOMENTS, part: Slice | None = None) -> dict[str, Tensor]:
        """A parameter's weight and moments: {"weight", and each of `moments`}; flat where `part` says which part."""
        _, model_file, optimizer_file = self.index[name]
        places = {"weight": (model_file, name), **{key: (optimizer_file, f"{name}.{key}") for key in moments}}
        return {key: self._tensor(*place, name, part) for key, place in places.items()}

    def stored_moments(self, name: str) -> tuple[str, ...]:
        """Which moments of a parameter it holds: AdamW's, or what stands in their place."""
        if self.weights_only:
            return ()
        keys = self._open(self.index[name][2]).keys()
        return tuple(sorted(key.removeprefix(f"{name}.") for key in keys if key.rpartition(".")[0] == name))

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

    def _tensor(self, file: str, key: str, name: str, part: Slice | None) -> Tensor:
        try:
            stored = self._open(file).get_slice(key)
            shape, dtype = stored.get_shape(), stored.get_dtype()
            if shape != self.index[name][0] or dtype != "F32":
                raise self._broken(
                    file, f"is wrong: {key} is {shape} {dtype}, index.json says {self.index[name][0]}, the format F32"
                )
            return stored[:] if part is None else read_slice(stored, tuple(shape), part)
        except (SafetensorError, OSError) as error:
            raise self._broken(file, f"cannot give {key} ({error})") from error

    def _open(self, file: str) -> Any:
        """The file's tensors, mapped; each file is opened once."""
        if file not in self._opened:
            if file not in self.files:
                raise self._broken("index.json", f"names {file}, which the manifest does not")
            try:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._broken(file, f"cannot give tensors ({error})") from error
        return self._opened[file]

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
        return DamagedCheckpoint(
            f"damaged checkpoint: {self.folder / name} {why}; use another step-N folder (training: --resume-fallback"
            " for the one before, --resume PATH, or --no-resume to start afresh)"
        )


def read_slice(stored: Any, shape: tuple[int, ...], part: Slice) -> Tensor:
    """`part` of a tensor of `shape` in a safetensors file (a PySafeSlice), flat; reads the rows that hold it, no more.

    A part of a tensor that is split along another dimension than the first is read row by row through the mapping.
    """
    rows, width = shape[0], torch.Size(shape[1:]).numel()
    # Where the local rows lie: (first row in the file, number of rows) one after the other.
    if part.dim == 0:
        runs, start = [], 0
        for segment in part.segments:
            each = segment // part.size
            runs.append((start + part.rank * each, each))
            start += segment
    else:
        runs = [(0, rows)]
        width //= part.size if part.dim is not None else 1
    last = sum(count for _, count in runs) * width if part.last is None else part.last
    if part.first >= last:
        return torch.empty(0)
    low, high = part.first // width, -(-last // width)
    pieces, passed = [], 0
    for start, count in runs:
        begin, end = max(low - passed, 0), min(high - passed, count)
        if begin < end:
            pieces.append(_read_rows(stored, start + begin, start + end, part))
        passed += count
    read = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return read.flatten()[part.first - low * width : last - low * width]


def _read_rows(stored: Any, begin: int, end: int, part: Slice) -> Tensor:
    """Rows [begin, end) of a stored tensor; where it is split along its second dimension, this rank's columns."""
    if part.dim != 1:
        return stored[begin:end]
    pieces, start = [], 0
    for segment in part.segments:
        each = segment // part.size
        pieces.append(stored[begin:end, start + part.rank * each : start + (part.rank + 1) * each])
        start += segment
    return torch.cat(pieces, 1)


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


def _is_index_entry(entry: Any, weights_only: bool) -> bool:
    if not isinstance(entry, list) or len(entry) != 3 or not isinstance(entry[0], list):
        return False
    moments = entry[2] is None if weights_only else isinstance(entry[2], str)
    return all(isinstance(size, int) for size in entry[0]) and isinstance(entry[1], str) and moments

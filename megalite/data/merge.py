"""Several PREFIX.bin/.idx pairs to one: their documents one after the other, with memory the same for any number."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megalite.data.index_file import IndexFile
from megalite.data.indexed import (
    CODES,
    HEADER,
    MAGIC,
    MANIFEST_VERSION,
    VERSION,
    PairWriter,
    pair_paths,
    staged,
    sync_folder,
)
from megalite.data.progress import Progress
from megalite.data.validate import CHUNK_BYTES, expand_prefixes, validate
from megalite.errors import UserError

AGREED = ("tokenizer_sha256", "vocab_size", "eod_id", "append_eod")  # of the manifests: kept where all inputs agree


@dataclass(frozen=True)
class MergeSummary:
    """The pair that `merge_indexed` made, or found up to date."""

    prefix: str
    inputs: int
    documents: int
    sequences: int
    tokens: int
    dtype: str
    tokenizer_sha256: str | None
    notes: list[str]
    """What is not known of the result, and why."""
    up_to_date: bool


@dataclass
class _Source:
    """One input, found whole; `piece` entries of its index are read at a time."""

    prefix: str
    piece: int
    dtype: np.dtype = field(init=False)
    manifest: dict = field(init=False)

    def __post_init__(self) -> None:
        report = validate(self.prefix, chunk_bytes=8 * self.piece)
        if report.faults:
            raise UserError(report.faults[0].message)
        self.bin_path, self.idx_path, self.manifest_path = pair_paths(self.prefix)
        self.dtype, self.manifest = np.dtype(report.dtype).newbyteorder("<"), report.manifest or {}
        self.documents, self.sequences, self.tokens = report.documents, report.sequences, report.tokens
        self.index = IndexFile(self.idx_path, self.piece)
        self.idx_sha256 = _hash(self.idx_path)
        if self.manifest.get("idx_sha256", self.idx_sha256) != self.idx_sha256:
            raise self.damaged(self.idx_path, "idx_sha256")

    def damaged(self, path: Path, key: str) -> UserError:
        return UserError(
            f"{path} differs from the {key} in {self.manifest_path}: it is damaged or changed; build it again"
        )

    def entry(self, bin_sha256: str) -> dict[str, str | int]:
        """What the result's manifest says of it."""
        counts = {"prefix": self.prefix, "documents": self.documents, "tokens": self.tokens}
        return counts | {"bin_sha256": bin_sha256, "idx_sha256": self.idx_sha256}


def merge_indexed(
    inputs: Sequence[str],
    output_prefix: str | Path,
    *,
    widen: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
) -> MergeSummary:
    """Write the documents of `inputs` (prefixes, or globs of .idx files), in order, to one pair and its manifest.

    Documents keep their sequences. Different dtypes are refused, or with `widen` stored in the narrowest that holds all
    of them. Manifests must name one tokenizer; what is known of it goes into the result's. An input whose hashes are
    not its manifest's is refused. What is there and was made of the same is left alone ("up to date"), anything else is
    refused unless `overwrite`. Final names appear only when all is written; a killed merge is simply run again.

    Raises `UserError` for anything wrong with the inputs, the output or the disk.
    """
    output = str(output_prefix)
    if output.endswith(("/", os.sep)) or not output:
        raise UserError(f'output prefix "{output}" has no file name: give FOLDER/NAME')
    sources = _open_sources(inputs, output, chunk_bytes)
    filled = [source for source in sources if source.documents]
    if not filled:
        raise UserError(f"{sources[0].prefix}: none of the inputs has a document, there is nothing to merge")
    dtype = _common_dtype(filled, widen)
    facts, notes = _common_facts(filled)
    if any(path.exists() for path in pair_paths(output)) and not overwrite:
        if not (_complete(output, sources, dtype) or _up_to_date(output, sources, dtype)):
            raise UserError(f"{output}.bin/.idx exists, not of these inputs: pass --overwrite, or remove it")
        return _summary(output, sources, dtype, facts, notes, up_to_date=True)

    writer = None
    bar = Progress("merging", sum(source.tokens * source.dtype.itemsize for source in sources), show=progress)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        writer = PairWriter(output, dtype)
        entries = [source.entry(_copy(source, writer, chunk_bytes, bar)) for source in sources]
        writer.documents = sum(source.documents for source in sources)
        writer.tokens = sum(source.tokens for source in sources)
        sizes = [source.manifest.get("text_bytes") for source in filled]
        writer.text_bytes = sum(sizes) if all(type(size) is int for size in sizes) else None
        writer.finish(facts | {"merged_from": entries}, _index_chunks(sources, dtype))
        writer.commit()
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    finally:
        bar.close()
        if writer is not None:
            writer.abort()
    return _summary(output, sources, dtype, facts, notes, up_to_date=False)


def _summary(
    output: str, sources: list[_Source], dtype: np.dtype, facts: dict, notes: list[str], *, up_to_date: bool
) -> MergeSummary:
    documents, sequences, tokens = (
        sum(getattr(source, key) for source in sources) for key in ("documents", "sequences", "tokens")
    )
    known = facts.get("tokenizer_sha256")
    return MergeSummary(output, len(sources), documents, sequences, tokens, dtype.name, known, notes, up_to_date)


# ----------------------------------------------------------------------------------------------------------- inputs


def _open_sources(inputs: Sequence[str], output: str, chunk_bytes: int) -> list[_Source]:
    prefixes = expand_prefixes(inputs)
    if not prefixes:
        raise UserError("no input is given: give prefixes of .bin/.idx pairs")
    outputs = {os.path.realpath(path) for path in pair_paths(output)}
    given: dict[str, str] = {}  # real path -> prefix
    for prefix in prefixes:
        for path in map(os.path.realpath, pair_paths(prefix)[:2]):
            if path in outputs:
                raise UserError(f"{prefix} is an input and the output: give another --output-prefix")
            if path in given:
                other = "" if given[path] == prefix else f", also as {given[path]}"
                raise UserError(f"{prefix} is given twice{other}: give it once (a blend's weights repeat data)")
        given |= dict.fromkeys(map(os.path.realpath, pair_paths(prefix)[:2]), prefix)
    return [_Source(prefix, max(1, chunk_bytes // 8)) for prefix in prefixes]


def _common_dtype(sources: list[_Source], widen: bool) -> np.dtype:
    first = sources[0]
    for source in sources:
        if source.dtype != first.dtype and not widen:
            raise UserError(
                f"{first.prefix} holds {first.dtype.name} and {source.prefix} {source.dtype.name}: "
                "pass --widen to store all in a type that holds both"
            )
    return np.result_type(*(source.dtype for source in sources)).newbyteorder("<")


def _common_facts(sources: list[_Source]) -> tuple[dict, list[str]]:
    """What all manifests say of the tokenizer, and what they leave open."""
    known = [source for source in sources if "tokenizer_sha256" in source.manifest]
    for source in known:
        for key, name in (("tokenizer_sha256", "tokenizers"), ("vocab_size", "vocabularies")):
            if source.manifest.get(key) != known[0].manifest.get(key):
                raise UserError(
                    f"{known[0].prefix} and {source.prefix} have different {name} by their manifests: ids would mean "
                    "different text; tokenize one of them again"
                )
    facts, notes = {"version": MANIFEST_VERSION}, []
    if len(known) < len(sources):
        unknown = next(source for source in sources if source not in known)
        others = len(sources) - len(known) - 1
        also = f" (nor those of {others} more)" if others else ""
        notes.append(f"the tokenizer is not known: {unknown.prefix} has no manifest that says it{also}")
        return facts, notes
    for key in AGREED:
        values = [source.manifest.get(key) for source in sources]
        if all(value == values[0] for value in values) and values[0] is not None:
            facts[key] = values[0]
        else:
            notes.append(f"{key} is not known: the inputs' manifests differ in it, or don't say it")
    return facts, notes


# ----------------------------------------------------------------------------------------------------------- output


def _copy(source: _Source, writer: PairWriter, chunk_bytes: int, bar: Progress) -> str:
    """Append a .bin's tokens, converted; returns its SHA-256. Raises `UserError` if that is not its manifest's."""
    itemsize = source.dtype.itemsize
    digest = hashlib.sha256()
    for raw in _read(source.bin_path, source.tokens * itemsize, max(1, chunk_bytes // itemsize) * itemsize):
        digest.update(raw)
        same = source.dtype == writer.dtype
        writer.append(raw if same else np.frombuffer(raw, source.dtype).astype(writer.dtype).tobytes())
        bar.set(bar.done + len(raw))
    if source.manifest.get("bin_sha256", digest.hexdigest()) != digest.hexdigest():
        raise source.damaged(source.bin_path, "bin_sha256")
    return digest.hexdigest()


def _read(path: Path, size: int, chunk_bytes: int) -> Iterator[bytes]:
    """The file's `size` bytes in chunks. Raises `UserError`, also where reading fails: the output is not to blame."""
    try:
        with open(path, "rb") as file:
            for start in range(0, size, chunk_bytes):
                raw = file.read(min(chunk_bytes, size - start))
                if len(raw) != min(chunk_bytes, size - start):
                    raise UserError(f"{path} became shorter while it was read: run this again")
                yield raw
            if file.read(1):
                raise UserError(f"{path} became longer while it was read: run this again")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _hash(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _index_chunks(sources: list[_Source], dtype: np.dtype) -> Iterator[bytes]:
    """The .idx of all documents: one pass over the inputs' for lengths, one for pointers, one for bounds."""
    sequences, documents = (sum(getattr(source, key) for source in sources) for key in ("sequences", "documents"))
    yield HEADER.pack(MAGIC, VERSION, CODES[dtype], sequences, documents + 1)
    for source in sources:
        yield from (lengths.astype("<i4").tobytes() for lengths in source.index.lengths())
    tokens = 0
    for source in sources:
        for lengths, ends in zip(source.index.lengths(), source.index.sequence_ends(), strict=True):
            yield ((ends - lengths + tokens) * dtype.itemsize).astype("<i8").tobytes()
        tokens += source.tokens
    yield np.zeros(1, "<i8").tobytes()
    sequences = 0
    for source in sources:
        yield from ((bounds + sequences).astype("<i8").tobytes() for bounds in source.index.bounds(1))
        sequences += source.sequences


# ---------------------------------------------------------------------------------------------- what is there already


def _is_of(manifest: object, sources: list[_Source], dtype: np.dtype) -> bool:
    """Whether a manifest is that of these inputs; where they have moved since doesn't matter."""
    entries = manifest.get("merged_from") if isinstance(manifest, dict) else None
    if not isinstance(entries, list) or len(entries) != len(sources) or manifest.get("dtype") != dtype.name:
        return False
    for entry, source in zip(entries, sources, strict=True):
        if not isinstance(entry, dict) or entry | {"prefix": source.prefix} != source.entry(entry.get("bin_sha256")):
            return False
        if entry["bin_sha256"] != (source.manifest.get("bin_sha256") or _hash(source.bin_path)):
            return False
    return True


def _up_to_date(output: str, sources: list[_Source], dtype: np.dtype) -> bool:
    report = validate(output)
    return report.ok and _is_of(report.manifest, sources, dtype)


def _complete(output: str, sources: list[_Source], dtype: np.dtype) -> bool:
    """Finish a merge of these inputs that was killed while it renamed its files; whether there was one."""
    paths = pair_paths(output)
    if paths[2].exists():  # the last to get its name
        return False
    try:
        manifest = json.loads(staged(paths[2]).read_bytes())
        if not _is_of(manifest, sources, dtype) or not paths[0].exists():
            return False
        index = next(path for path in (paths[1], staged(paths[1])) if path.exists())
        if (_hash(paths[0]), _hash(index)) != (manifest.get("bin_sha256"), manifest.get("idx_sha256")):
            return False
        os.replace(index, paths[1])
        os.replace(staged(paths[2]), paths[2])
        sync_folder(paths[2].parent)
    except (OSError, ValueError, StopIteration):
        return False
    return True

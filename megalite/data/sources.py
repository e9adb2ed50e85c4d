"""From the settings of `data` to what a run reads: indexed data, text once that is indexed, or text as it is."""

import hashlib
import os
from collections.abc import Sequence
from glob import has_magic
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megalite.config import BlendEntry, Config, DataConfig
from megalite.data.blend import Blend
from megalite.data.dataset import WindowDataset, evaluated_windows
from megalite.data.indexed import data_prefix
from megalite.data.inputs import InputFile, expand_inputs, is_text, match_paths
from megalite.data.loader import TrainLoader
from megalite.data.streaming import StreamingLoader
from megalite.data.tokenize import build_indexed
from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.topology import Topology


def resolve_files(patterns: Sequence[str], key: str) -> tuple[list[str], list[str]]:
    """Sort paths and globs into (prefixes of indexed data, text files), each in order and without doubles.

    A pattern names text where it is a folder or has a suffix of text, else indexed data: PREFIX, PREFIX.bin or
    PREFIX.idx. A glob may match both files of a pair. key: the dotted key to name in the ConfigError for what matches
    nothing.
    """
    prefixes: dict[str, None] = {}
    texts: list[str] = []
    for pattern in patterns:
        prefix = data_prefix(pattern)
        if is_text(pattern) or os.path.isdir(pattern):
            texts.append(pattern)
        elif Path(f"{prefix}.idx").exists():
            prefixes[prefix] = None
        elif has_magic(pattern):
            matched = match_paths(pattern)
            pairs = [path for path in matched if path.endswith((".bin", ".idx"))]
            found = [path for path in matched if is_text(path)]
            if not pairs and not found:
                raise ConfigError(
                    f"{key}: {pattern} matches no indexed data (.bin, .idx) and no text (.jsonl, .txt, .parquet)"
                )
            prefixes |= dict.fromkeys(map(data_prefix, pairs))
            texts += found
        else:
            raise ConfigError(
                f"{key}: {pattern}: no such indexed data ({prefix}.idx does not exist);"
                " build it with tools/preprocess_data.py, or give .txt or .jsonl files"
            )
    return list(prefixes), [file.path for file in expand_inputs(texts)] if texts else []


def cache_prefix(texts: Sequence[str], tokenizer: Tokenizer, data: DataConfig) -> str:
    """Where these texts are indexed: a name that changes with the files, the tokenizer and how they are read."""
    digest = hashlib.sha256(f"{tokenizer.sha256} {data.json_key} {data.split_on}".encode())
    for path in texts:
        status = Path(path).stat()
        digest.update(f"\n{Path(path).resolve()} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{data.cache_dir}/{digest.hexdigest()[:16]}"


def index_texts(texts: Sequence[str], tokenizer: Tokenizer, data: DataConfig) -> None:
    """Tokenize text files into the cache, unless they are there; on one rank only."""
    prefix = cache_prefix(texts, tokenizer, data)
    if Path(f"{prefix}.manifest.json").exists():
        return  # the manifest is written last
    build_indexed(
        list(texts),
        tokenizer.folder,
        prefix,
        json_keys=(data.json_key,),
        split_on=data.split_on,
        workers=data.num_workers,
    )


def check_tokenizer(dataset: WindowDataset, tokenizer: Tokenizer, key: str) -> None:
    """Refuse data that was made with another tokenizer, where its manifest tells: its ids would mean other text."""
    for source in dataset.sources:
        made_with = (source.manifest or {}).get("tokenizer_sha256", tokenizer.sha256)
        if made_with != tokenizer.sha256:
            raise ConfigError(
                f"{key}: {source.prefix} was made with another tokenizer than data.tokenizer_dir ({tokenizer.folder});"
                " build it again with tools/preprocess_data.py, or give its --tokenizer-dir"
            )


def unigram_entropy(dataset: WindowDataset, windows: int | None = None) -> float:
    """Entropy in nats of the token frequencies in the labels of the windows that an evaluation of `windows` reads.

    The least loss that is possible there without looking at the context: a trained model is to be well below.
    """
    counts = np.zeros(0, dtype=np.int64)
    for i in evaluated_windows(len(dataset), windows):
        found = np.bincount(dataset[i][1:], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    probability = counts[counts > 0] / counts.sum()
    return float(-(probability * np.log(probability)).sum())


def streamed_files(data: DataConfig) -> list[InputFile]:
    """The files that are trained on as they are; ConfigError where one is not of `data.format`."""
    files = expand_inputs(data.train_files)
    suffix = {"text": "txt", "jsonl": "jsonl"}[data.format]
    for file in files:
        if file.format != suffix:
            raise ConfigError(
                f"data.train_files: {file.path} is not .{suffix}, which data.format = {data.format} reads; change one "
                "of them"
            )
    return files


def resolve_blend(entries: Sequence[BlendEntry]) -> list[tuple[list[str], list[str]]]:
    """What `resolve_files` finds for each entry of a blend; ConfigError where two entries name the same data."""
    found = [resolve_files([entry.prefix], "data.blend") for entry in entries]
    owners: dict[str, str] = {}
    for entry, (prefixes, texts) in zip(entries, found, strict=True):
        for path in (*prefixes, *texts):
            owner = owners.setdefault(os.path.realpath(path), entry.prefix)
            if owner != entry.prefix:
                raise ConfigError(f"data.blend: {path} is in both {owner} and {entry.prefix}; give it once")
    return found


def make_blend(entries: Sequence[BlendEntry], sources: Sequence[int], dataset: WindowDataset) -> Blend:
    """The blend of a dataset in which entry i is the next `sources[i]` of its sources."""
    ends = [dataset.ends[last - 1] for last in accumulate(sources)]
    for entry, (start, end) in zip(entries, pairwise([0, *ends]), strict=True):
        if start == end:
            raise ConfigError(
                f"data.blend: {entry.prefix} is shorter than one sequence (data.block_size = {dataset.block_size}, and "
                "the token after it); remove it, or lower block_size"
            )
    return Blend([entry.prefix for entry in entries], [entry.weight for entry in entries], ends)


class Sources(NamedTuple):
    """What a run reads."""

    train: WindowDataset | list[InputFile]
    """Windows; or the files to train straight from."""
    blend: Blend | None
    """How the windows are drawn, where not all alike."""
    validation: dict[str, WindowDataset]
    """By the set's name."""


def open_data(config: Config, topology: Topology) -> Sources:
    """Find and open everything that `data` names, after checks that every rank shares."""
    data = config.data

    def check_vocabulary() -> Tokenizer:
        tokenizer = Tokenizer(data.tokenizer_dir)
        if tokenizer.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size = {config.model.vocab_size}, but the tokenizer in {data.tokenizer_dir} has"
                f" {tokenizer.vocab_size} ids; raise model.vocab_size to at least that, or train a smaller tokenizer"
            )
        return tokenizer

    def index(prefixes: list[str], texts: list[str]) -> list[str]:
        """`prefixes`, and behind them that of the indexed texts."""
        if not texts:
            return prefixes
        topology.on_first(index_texts, texts, tokenizer, data)
        return [*prefixes, topology.together(cache_prefix, texts, tokenizer, data)]

    def open_windows(prefixes: list[str], key: str) -> WindowDataset:
        dataset = topology.together(
            WindowDataset,
            prefixes,
            data.block_size,
            config.model.vocab_size,
            reset_positions=data.reset_positions,
            mask_documents=data.mask_documents,
        )
        topology.together(check_tokenizer, dataset, tokenizer, key)
        return dataset

    tokenizer = topology.together(check_vocabulary)
    blend = None
    if data.format != "indexed":
        train = topology.together(streamed_files, data)
    elif data.blend:
        parts = [index(*found) for found in topology.together(resolve_blend, data.blend)]
        train = open_windows([prefix for part in parts for prefix in part], "data.blend")
        blend = topology.together(make_blend, data.blend, [len(part) for part in parts], train)
    else:
        key = "data.train_files"
        train = open_windows(index(*topology.together(resolve_files, data.train_files, key)), key)
    validation = {}
    for name, files in data.eval_sets.items():
        key = f"data.eval_files.{name}" if name else "data.eval_files"
        validation[name] = open_windows(index(*topology.together(resolve_files, files, key)), key)
    return Sources(train, blend, validation)


def open_loader(
    config: Config, topology: Topology, sources: Sources, accumulation: int
) -> TrainLoader | StreamingLoader:
    """What gives this rank's batches step by step."""
    data, training = config.data, config.training
    shared = {
        "micro_batch": training.per_device_train_batch_size,
        "accumulation": accumulation,
        "dp_rank": topology.data_rank,
        "dp_size": topology.grid.data,
        "seed": training.seed,
        "device": topology.device,
        "allow_changed_data": data.allow_changed_data,
    }
    if isinstance(sources.train, WindowDataset):
        return TrainLoader(sources.train, blend=sources.blend, prefetch=data.prefetch, **shared)
    return topology.together(
        StreamingLoader,
        sources.train,
        data.tokenizer_dir,
        block_size=data.block_size,
        json_key=data.json_key,
        split_on=data.split_on,
        shuffle_buffer=data.shuffle_buffer,
        workers=data.num_workers,
        reset_positions=data.reset_positions,
        mask_documents=data.mask_documents,
        gather=topology.gather_objects,
        **shared,
    )

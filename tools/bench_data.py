"""Measure building, reading and opening data on this machine, beside `tokenizers` alone and, if given, Megatron-LM.

    python tools/bench_data.py all --input corpus.jsonl --tokenizer-dir artifacts/tokenizer --megatron ../Megatron-LM

Prints each run and a table of medians for each section. Every run is a fresh process, and the rows of a section take
turns (A B C, A B C, ...), so that what else the machine does meets them all. "Peak" is the memory of the largest
process of a run, "CPU" is of all its processes together.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from megalite.errors import UserError, run_main

# Nothing larger is imported here: until it is another program, a process counts as large as the one that started it.

SECTIONS = ("build", "read", "startup", "memory")
RAW = "(a) encode_batch_fast"
RUN_SECONDS = 900  # no run takes as long, unless it hangs


@dataclass
class Run:
    """What one process and all that it started took."""

    wall: float  # seconds
    cpu: float  # seconds, of all processes
    peak: float  # MiB, of the largest process
    found: dict[str, float] = field(default_factory=dict)  # what a program of bench_data_rows.py says


@dataclass
class Row:
    """One line of a table."""

    name: str
    command: list[str]
    pair: str = ""
    """The prefix of the token files that it writes, which are compared and removed after each run."""
    optional: bool = False
    """Whether the others go on without it where it fails: the tokenizer may not suit it."""
    peer: bool = False
    """Whether it is not ours: the others go on where it fails, and it may write other tokens."""
    against: str = ""
    """The row that a ratio is given to, where that is not the table's first."""
    exit_codes: tuple[int, ...] = (0,)


class _Failed(Exception):
    """A process failed, and why."""


def program(name: str, **arguments: Any) -> list[str]:
    return [sys.executable, str(ROOT / "tools/bench_data_rows.py"), name, json.dumps(arguments)]


def run(command: list[str], folder: Path, exit_codes: tuple[int, ...] = (0,)) -> Run:
    """Run a command in `folder`. Raises `_Failed` with the last line that it printed."""
    with open(folder / "output.txt", "w+", encoding="utf-8", errors="replace") as output:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        clock = threading.Timer(RUN_SECONDS, os.killpg, (process.pid, signal.SIGKILL))
        clock.start()
        try:
            # Linux counts into a process what all processes that it waited for took, and the largest of their peaks.
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            clock.cancel()
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        last = ([line.strip() for line in output if line.strip()] or ["it printed nothing"])[-1]
    if process.returncode == -signal.SIGKILL and wall > RUN_SECONDS:
        raise _Failed(f"it was stopped after {RUN_SECONDS} s")
    if process.returncode not in exit_codes:
        raise _Failed(f"exit code {process.returncode}: {last.removeprefix('error: ')}")
    found = json.loads(last) if "bench_data_rows.py" in command[1] else {}
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, found)


def take_turns(rows: list[Row], repeats: int, folder: Path) -> dict[str, list[Run]]:
    """Runs of each row, A B C, A B C, ...; one that is optional and fails is left out, and said so."""
    runs: dict[str, list[Run]] = {row.name: [] for row in rows}
    hashes: dict[str, str] = {}
    width = max(len(row.name) for row in rows)
    for turn in range(repeats):
        for row in [row for row in rows if row.name in runs]:
            try:
                done = run(row.command, folder, row.exit_codes)
                pair = hash_pair(row.pair) if row.pair else ""
            except _Failed as error:
                if not (row.optional or row.peer):
                    raise UserError(f"{row.name} failed: {error}") from error
                print(f"left out: {row.name}: {error}", flush=True)
                del runs[row.name]
                continue
            if pair != hashes.setdefault("first", pair):
                if not row.peer:
                    raise UserError(f"{row.name} wrote other tokens than {rows[0].name}: that is a fault of ours")
                if turn == 0:
                    print(f"note: {row.name} wrote other tokens than {rows[0].name}")
            runs[row.name].append(done)
            found = "".join(f"  {key} {value:.6g}" for key, value in done.found.items())
            print(
                f"{turn + 1}/{repeats}  {row.name:{width}}  wall {done.wall:.2f} s  cpu {done.cpu:.2f} s  "
                f"peak {done.peak:.0f} MiB{found}",
                flush=True,
            )
    return runs


def hash_pair(prefix: str) -> str:
    """SHA-256 of a .bin and its .idx, which are removed with all that is named like them."""
    digest = hashlib.sha256()
    for suffix in (".bin", ".idx"):
        try:
            with open(prefix + suffix, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise _Failed(f"it wrote no {suffix}") from error
    for path in Path(prefix).parent.glob(Path(prefix).name + ".*"):
        path.unlink()
    return digest.hexdigest()


def print_table(header: list[str], lines: list[list[str]]) -> None:
    """A table as Markdown has it."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    print()
    for line in (header, ["-" * width for width in widths], *lines):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print(flush=True)


# ------------------------------------------------------------------------------------------------------------- sections


def build_rows(options: argparse.Namespace, corpus: Path, folder: Path) -> list[Row]:
    raw = {"input": str(corpus), "tokenizer_dir": options.tokenizer_dir, "prefix": str(folder / "raw")}
    rows = [Row(RAW, program("encode_batch_fast", **raw), raw["prefix"])]
    for encoder in ("tokenizers", "memo", "gigatoken"):
        if encoder == "gigatoken" and not importlib.util.find_spec(encoder):
            print('left out: gigatoken, which is not installed: pip install "megalite[fast]"')
            continue
        command = [*preprocess(options, corpus, folder / "ours"), "--encoder", encoder]
        rows.append(Row(f"ours, {encoder}", command, str(folder / "ours"), optional=encoder != "tokenizers"))
    script = Path(options.megatron or "", "tools/preprocess_data.py")
    if options.megatron and not script.is_file():
        print(f"left out: Megatron's preprocess_data.py: there is no {script}")
    elif options.megatron:
        command = [sys.executable, str(script), "--input", str(corpus), "--output-prefix", str(folder / "peer")]
        command += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", options.tokenizer_dir]
        command += ["--append-eod", "--workers", str(options.workers)]
        # 1: versions of 2026 end in a traceback of find_optimal_num_workers when all is written.
        pair = str(folder / "peer_text_document")
        rows.append(Row("Megatron", command, pair, peer=True, exit_codes=(0, 1)))
    return rows


def preprocess(options: argparse.Namespace, corpus: Path, prefix: Path) -> list[str]:
    command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(corpus)]
    command += ["--tokenizer-dir", options.tokenizer_dir, "--output-prefix", str(prefix)]
    return [*command, "--workers", str(options.workers)]


def bench_build(options: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "corpus.jsonl"
    print(f"## build: {clip(options.input, corpus, options.megabytes):.1f} MB, {options.workers} workers\n")
    tabulate_builds(take_turns(build_rows(options, corpus, folder), options.repeats, folder))


def bench_memory(options: argparse.Namespace, folder: Path) -> None:
    corpus = folder / "document.jsonl"
    size = one_document(options.input, corpus, options.document_megabytes)
    print(f"## memory: one document of {size:.1f} MB, {options.workers} workers\n")
    tabulate_builds(take_turns(build_rows(options, corpus, folder), options.repeats, folder))


def tabulate_builds(runs: dict[str, list[Run]]) -> None:
    walls = {name: median(run.wall for run in each) for name, each in runs.items()}
    lines = []
    for name, each in runs.items():
        cpu, peak = median(run.cpu for run in each), max(run.peak for run in each)
        line = [name, f"{walls[name]:.2f}", f"{cpu:.2f}", f"{peak:,.0f}", f"{walls[name] / walls[RAW]:.2f}"]
        lines.append([*line, f"{walls['Megatron'] / walls[name]:.1f}"] if "Megatron" in walls else line)
    header = ["row", "wall s", "CPU s", "peak MiB", "wall / (a)"]
    print_table([*header, "times as fast as Megatron"] if "Megatron" in walls else header, lines)


def bench_read(options: argparse.Namespace, folder: Path) -> None:
    corpus, pair = folder / "corpus.jsonl", str(folder / "pair")
    clip(options.input, corpus, options.megabytes)
    prepare(preprocess(options, corpus, folder / "once"), folder)
    manifest = json.loads((folder / "once.manifest.json").read_bytes())
    size = options.read_megabytes * 1_000_000
    made = prepare(program("repeat_pair", source=str(folder / "once"), prefix=pair, size=size), folder)
    print(f"## read: {made['tokens']:,} tokens, {made['documents']:,} documents, sequences of 2,048\n")
    common = {"prefix": pair, "vocab_size": manifest["vocab_size"], "seconds": options.read_seconds}
    peer = common | {"megatron": options.megatron, "eod_id": manifest["eod_id"]}
    rows = []
    for name, batch, documents in (
        ("windows", 0, False),
        ("batches of 8", 8, False),
        ("batches of 8, by document", 8, True),
    ):
        of_peer = f"GPTDataset, {name.replace('windows', 'samples')}"
        kind = {"batch": batch, "documents": documents}
        rows.append(Row(f"ours, {name}", program("read_windows", **common, **kind), against=of_peer))
        if options.megatron:
            rows.append(Row(of_peer, program("read_samples", **peer, **kind), peer=True))
    runs = take_turns(rows, options.repeats, folder)
    lines = []
    for row in (row for row in rows if row.name in runs):
        warm, cold, cold_cpu = (
            {name: median(run.found[key] for run in each) for name, each in runs.items()}
            for key in ("warm_cpu_us", "cold_us", "cold_cpu_us")
        )
        ratios = [f"{each[row.against] / each[row.name]:.1f}" if row.against in runs else "" for each in (warm, cold)]
        line = [row.name, f"{warm[row.name]:.1f}", f"{2048 / warm[row.name]:,.0f}", ratios[0]]
        lines.append([*line, f"{cold[row.name]:.0f}", f"{cold_cpu[row.name]:.0f}", ratios[1]])
    header = ["row", "warm: us CPU a sample", "M tokens a CPU-second", "times GPTDataset"]
    print_table([*header, "cold: us a sample", "us CPU", "times GPTDataset, cold"], lines)


def bench_startup(options: argparse.Namespace, folder: Path) -> None:
    prefix = str(folder / "many")
    prepare(program("make_pair", prefix=prefix, documents=options.documents), folder)
    print(f"## startup: {options.documents:,} documents, {os.path.getsize(prefix + '.idx') / 1e6:,.0f} MB of index\n")
    rows = [
        Row(f"ours, {name}", program("start_windows", prefix=prefix, cold=name == "cold")) for name in ("warm", "cold")
    ]
    for name in ("first start, warm", "later start, warm", "later start, cold") if options.megatron else ():
        kind = {"cold": name.endswith("cold"), "first": name.startswith("first")}
        command = program("start_samples", megatron=options.megatron, prefix=prefix, **kind)
        rows.append(Row(f"GPTDataset, {name}", command, peer=True))
    runs = take_turns(rows, options.repeats, folder)
    lines = []
    for name, each in runs.items():
        found = {key: median(run.found[key] for run in each) for key in each[0].found}
        seconds = [f"{found[key]:.2f}" for key in ("open_s", "first_batch_s", "cpu_s")]
        lines.append([name, *seconds, f"{found['own_mib']:,.0f}", f"{max(run.peak for run in each):,.0f}"])
    header = ["row", "open, s", "first batch, s", "CPU s", "own memory, MiB", "peak with pages of files, MiB"]
    print_table(header, lines)


def prepare(command: list[str], folder: Path) -> dict[str, float]:
    """Do what is not measured."""
    try:
        return run(command, folder).found
    except _Failed as error:
        raise UserError(f"cannot prepare the measurement: {error}") from error


def clip(source: str, path: Path, megabytes: float) -> float:
    """Copy lines from the beginning, until there are so many megabytes; returns how many there are."""
    with open(path, "wb") as out:
        for line in read_lines(source):
            out.write(line)
            if out.tell() >= megabytes * 1e6:
                break
        return out.tell() / 1e6


def one_document(source: str, path: Path, megabytes: float) -> float:
    """Write the texts of the first lines as one document of so many megabytes; returns how many there are."""
    texts, size = [], 0
    for number, line in enumerate(read_lines(source), 1):
        try:
            texts.append(json.loads(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{source}:{number}: no JSON object with a key "text"; give another --input') from error
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    text = "\n\n".join(texts).encode()[: int(megabytes * 1e6)].decode(errors="ignore")
    size = len(text.encode())
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    return size / 1e6


def read_lines(source: str) -> Iterator[bytes]:
    try:
        with open(source, "rb") as file:
            yield from file
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; --input is a .jsonl file with text") from error


# ----------------------------------------------------------------------------------------------------------- the whole


def print_machine(megatron: str | None) -> None:
    """What the figures hold for."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    versions = []
    for name in ("numpy", "tokenizers", "torch", "gigatoken"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{name} {importlib.metadata.version(name)}")
    if megatron:
        with contextlib.suppress(OSError):
            text = Path(megatron, "megatron/core/package_info.py").read_text()
            versions.append("megatron-core " + ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.M)))
    print(f"{time.strftime('%Y-%m-%d %H:%M')}; {cpu[1] if cpu else platform.machine()}, {os.cpu_count()} cores")
    print(f"Python {platform.python_version()}, {', '.join(versions)}")
    print(f"load at the start: {os.getloadavg()[0]:.2f} processes\n", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("section", nargs="+", choices=(*SECTIONS, "all"), help="what to measure")
    add("--input", metavar="FILE", help='a plain .jsonl with the key "text" (not needed by startup)')
    add("--tokenizer-dir", metavar="DIR", help="folder with tokenizer.json (not needed by startup)")
    add("--megatron", metavar="PATH", help="a checkout of Megatron-LM, or megatron-core unpacked, to measure beside")
    add("--workers", type=int, default=2, help="processes that tokenize, and threads of (a) (2)")
    add("--repeats", type=int, default=3, help="runs of each row (3)")
    add("--scratch", metavar="DIR", help="where temporary files go: 2 GB, on a disk for cold reads (the system's)")
    add("--megabytes", type=float, default=45, metavar="MB", help="of --input are built (45)")
    add("--read-megabytes", type=float, default=500, metavar="MB", help="of tokens are read from (500)")
    add("--read-seconds", type=float, default=1, metavar="S", help="of CPU that each row reads for (1)")
    add("--documents", type=int, default=50_000_000, metavar="N", help="are in the index that startup opens (50e6)")
    add("--document-megabytes", type=float, default=9.5, metavar="MB", help="has the document of memory (9.5)")
    options = parser.parse_args()
    for name, value in vars(options).items():
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if set(options.section) - {"startup"} and not (options.input and options.tokenizer_dir):
        raise UserError("give --input FILE.jsonl and --tokenizer-dir DIR: only startup does without")
    for name in ("input", "tokenizer_dir", "megatron"):  # runs have a folder of their own
        if getattr(options, name):
            setattr(options, name, os.path.abspath(getattr(options, name)))
    if options.megatron and not Path(options.megatron, "megatron/core/datasets").is_dir():
        raise UserError(f"--megatron: there is no megatron/core/datasets in {options.megatron}")
    return options


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as with Ctrl-C, what was started and written goes too
    print_machine(options.megatron)
    # For all that is run: readers measure one thread, and (a) gets as many as there are workers.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    chosen = SECTIONS if "all" in options.section else [each for each in SECTIONS if each in options.section]
    sections = {"build": bench_build, "read": bench_read, "startup": bench_startup, "memory": bench_memory}
    for name in chosen:
        try:
            folder = Path(tempfile.mkdtemp(prefix="bench-data-", dir=options.scratch))
        except OSError as error:
            raise UserError(f"cannot write to --scratch {options.scratch}: {error.strerror}") from error
        try:
            sections[name](options, folder)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --scratch") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_main(main)

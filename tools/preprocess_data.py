"""Tokenize text into PREFIX.bin and PREFIX.idx, Megatron's format, and PREFIX.manifest.json.

    python tools/preprocess_data.py --input "data/*.jsonl" --tokenizer-dir artifacts/tokenizer \\
        --output-prefix artifacts/data/train

Inputs are .jsonl, .txt (each also as .gz or .zst) and .parquet. An interrupted build goes on with the same command; the
output's bytes depend on neither --workers nor --encoder.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.assemble import BuildSummary
from megalite.data.documents import SPLIT_ON
from megalite.data.encoders import ENCODERS
from megalite.data.indexed import pair_paths
from megalite.data.tokenize import STDIN_FORMATS, build_indexed
from megalite.data.workers import ON_ERROR
from megalite.errors import run_main


def parse_arguments() -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help='files, folders, globs; "-": standard input')
    add("--tokenizer-dir", required=True, help="folder with tokenizer.json")
    add("--output-prefix", required=True, help="PREFIX of the files to write")
    add(
        "--json-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="the field of a .jsonl line, or column of a .parquet, that holds the text (text); several make a data set "
        "each, PREFIX-KEY",
    )
    add(
        "--split-on",
        choices=SPLIT_ON,
        default="none",
        help="what is one document in a .txt: the whole file (none), what stands between blank lines, each line",
    )
    add("--stdin-format", choices=STDIN_FORMATS, default="jsonl", help="what comes by standard input (jsonl)")
    add("--workers", type=int, default=2, help="processes that tokenize (2)")
    add(
        "--encoder",
        choices=ENCODERS,
        default="auto",
        help="all give the same tokens; auto: the fastest that is installed and proves it for this tokenizer",
    )
    add("--split", metavar="A,B", help="as 98,2: documents go to PREFIX-train and PREFIX-validation in this proportion")
    add("--seed", type=int, default=1234, help="of --split (1234)")
    add("--shuffle-seed", type=int, metavar="N", help="write the documents in an order drawn from N")
    add("--max-documents", type=int, metavar="N", help="take the first N documents")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end documents with the end token (the default)",
    )
    add(
        "--on-error",
        choices=ON_ERROR,
        default="fail",
        help="a document that can't be read ends the build (fail), or is left out and written to PREFIX.rejects.jsonl",
    )
    add(
        "--max-reject-fraction",
        type=float,
        default=0.01,
        metavar="F",
        help="with --on-error skip, more rejects than this share of all documents end the build (0.01)",
    )
    add("--overwrite", action="store_true", help="replace output, or an interrupted build, of other inputs or options")
    return vars(parser.parse_args())


def main() -> None:
    options = parse_arguments()
    start = time.monotonic()
    summaries = build_indexed(options.pop("input"), json_keys=options.pop("json_key"), **options)
    for each in summaries:
        print_summary(each, time.monotonic() - start)
    blank, rejects = summaries[0].blank_lines, summaries[0].rejects
    if blank:
        print(f"left out: {blank:,} blank lines")
    if rejects:
        print(f"left out: {rejects:,} documents that can't be read; see {options['output_prefix']}.rejects.jsonl")


def print_summary(each: BuildSummary, seconds: float) -> None:
    state = "up to date, nothing to do" if each.up_to_date else f"wrote in {seconds:.1f} s"
    print(
        f"{each.prefix}: {each.tokens:,} tokens, {each.documents:,} documents, "
        f"{each.text_bytes / each.tokens:.2f} bytes per token; {state}"
    )
    for path in pair_paths(each.prefix):
        print(f"  {path} ({path.stat().st_size:,} bytes)")
    if each.empty_documents:
        print(f"  left out: {each.empty_documents:,} empty documents")


if __name__ == "__main__":
    run_main(main)

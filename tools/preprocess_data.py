"""Tokenize .txt and .jsonl files into PREFIX.bin and PREFIX.idx, Megatron's format, and PREFIX.manifest.json.

    python tools/preprocess_data.py --input "data/*.jsonl" --tokenizer-dir artifacts/tokenizer \\
        --output-prefix artifacts/data/train
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.documents import SPLIT_ON
from megalite.data.indexed import pair_paths
from megalite.data.tokenize import build_indexed
from megalite.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="paths or globs: .txt, .jsonl")
    parser.add_argument("--tokenizer-dir", required=True, help="folder with tokenizer.json")
    parser.add_argument("--output-prefix", required=True, help="PREFIX of the files to write")
    parser.add_argument("--json-key", default="text", help="the field of a .jsonl line that holds the text (text)")
    parser.add_argument(
        "--split-on",
        choices=SPLIT_ON,
        default="none",
        help="what is one document in a .txt: the whole file (none; takes up to 140 times its size in memory), "
        "what stands between blank lines, each line",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that tokenize (2)")
    parser.add_argument(
        "--split", metavar="A,B", help="as 98,2: documents go to PREFIX-train and PREFIX-validation in this proportion"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of --split (1234)")
    parser.add_argument("--no-append-eod", action="store_true", help="don't end documents with the end token")
    parser.add_argument("--overwrite", action="store_true", help="replace output of other inputs or options")
    options = vars(parser.parse_args())
    inputs, append_eod = options.pop("input"), not options.pop("no_append_eod")
    start = time.monotonic()
    summaries = build_indexed(inputs, append_eod=append_eod, **options)

    for each in summaries:
        state = "up to date, nothing to do" if each.up_to_date else f"wrote in {time.monotonic() - start:.1f} s"
        print(
            f"{each.prefix}: {each.tokens:,} tokens, {each.documents:,} documents, "
            f"{each.text_bytes / each.tokens:.2f} bytes per token; {state}"
        )
        for path in pair_paths(each.prefix):
            print(f"  {path} ({path.stat().st_size:,} bytes)")
    if summaries[0].empty_documents or summaries[0].blank_lines:
        print(f"skipped: {summaries[0].empty_documents:,} empty documents, {summaries[0].blank_lines:,} blank lines")


if __name__ == "__main__":
    run_main(main)

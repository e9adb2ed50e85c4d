"""Train a byte-level BPE tokenizer on .txt and .jsonl files; writes a folder that Hugging Face reads too.

python tools/train_tokenizer.py --data-files "data/*.jsonl" --vocab-size 32000 --output-dir artifacts/tokenizer
"""

import argparse
import re
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.tokenizer import EOD, FILES, SAMPLE_BYTES, train_tokenizer
from megalite.errors import run_main

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def byte_count(text: str) -> int:
    """200000000, 200MB or 0.2GB; units are decimal."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f'"{text}" is not a size such as 200MB')
    return int(float(match[1]) * UNITS[match[2].upper()])


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e10 else f"{count / 1e9:,.1f} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-files",
        nargs="+",
        required=True,
        metavar="FILE",
        help="paths, globs or folders: .txt, .jsonl (also .gz, .zst), .parquet",
    )
    parser.add_argument("--vocab-size", type=int, required=True, help="tokens in all, the special ones included")
    parser.add_argument("--output-dir", required=True, help="folder of tokenizer.json and tokenizer_config.json")
    parser.add_argument(
        "--special-tokens", nargs="*", default=[], metavar="TOKEN", help=f"further special tokens; {EOD} is always id 0"
    )
    parser.add_argument("--min-frequency", type=int, default=2, help="a pair seen less often is not merged (2)")
    parser.add_argument(
        "--sample-bytes",
        type=byte_count,
        default=SAMPLE_BYTES,
        metavar="SIZE",
        help="train on about this much, spread over all files (200MB, which takes about 1.5 GB of memory)",
    )
    parser.add_argument("--json-key", default="text", help="the field of a .jsonl line that holds the text (text)")
    parser.add_argument("--seed", type=int, default=1234, help="of the sample (1234)")
    options = vars(parser.parse_args())
    summary = train_tokenizer(options.pop("data_files"), **options)

    percent = 100 * summary.sampled_bytes / summary.total_bytes
    print(
        f"sampled {megabytes(summary.sampled_bytes)} of {megabytes(summary.total_bytes)} ({percent:.3g} %) of text, "
        f"{summary.sampled_pieces:,} of {summary.total_pieces:,} pieces, {summary.files:,} file(s)"
    )
    if summary.vocab_size < summary.requested_vocab_size:
        print(
            f"note: the vocabulary came out at {summary.vocab_size:,} tokens, not {summary.requested_vocab_size:,}: "
            "the text has no further pair that is frequent enough (give more text, or a lower --min-frequency)"
        )
    print(f"vocabulary: {summary.vocab_size:,} tokens; end of document: {EOD} (id 0)")
    for name in FILES:
        print(f"wrote {Path(options['output_dir']) / name}")


if __name__ == "__main__":
    run_main(main)

"""Check PREFIX.bin/.idx pairs, ours, Megatron-LM's, gpt-neox's or Megatron-DeepSpeed's; the exit code is 1 on a fault.

python tools/validate_data.py artifacts/data/train --deep --tokenizer-dir artifacts/tokenizer --show 2
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.tokenizer import Tokenizer
from megalite.data.validate import Report, Shown, expand_prefixes, show_documents, validate
from megalite.errors import UserError, run_main


def print_report(report: Report, shown: list[Shown]) -> None:
    counts = (
        f"{report.dtype}, {report.documents:,} documents, {report.tokens:,} tokens, {report.bytes:,} bytes, "
        f"{'with a' if report.manifest is not None else 'no'} manifest; "
        if report.ok
        else ""
    )
    writer = f"written by {report.writer}" if report.writer else "writer unknown"
    print(f"{report.prefix}: {'ok' if report.ok else f'{len(report.faults)} fault(s)'}; {counts}{writer}")
    for each in report.faults:
        print(f"  fault ({each.kind}): {each.message}")
    for each in report.warnings:
        print(f"  warning ({each.kind}): {each.message}")
    if report.deep:
        print_deep(report.deep)
    for each in shown:
        print(f"  document {each.document:,} ({each.tokens:,} tokens): {each.text}")


def print_deep(deep: dict) -> None:
    ids = "no ids" if deep["lowest_id"] is None else f"ids from {deep['lowest_id']:,} to {deep['highest_id']:,}"
    known = deep["vocab_size"] is not None
    below = f"vocabulary {deep['vocab_size']:,}" if known else "no vocabulary known (--tokenizer-dir or --vocab-size)"
    if deep["eod_id"] is not None:
        ending = f"{deep['documents_ending_in_eod']:,} of {deep['documents_with_tokens']:,} end in EOD {deep['eod_id']}"
    elif deep["same_last_id"] is not None:
        ending = f"all documents end in the id {deep['same_last_id']} (--eod-id says what EOD is)"
    else:
        ending = "no EOD known (--tokenizer-dir or --eod-id)"
    print(f"  read in full: {ids}, {below}; {ending}; .bin SHA-256 {deep['bin_sha256']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="PREFIX, PREFIX.idx, or a glob of .idx files")
    parser.add_argument("--deep", action="store_true", help="read all of it: hashes, ids below the vocabulary, EOD")
    parser.add_argument("--tokenizer-dir", help="folder with tokenizer.json: what the ids should be of")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids are below this (the tokenizer's or manifest's)"
    )
    parser.add_argument(
        "--eod-id", type=int, metavar="ID", help="what documents end in (the tokenizer's or manifest's)"
    )
    parser.add_argument(
        "--show", type=int, default=0, metavar="N", help="decode the first N documents, and N spread out"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = parser.parse_args()
    if options.show < 0 or (options.vocab_size is not None and options.vocab_size < 1):
        raise UserError("--show must be at least 0, and --vocab-size at least 1")
    if options.show and not options.tokenizer_dir:
        raise UserError("--show needs --tokenizer-dir, to decode with")
    tokenizer = Tokenizer(options.tokenizer_dir) if options.tokenizer_dir else None
    sys.stdout.reconfigure(errors="backslashreplace")  # what a document holds may not fit the terminal's encoding
    results = []
    for prefix in expand_prefixes(options.prefix):
        report = validate(
            prefix,
            deep=options.deep,
            vocab_size=options.vocab_size,
            eod_id=options.eod_id,
            tokenizer=tokenizer,
            progress=True,
        )
        shown = show_documents(report, tokenizer, options.show) if options.show and report.readable else []
        if not options.json:
            print_report(report, shown)
        results.append(report.as_json() | {"show": [each._asdict() for each in shown]})
    ok = all(each["ok"] for each in results)
    if options.json:
        print(json.dumps({"ok": ok, "prefixes": results}, indent=2))
    return 0 if ok else 1


if __name__ == "__main__":
    run_main(main)

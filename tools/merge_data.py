"""Join PREFIX.bin/.idx pairs to one: their documents in the order given, a glob's sorted by name.

python tools/merge_data.py --input "artifacts/data/part-*" --output-prefix artifacts/data/train
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.indexed import pair_paths
from megalite.data.merge import merge_indexed
from megalite.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PREFIX", help="PREFIX, PREFIX.idx, or a glob of .idx files"
    )
    parser.add_argument("--output-prefix", required=True, help="PREFIX of the files to write")
    parser.add_argument("--widen", action="store_true", help="store different dtypes in one that holds all of them")
    parser.add_argument("--overwrite", action="store_true", help="replace output of other inputs")
    parser.add_argument("--json", action="store_true", help="the summary as one JSON object on standard output")
    options = parser.parse_args()
    start = time.monotonic()
    summary = merge_indexed(options.input, options.output_prefix, widen=options.widen, overwrite=options.overwrite)
    if options.json:
        files = {str(path): path.stat().st_size for path in pair_paths(summary.prefix)}
        print(json.dumps(asdict(summary) | {"files": files}, indent=2))
        return
    state = "up to date, nothing to do" if summary.up_to_date else f"wrote in {time.monotonic() - start:.1f} s"
    print(
        f"{summary.prefix}: {summary.tokens:,} tokens ({summary.dtype}), {summary.documents:,} documents, "
        f"of {summary.inputs:,} inputs; {state}"
    )
    for path in pair_paths(summary.prefix):
        print(f"  {path} ({path.stat().st_size:,} bytes)")
    for note in summary.notes:
        print(f"note: {note}")


if __name__ == "__main__":
    run_main(main)

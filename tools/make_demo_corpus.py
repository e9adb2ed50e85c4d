"""Write a corpus that every machine has, the text of Python's own standard library (about 30 MB), as corpus.jsonl.

python tools/make_demo_corpus.py --output-dir artifacts/demo
"""

import argparse
import hashlib
import json
import random
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.data.indexed import atomic_write
from megalite.errors import UserError, run_main

SHORTEST = 200  # characters; what is shorter is mostly an empty __init__.py
LEAST_BYTES = 1_000_000  # of text: a model can't be shown to learn from less
# Installed packages are not the standard library, and `encodings` is tables of numbers, which a sample then imitates.
EXCLUDED = {"site-packages", "dist-packages", "encodings"}


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of each different .py file under `folder`, in the order of the paths."""
    seen = set()
    for path in sorted(folder.rglob("*.py"), key=lambda each: each.relative_to(folder).as_posix()):
        name = path.relative_to(folder)
        if EXCLUDED.intersection(name.parts):
            continue
        try:
            content = path.read_bytes()
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError):  # the test package has files in other encodings on purpose
            continue
        digest = hashlib.sha256(content).digest()
        if len(text) >= SHORTEST and digest not in seen:
            seen.add(digest)
            yield name.as_posix(), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="artifacts/demo", help="folder of corpus.jsonl (artifacts/demo)")
    folder = Path(parser.parse_args().output_dir)
    path = folder / "corpus.jsonl"
    if path.is_file():
        print(f"{path} is there already ({path.stat().st_size / 1e6:.1f} MB)")
        return
    library = Path(sysconfig.get_path("stdlib"))
    rows = list(documents(library))
    size = sum(len(text.encode()) for _, text in rows)
    if size < LEAST_BYTES:
        raise UserError(
            f"{library} has only {size / 1e6:.2f} MB of Python source in {len(rows)} files: use a Python that is "
            "installed with its standard library as .py files"
        )
    random.Random(1234).shuffle(rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder}: {error.strerror}") from error
    lines = (json.dumps({"text": text, "path": name}, ensure_ascii=False) + "\n" for name, text in rows)
    atomic_write(path, (line.encode() for line in lines))
    print(f"{path}: {size / 1e6:.1f} MB of text, {len(rows):,} documents")
    if not (library / "test").is_dir():
        print("note: this Python comes without its `test` package, so the corpus is smaller than the usual 30 MB")


if __name__ == "__main__":
    run_main(main)

"""What a checkpoint holds: its step, tokens, layout and libraries, and of every tensor shape, norm and NaNs.

    python tools/inspect_checkpoint.py artifacts/checkpoints/small
    python tools/inspect_checkpoint.py artifacts/checkpoints/small/step-400 --verify --only blocks.0.
    python tools/inspect_checkpoint.py --diff A B

A folder of checkpoints stands for its newest. The exit code is 1 where a tensor holds a NaN or an infinity, or where
--diff finds a difference.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from megalite.errors import UserError, run_main
from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint


def main() -> int:
    options = parse_options()
    opened = [open_at(path) for path in options.checkpoints]
    for checkpoint in opened if options.verify else ():
        checkpoint.verify()
        print(f"{checkpoint.folder}: {len(checkpoint.files)} files have the size and SHA-256 that the manifest says")
    if options.diff:
        return diff(*opened, options.only)
    return describe(opened[0], options.only)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="DIR", help="a step-N folder, or one with such: newest")
    parser.add_argument("--verify", action="store_true", help="compare the SHA-256 of every file with the manifest")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="compare two checkpoints tensor by tensor")
    parser.add_argument("--only", default="", metavar="TEXT", help="tensors with TEXT in the parameter's name")
    options = parser.parse_args()
    if bool(options.diff) == bool(options.checkpoints) or len(options.checkpoints) > 1:
        raise UserError("give one checkpoint, or --diff and two")
    options.checkpoints = options.diff or options.checkpoints
    return options


def open_at(path: str) -> Checkpoint:
    folder = find_checkpoint(Path(path))
    if folder is None:
        raise UserError(f"{path}: there is no checkpoint (a step-N folder with manifest.json)")
    return Checkpoint(folder)


def names_with(checkpoint: Checkpoint, only: str) -> list[str]:
    """The parameters with `only` in their names. Raises UserError where there is none."""
    names = [name for name in checkpoint.index if only in name]
    if not names:
        raise UserError(f"{checkpoint.folder}: no parameter has {only!r} in its name")
    return names


def describe(checkpoint: Checkpoint, only: str) -> int:
    names = names_with(checkpoint, only)
    print("\n".join(heading(checkpoint)))
    width = max(map(len, names))
    lost = 0
    for name in names:
        shape = " x ".join(map(str, checkpoint.index[name][0]))
        print(f"\n{name:{width}}  {shape}")
        for key, tensor in checkpoint.tensors(name, checkpoint.stored_moments(name)).items():
            bad = int((~tensor.isfinite()).sum())
            lost += bad
            told = f"{bad:,} of {tensor.numel():,} not finite ({int(tensor.isnan().sum()):,} NaN)" if bad else ""
            print(f"  {key:<10}  norm {norm(tensor):<12.6g}  largest {tensor.abs().max():<12.6g}  {told}".rstrip())
    print(f"\n{lost:,} numbers are not finite" if lost else "\nall numbers are finite")
    return 1 if lost else 0


def heading(checkpoint: Checkpoint) -> list[str]:
    manifest, state = checkpoint.manifest, checkpoint.state
    numbers = sum(torch.Size(entry[0]).numel() for entry in checkpoint.index.values())
    size = sum(entry["bytes"] for entry in checkpoint.files.values())
    lines = [
        f"{checkpoint.folder}: {numbers:,} parameters in {len(checkpoint.index)} tensors, {size / 1e9:,.2f} GB in"
        f" {len(checkpoint.files)} files"
    ]
    if checkpoint.weights_only:
        lines.append("weights alone, without an optimizer: for --init-from")
    else:
        lines.append(
            f"step {state['step']:,}, of which {state['adam_step']:,} were applied; {state['tokens']:,} tokens; next is"
            f" sample {state['data']['consumed_samples']:,} of data {state['data']['fingerprint'][:12]}, seed"
            f" {state['data']['seed']}; {checkpoint.optimizer}"
        )
    if isinstance(layout := manifest.get("layout"), dict):
        deepspeed = f"; {name}" if (name := checkpoint.config.get("deepspeed")) else ""
        lines.append(f"written by {', '.join(f'{key} {value}' for key, value in layout.items())}{deepspeed}")
    if isinstance(libraries := manifest.get("libraries"), dict):
        lines.append(f"under {', '.join(f'{name} {version}' for name, version in libraries.items())}")
    if state.get("branched_from"):
        lines.append(f"a branch of {state['branched_from']}")
    return lines


def diff(a: Checkpoint, b: Checkpoint, only: str) -> int:
    """Of each tensor, the norm of the difference over that of the first, and the largest difference."""
    print(f"A {a.folder}, step {a.step:,}\nB {b.folder}, step {b.step:,}")
    names = dict.fromkeys((*names_with(a, only), *names_with(b, only)))
    width = max(map(len, names))
    differing = tensors = 0
    for name in names:
        if name not in a.index or name not in b.index:
            print(f"{name:{width}}  only in {'A' if name in a.index else 'B'}")
            differing += 1
            continue
        if a.index[name][0] != b.index[name][0]:
            print(f"{name:{width}}  {a.index[name][0]} in A, {b.index[name][0]} in B")
            differing += 1
            continue
        keys = tuple(key for key in a.stored_moments(name) if key in b.stored_moments(name))
        others = b.tensors(name, keys)
        for key, tensor in a.tensors(name, keys).items():
            tensors += 1
            if not torch.equal(tensor, others[key]):
                apart = tensor - others[key]
                print(
                    f"{name:{width}}  {key:<10}  relative {relative(apart, tensor):<10.3g}"
                    f"  largest {apart.abs().max():.3g}"
                )
                differing += 1
    print(f"{differing} of {tensors} tensors differ" if differing else f"all {tensors} tensors are the same to the bit")
    return 1 if differing else 0


def norm(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def relative(apart: Tensor, tensor: Tensor) -> float:
    return norm(apart) / norm(tensor) if tensor.any() else float("inf")


if __name__ == "__main__":
    run_main(main)

"""Write a checkpoint as a Hugging Face folder: Llama, or Qwen3 for a model with QK-norm.

    python tools/export_hf.py --checkpoint artifacts/checkpoints/small --output artifacts/hf/small --dtype bf16 --verify

It needs one CPU and the memory of one parameter, whatever layout wrote the checkpoint. The folder opens with
transformers, vLLM and lm-eval: config.json, safetensors, the tokenizer, generation_config.json. It appears when it is
complete. --verify then loads both models in fp32 and compares their logits, which takes the memory for both.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.errors import UserError, run_main


def main() -> int:
    options = parse_arguments()

    # Only now: torch takes seconds to import, and --help or a mistyped option should not.
    from megalite import generation
    from megalite.interop import hf

    dtype = hf.DTYPES[options.dtype]
    checkpoint, tokenizer = generation.open_checkpoint(options.checkpoint)
    checkpoint.verify()
    hf.export_model(checkpoint, tokenizer, options.output, dtype)
    print(f"wrote {options.output}: step {checkpoint.step} of {checkpoint.folder} in {options.dtype}")
    if not options.verify:
        return 0
    if find_spec("transformers") is None:
        print("not verified: transformers is not installed (pip install transformers)")
        return 0
    difference, largest = hf.compare_logits(generation.load_model(checkpoint), options.output, dtype)
    if not difference <= hf.TOLERANCE * max(1.0, largest):  # nan is no success
        raise UserError(
            f"{options.output}: transformers gives logits that differ by {difference:.2g} where the largest is"
            f" {largest:.2g}; do not use this export, and report it"
        )
    print(f"verified: transformers' logits differ by at most {difference:.1e}; the largest is {largest:.1f}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a step-N folder, or one with such: newest")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder; must not hold files")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the weights (fp32)")
    parser.add_argument("--verify", action="store_true", help="compare logits with transformers, if it is installed")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)

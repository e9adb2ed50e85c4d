"""Make a Llama or Qwen3 folder of Hugging Face a checkpoint of weights to start training from, at any layout.

    python tools/import_hf.py --model downloads/llama --output artifacts/imported/llama
    deepspeed megalite/pretrain.py --config artifacts/imported/llama/model.yaml --init-from artifacts/imported/llama ...

It needs one CPU and the memory of one tensor. Only safetensors are read: never a pickle, and no code of the model's.
What our model does not have (scaled RoPE, biases, sliding windows, other architectures) is refused.
"""

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.errors import run_main


def main() -> int:
    options = parse_arguments()

    # Only now: torch takes seconds to import, and --help or a mistyped option should not.
    from megalite.interop import hf

    model = hf.import_model(options.model, options.output)
    print(
        f"wrote {options.output}: {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size};"
        f" train on with --config {options.output / 'model.yaml'} --init-from {options.output}"
        f" --tokenizer-dir {options.output / 'tokenizer'}"
    )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="the folder with config.json and the safetensors"
    )
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="the new folder; must not hold files")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)

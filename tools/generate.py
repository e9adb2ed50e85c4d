"""Print how a trained model goes on from prompts.

    python tools/generate.py --checkpoint artifacts/checkpoints --prompt "def " --temperature 0.8 --top-p 0.95

A prompt is read as the beginning of a document: the end-of-document token, which stands between documents in training,
is put before it (not with --no-bos). Text in a prompt that looks like a special token is ordinary text.
The same seed gives the same text for a prompt, whatever other prompts are given.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from megalite.errors import UserError, run_main


def main() -> int:
    options = parse_arguments()

    # Only now: torch takes seconds to import, and --help or a mistyped option should not.
    import torch

    from megalite import generation

    sampling = generation.Sampling(options.temperature, options.top_k, options.top_p)
    if options.num_samples > 1 and options.temperature == 0:
        raise UserError("--num-samples: at temperature 0 all samples are the same; give --temperature 0.8, say")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no GPU here; use --device cpu")
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.precision]

    checkpoint, tokenizer = generation.open_checkpoint(options.checkpoint)
    n_positions = checkpoint.model.n_positions
    # All of them before the weights, so that one that is too long is refused at once.
    prompts = [
        (prompt, generation.encode_prompt(tokenizer, prompt, n_positions, not options.no_bos))
        for prompt in options.prompt
    ]
    stage = generation.load_model(checkpoint, device, dtype)

    stream = not (options.json or options.no_stream)
    jobs = [(prompt, tokens, sample) for prompt, tokens in prompts for sample in range(options.num_samples)]
    for number, (prompt, tokens, sample) in enumerate(jobs):
        if not options.json:
            write(("\n" if number else "") + (prompt if stream else ""))
        result = generation.generate(
            stage,
            tokenizer,
            tokens,
            max_new_tokens=options.max_new_tokens,
            sampling=sampling,
            seed=generation.sample_seed(options.seed, prompt, sample),
            ignore_eod=options.ignore_eod,
            on_text=write if stream else None,
        )
        if options.json:
            record = {
                "prompt": prompt,
                "text": result.text,
                "tokens": result.tokens,
                "finish_reason": result.finish_reason,
            }
            write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            write("\n" if stream else f"{prompt}{result.text}\n")
        if result.finish_reason == "length" and len(result.tokens) < options.max_new_tokens:
            print(
                f"stopped after {len(result.tokens)} of {options.max_new_tokens} new tokens: with the prompt's"
                f" {len(tokens)} the model's limit is reached (model.n_positions = {n_positions})",
                file=sys.stderr,
            )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a step-N folder, or one with such: newest")
    parser.add_argument(
        "--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help='several may be given; "" is none'
    )
    parser.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="for each prompt (128)")
    parser.add_argument("--num-samples", type=positive, default=1, metavar="N", help="texts for each prompt (1)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (0.8)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0: all (0)")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that have probability P (1.0)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the draws (1234)")
    parser.add_argument("--ignore-eod", action="store_true", help="go on after an end-of-document token")
    parser.add_argument("--no-bos", action="store_true", help="the prompt is from within a document: nothing before it")
    parser.add_argument("--no-stream", action="store_true", help="print each text when it is complete")
    parser.add_argument(
        "--json", action="store_true", help="a line for each text: prompt, text, tokens, finish_reason (eod, length)"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and arithmetic (fp32)"
    )
    return parser.parse_args()


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main_of_a_pipe() -> int:
    """`main`; quiet where the reader, such as `head`, has gone."""
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        return main()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails too
        return 1


if __name__ == "__main__":
    run_main(main_of_a_pipe)

"""Text from a trained model: loading a checkpoint's weights, sampling, decoding with a key/value cache.

Shapes: s sequence, b batch (1 here), v padded vocabulary, n candidates for the next token.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megalite import kernels
from megalite.data.tokenizer import Tokenizer
from megalite.errors import UserError
from megalite.layers.attention import KVCache
from megalite.model.gpt import Stage
from megalite.training.checkpoint_reader import Checkpoint, find_checkpoint

# Tokens of a prompt that pass through the model at once: their logits [s, b, v] are most of the memory it takes.
PREFILL_CHUNK = 512


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the restrictions apply in the order of the fields.

    temperature: divides the logits; 0 takes the likeliest token (greedy). top_k: only the k likeliest; 0: all.
    top_p: only the fewest likeliest tokens that together have at least this probability (arXiv:1904.09751).
    Where logits tie, the lower id counts as likelier. Raises UserError where a value makes no sense.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        # Beyond these bounds logits / temperature overflows fp32 or loses all differences.
        if self.temperature != 0 and not 1e-6 <= self.temperature <= 1e6:
            raise UserError(f"temperature {self.temperature:g}: give 0 (greedy) or something from 1e-6 to 1e6")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: give 0 (all tokens) or how many of the likeliest may be drawn")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p {self.top_p:g}: give a probability above 0 and at most 1")


@dataclass(frozen=True)
class Generation:
    """What followed a prompt: the new token ids and their text, without the prompt and the token that ended it.

    finish_reason: "eod" (the model ended the document) or "length" (max_new_tokens or n_positions).
    """

    text: str
    tokens: list[int]
    finish_reason: str


def open_checkpoint(path: str | Path) -> tuple[Checkpoint, Tokenizer]:
    """The checkpoint at `path`, a step-N folder or one that holds such (then the newest), and its own tokenizer.

    Raises UserError where there is none, it is damaged, or its tokenizer has ids that the model does not.
    """
    folder = find_checkpoint(Path(path))
    if folder is None:
        raise UserError(f"{path}: there is no checkpoint (a step-N folder with manifest.json)")
    checkpoint = Checkpoint(folder)
    if "tokenizer/tokenizer.json" not in checkpoint.files:
        raise UserError(f"{folder} holds no tokenizer (tokenizer/tokenizer.json); use another checkpoint")
    tokenizer = Tokenizer(folder / "tokenizer")
    if tokenizer.vocab_size > checkpoint.model.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} ids, but its model.vocab_size is"
            f" {checkpoint.model.vocab_size}; use another checkpoint"
        )
    return checkpoint, tokenizer


def load_model(checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Stage:
    """The checkpoint's model in evaluation mode; its weights come one by one, so host memory holds no second copy.

    Raises UserError where the tensors are not those of the model that the checkpoint's configuration describes.
    """
    kernels.use(checkpoint.model.kernels)
    if kernels.problem(torch.device(device).type):  # trained on a GPU, say, and now on a CPU
        kernels.use("auto")
    with torch.device("meta"):  # draws no initial weights
        stage = Stage(checkpoint.model, seed=0)
    checkpoint.check_shapes({p.global_name: p.global_shape for p in stage.parameters()})
    weights: dict[str, nn.Parameter] = {}
    for name, tensor in checkpoint.weights():
        if list(tensor.shape) != checkpoint.index[name][0] or tensor.dtype != torch.float32:
            raise UserError(
                f"damaged checkpoint: {checkpoint.folder}: {name} is {list(tensor.shape)} {tensor.dtype}, index.json"
                f" says {checkpoint.index[name][0]} and the format fp32; use another checkpoint"
            )
        weights[name] = nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    for module in stage.modules():
        for attribute, parameter in list(module.named_parameters(recurse=False)):
            # By name: a tied head and the embedding get the same object again.
            setattr(module, attribute, weights[parameter.global_name])
    return stage.eval()


def encode_prompt(tokenizer: Tokenizer, prompt: str, n_positions: int, bos: bool = True) -> list[int]:
    """Token ids of a prompt as a document's beginning: after the end-of-document token, which in training stands
    between documents. Without `bos` as a passage from anywhere; an empty prompt always begins with that token.

    Raises UserError where the prompt is longer than the model's n_positions, or not valid Unicode.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # how Python passes on arguments that are not UTF-8
        raise UserError(f"prompt {prompt!a} is not valid UTF-8") from error
    tokens = tokenizer.encode(prompt)
    if bos or not tokens:
        tokens = [tokenizer.eod_id, *tokens]
    if len(tokens) > n_positions:
        raise UserError(
            f"a prompt has {len(tokens)} tokens, but the model's limit is model.n_positions = {n_positions};"
            f" shorten it: {prompt[:40]!r}..."
        )
    return tokens


def generate(
    stage: Stage,
    tokenizer: Tokenizer,
    prompt_tokens: Sequence[int],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int = 0,
    ignore_eod: bool = False,
    on_text: Callable[[str], None] | None = None,
) -> Generation:
    """Continue a prompt (`encode_prompt`) until the model ends the document, or by `max_new_tokens`, or as far as
    n_positions allows for prompt and new tokens together.

    seed: see `sample_seed`. ignore_eod: go on after the end-of-document token, which then is part of the text.
    on_text gets the text bit by bit, as soon as its characters are complete; together the bits are the text.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    stream = TextStream(tokenizer)
    limit = min(max_new_tokens, stage.model.n_positions - len(prompt_tokens))
    finish_reason = "length"
    for token in _tokens(stage, prompt_tokens, limit, sampling, generator):
        if token == tokenizer.eod_id and not ignore_eod:
            finish_reason = "eod"
            break
        text = stream.push(token)
        if text and on_text is not None:
            on_text(text)
    text = stream.flush()
    if text and on_text is not None:
        on_text(text)
    return Generation(stream.sent, stream.tokens, finish_reason)


@torch.inference_mode()
def _tokens(
    stage: Stage, prompt_tokens: Sequence[int], limit: int, sampling: Sampling, generator: torch.Generator
) -> Iterator[int]:
    """`limit` new tokens, one by one."""
    if limit <= 0:
        return
    weight = stage.embedding.weight
    caches = new_caches(stage, len(prompt_tokens) + limit)
    tokens = torch.tensor([list(prompt_tokens)], device=weight.device)  # [b, s]
    for produced in range(1, limit + 1):
        logits = next_logits(stage, tokens, caches)
        token = choose(logits, sampling, generator)
        yield token
        if produced < limit:
            tokens = torch.tensor([[token]], device=weight.device)


def new_caches(stage: Stage, max_length: int) -> list[KVCache]:
    """An empty cache a block, for one sequence of up to `max_length` tokens, where and as the weights are."""
    model, weight = stage.model, stage.embedding.weight
    return [
        KVCache(1, model.kv_heads, max_length, model.head_size, weight.dtype, weight.device)
        for _ in range(model.num_layers)
    ]


def next_logits(stage: Stage, tokens: Tensor, caches: list[KVCache], chunk: int = PREFILL_CHUNK) -> Tensor:
    """Logits [v] of the token after `tokens` [1, s], which follow what the caches hold and are added to it."""
    for part in tokens.split(chunk, dim=1):
        logits = stage(part, caches=caches)  # [s, b, v]
    return logits[-1, 0]


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from logits [v]. The draw is made on the CPU: a seed means the same on every device, but for rounding.

    Raises UserError where logits are nan or infinite: the weights are of a run that diverged.
    """
    logits = logits.float()
    highest, best = logits.max(dim=0)
    if not math.isfinite(highest):
        raise UserError("the model's logits are not finite numbers: the run diverged; use an earlier checkpoint")
    if sampling.temperature == 0:
        return int(best)
    ids, probabilities = candidates(logits, sampling)
    return int(ids[torch.multinomial(probabilities.cpu(), 1, generator=generator).item()])


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Ids [n] that may be drawn from logits [v] at a temperature above 0, and their probabilities [n].

    Ids whose logit is -inf (padding of the vocabulary) are never among them.
    """
    ids = torch.nonzero(logits > -torch.inf).squeeze(1)
    # Relative to the highest, so that a low temperature makes no infinities.
    scaled = (logits.float()[ids] - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(ids) or sampling.top_p < 1:
        scaled, order = scaled.sort(descending=True, stable=True)  # stable: ties keep the order of ids
        ids = ids[order]
    if sampling.top_k:
        ids, scaled = ids[: sampling.top_k], scaled[: sampling.top_k]
    if sampling.top_p < 1:
        likelier = scaled.double().softmax(0).cumsum(0).roll(1)  # the probability of all that stand before
        likelier[0] = 0
        n = int((likelier < sampling.top_p).sum())
        ids, scaled = ids[:n], scaled[:n]
    return ids, scaled.softmax(0)


def sample_seed(seed: int, prompt: str, sample: int = 0) -> int:
    """The seed of one text. It follows from the prompt, not from its place among others, so a prompt's texts stay
    the same whatever else is generated; `sample` tells apart several of one prompt."""
    digest = hashlib.sha256(f"{seed}:{sample}:{prompt}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch's generators take 63 bits everywhere


class TextStream:
    """Tokens in, text out: only characters that no later token can change. A character's UTF-8 bytes may be spread
    over several tokens; until the last has come they decode to U+FFFD, which is held back.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self.sent = ""

    def push(self, token: int) -> str:
        """The text that has become certain with `token`; may be empty."""
        self.tokens.append(token)
        # All tokens again, as a decoder may look at neighbours: for a thousand about 0.1 ms, far below a forward.
        return self._send(self.tokenizer.decode(self.tokens).rstrip("\ufffd"))

    def flush(self) -> str:
        """The rest, after the last token; bytes that are no character come as U+FFFD."""
        return self._send(self.tokenizer.decode(self.tokens))

    def _send(self, text: str) -> str:
        new = text[len(self.sent) :]
        self.sent += new
        return new

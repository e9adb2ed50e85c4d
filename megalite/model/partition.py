"""Which decoder layers each part of a pipelined model holds, and what such a part costs. Pure; imports no torch.

The model is cut into `chunks` parts that follow each other: the first has the embedding in front, the last the final
norm and the head behind.
"""

from megalite.config import Config, ModelConfig
from megalite.errors import ConfigError
from megalite.model.flops import count_parameters, flops_per_token


def partition(model: ModelConfig, chunks: int, sequence: int, explicit: list[int] | None = None) -> list[range]:
    """The decoder layers of each chunk, such that the most expensive chunk costs as little as it can (`chunk_flops`).

    Each chunk gets at least one layer. Where layers are left over, they go to chunks as late as possible: the early
    stages of a pipeline hold the activations of more micro-batches.

    explicit: the number of layers of each chunk instead (parallel.layers); the first and the last may have none, the
    embedding or the head alone. Raises ConfigError where the numbers do not fit the model.
    """
    if explicit is not None:
        return _ranges(_checked(explicit, model.num_layers, chunks))
    layers = model.num_layers
    if chunks > layers:
        raise ConfigError(
            f"parallel.pipeline x parallel.virtual = {chunks} parts, but model.num_layers = {layers}, and each part "
            f"needs one; make it at most {layers}, or give parallel.layers, whose first and last number may be 0"
        )
    if chunks == 1:
        return [range(layers)]
    head, block = _head_flops(model, sequence), _block_flops(model, sequence)
    front = chunks - 1

    def largest_cost(last: int) -> float:
        return max(-(-(layers - last) // front) * block, last * block + head)

    # All blocks cost the same: the number in the last chunk decides the rest. Of equals the most, for an evener front.
    last = min(range(1, layers - front + 1), key=lambda last: (largest_cost(last), -last))
    each, left_over = divmod(layers - last, front)
    return _ranges([each] * (front - left_over) + [each + 1] * left_over + [last])


def layers_of_chunks(config: Config) -> list[range]:
    """What `partition` makes of a whole configuration."""
    parallel = config.parallel
    return partition(config.model, parallel.pipeline * parallel.virtual, config.data.block_size, parallel.layers)


def chunk_flops(model: ModelConfig, layers: int, sequence: int, *, last: bool) -> float:
    """Forward and backward of one token through a chunk, counted as in `flops_per_token`; the look-up is free.

    Recomputation, which makes blocks dearer beside the head, does not count.
    """
    return layers * _block_flops(model, sequence) + (_head_flops(model, sequence) if last else 0.0)


def chunk_parameters(model: ModelConfig, layers: int, *, first: bool, last: bool) -> int:
    """Parameters of a chunk, without the padding of the vocabulary. A tied head far from the embedding has a copy."""
    one_block = count_parameters(_resized(model, 1)) - count_parameters(_resized(model, 0))
    vocabulary = model.vocab_size * model.hidden_size
    head = model.hidden_size + (0 if model.tie_embeddings and first else vocabulary)  # the final norm is with it
    return layers * one_block + (vocabulary if first else 0) + (head if last else 0)


def _head_flops(model: ModelConfig, sequence: int) -> float:
    return flops_per_token(_resized(model, 0), sequence)


def _block_flops(model: ModelConfig, sequence: int) -> float:
    return flops_per_token(_resized(model, 1), sequence) - _head_flops(model, sequence)


def _resized(model: ModelConfig, layers: int) -> ModelConfig:
    return model.model_copy(update={"num_layers": layers})  # unvalidated: no config has 0


def _checked(counts: list[int], layers: int, chunks: int) -> list[int]:
    shown = ", ".join(map(str, counts))
    if len(counts) != chunks:
        raise ConfigError(
            f"parallel.layers = [{shown}] has {len(counts)} numbers, but parallel.pipeline x parallel.virtual makes "
            f"{chunks} parts; give one number for each"
        )
    if sum(counts) != layers:
        raise ConfigError(
            f"parallel.layers = [{shown}] is {sum(counts)} layers in all, but model.num_layers = {layers}; make them "
            "the same"
        )
    if any(count < 0 for count in counts) or 0 in counts[1:-1]:
        raise ConfigError(
            f"parallel.layers = [{shown}]: a part needs a layer; only the first (the embedding alone) and the last "
            "(the head alone) may have 0"
        )
    return counts


def _ranges(counts: list[int]) -> list[range]:
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]

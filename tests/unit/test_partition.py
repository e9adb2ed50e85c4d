"""Decoder layers over the parts of a pipeline: the best cut there is, and what is refused."""

from itertools import combinations, pairwise

import pytest

from megalite.config import ModelConfig
from megalite.errors import ConfigError
from megalite.model.flops import count_parameters, flops_per_token
from megalite.model.partition import chunk_flops, chunk_parameters, partition


def a_model(layers: int, vocab_size: int = 1000, **changes) -> ModelConfig:
    return ModelConfig(num_layers=layers, vocab_size=vocab_size, hidden_size=64, num_heads=4, **changes)


def sizes(ranges: list[range]) -> list[int]:
    return [len(each) for each in ranges]


def largest_cost(model: ModelConfig, counts: list[int]) -> float:
    last = len(counts) - 1
    return max(chunk_flops(model, count, 128, last=c == last) for c, count in enumerate(counts))


@pytest.mark.parametrize("vocab_size", [1, 1000, 5000, 200_000])  # the head costs from 0 to 170 blocks
@pytest.mark.parametrize("layers", [1, 2, 5, 9])
def test_no_cut_is_better(layers, vocab_size):
    model = a_model(layers, vocab_size)
    for chunks in range(1, layers + 1):
        found = partition(model, chunks, 128)
        assert [i for each in found for i in each] == list(range(layers))
        assert min(sizes(found)) >= 1
        cuts = ([0, *inner, layers] for inner in combinations(range(1, layers), chunks - 1))
        every = [[end - start for start, end in pairwise(cut)] for cut in cuts]
        assert largest_cost(model, sizes(found)) == min(largest_cost(model, counts) for counts in every)


@pytest.mark.parametrize(
    ("model", "chunks", "want"),
    [
        (a_model(8, 1), 4, [2, 2, 2, 2]),
        (a_model(9, 1), 4, [2, 2, 3, 2]),  # early stages hold more activations
        (a_model(12, 2000), 4, [3, 3, 4, 2]),  # the head costs one block and a half
        (a_model(6, 100_000), 3, [2, 3, 1]),
        (a_model(5), 1, [5]),
        (a_model(3), 3, [1, 1, 1]),
    ],
)
def test_the_last_part_has_fewer_layers_and_what_is_left_over_goes_late(model, chunks, want):
    assert sizes(partition(model, chunks, 128)) == want


@pytest.mark.parametrize("tied", [True, False])
def test_parts_add_up_to_the_model(tied):
    model = a_model(7, 3000, tie_embeddings=tied, qk_norm=True, num_kv_heads=2)
    counts = sizes(partition(model, 3, 128))
    flops = [chunk_flops(model, count, 128, last=c == 2) for c, count in enumerate(counts)]
    assert sum(flops) == pytest.approx(flops_per_token(model, 128), rel=1e-12)
    parameters = [chunk_parameters(model, count, first=c == 0, last=c == 2) for c, count in enumerate(counts)]
    copy = model.vocab_size * model.hidden_size if tied else 0  # the last stage needs the embedding too
    assert sum(parameters) == count_parameters(model) + copy
    assert chunk_parameters(model, 7, first=True, last=True) == count_parameters(model)


@pytest.mark.parametrize("explicit", [[4, 2], [0, 6], [6, 0], [0, 6, 0], [0, 3, 3, 0], [6]])
def test_explicit_numbers_are_taken(explicit):
    found = partition(a_model(6), len(explicit), 128, explicit)
    assert sizes(found) == explicit
    assert [i for each in found for i in each] == list(range(6))


@pytest.mark.parametrize(
    ("chunks", "explicit", "message"),
    [
        (
            8,
            None,
            "parallel.pipeline x parallel.virtual = 8 parts, but model.num_layers = 6, and each part needs one; make "
            "it at most 6, or give parallel.layers, whose first and last number may be 0",
        ),
        (
            3,
            [3, 3],
            "parallel.layers = [3, 3] has 2 numbers, but parallel.pipeline x parallel.virtual makes 3 parts; give one "
            "number for each",
        ),
        (
            2,
            [3, 4],
            "parallel.layers = [3, 4] is 7 layers in all, but model.num_layers = 6; make them the same",
        ),
        (
            3,
            [3, 0, 3],
            "parallel.layers = [3, 0, 3]: a part needs a layer; only the first (the embedding alone) and the last "
            "(the head alone) may have 0",
        ),
    ],
)
def test_refused(chunks, explicit, message):
    with pytest.raises(ConfigError) as caught:
        partition(a_model(6), chunks, 128, explicit)
    assert str(caught.value) == message

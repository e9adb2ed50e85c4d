"""What ranks send in a step and hold between steps is what the formulas of docs/parallelism.md say, to the byte."""

import pytest

from tests.dist.parity_cases import results

pytestmark = pytest.mark.dist

SEQUENCE, HIDDEN, VOCABULARY, HEADS = 16, 32, 64, 8 * 8  # of the tiny model; HEADS: number of heads x their width
FP32 = 4
SCALARS = 8  # bytes; sums of the loss, of valid tokens, of the norm
RANKS = 2  # of each group here


@pytest.fixture(scope="module")
def counts() -> dict:
    return results("counts")


@pytest.fixture(scope="module")
def memory() -> dict:
    return results("memory")


def given(report: dict, group: str, operation: str) -> tuple[int, int]:
    """(how often, bytes in all), without scalars."""
    some = [(times, size) for *kind, size, times in report["seen"] if kind == [group, operation] and size > SCALARS]
    return sum(times for times, _ in some), sum(times * size for times, size in some)


def sent(report: dict) -> float:
    """Bytes that a rank sends where collectives go round a ring (Patarasuk and Yuan, 2009), scalars left out."""
    rounds = {"all_reduce": 2 * (RANKS - 1) / RANKS, "reduce_scatter": (RANKS - 1) / RANKS, "all_gather": RANKS - 1}
    rounds |= {"all_to_all": (RANKS - 1) / RANKS, "send": 1}
    return sum(rounds[operation] * size * times for _, operation, size, times in report["seen"] if size > SCALARS)


def parameters(report: dict) -> int:
    return sum(report["sizes"].values())


def activation(report: dict) -> int:
    """Bytes of hidden, [s, b, h] in fp32."""
    return FP32 * SEQUENCE * report["sequences"] * HIDDEN


@pytest.mark.parametrize(
    ("stage", "name"), [*((stage, f"zero{stage}") for stage in range(4)), *((s, f"bf16 zero{s}") for s in (1, 2, 3))]
)
def test_zero(counts, stage, name):
    """Under ZeRO-0 bf16 is autocast, with gradients of fp32."""
    report, width = counts[name][0], 2 if "bf16" in name else FP32
    size, m = parameters(report) * width, report["micro_batches"]
    embedding = report["sizes"]["embedding.weight"] * width
    assert m > 1
    reduced = {0: size, 1: size, 2: m * size, 3: 0}[stage]
    gathered = {0: 0, 1: size, 2: size, 3: size + (m - 1) * embedding}[stage]
    assert given(report, "zero", "all_reduce")[1] == reduced
    assert given(report, "zero", "reduce_scatter")[1] == (m * size if stage == 3 else 0)
    assert given(report, "zero", "all_gather")[1] == gathered // RANKS
    assert sent(report) == reduced + (m * size / 2 if stage == 3 else 0) + gathered / 2


def test_zero_3_between_memory_and_traffic(counts):
    """Its knobs: everything once a step, or everything for each use; the trace of fetches stays as it was."""
    report = counts["resident"][0]
    m, tensors, size = report["micro_batches"], len(report["sizes"]), parameters(report) * FP32
    embedding = report["sizes"]["embedding.weight"] * FP32  # used twice, as it is tied
    once, each = size + (m - 1) * embedding, 2 * m * (size + embedding)
    assert given(report, "zero", "all_gather") == (tensors + m - 1, once // RANKS)
    assert given(counts["resident, at once"][0], "zero", "all_gather") == (m, once // RANKS)
    assert given(counts["streamed"][0], "zero", "all_gather") == (2 * m * (tensors + 1), each // RANKS)
    between = given(counts["between"][0], "zero", "all_gather")
    assert once // RANKS < between[1] < each // RANKS
    assert between[0] < tensors + 10  # in buckets


def test_prefetch_stays_valid(counts):
    """No fetch differs from the recorded ones, until an evaluation comes between."""
    reports = [report for reports in counts.values() for report in reports]
    assert [report["invalidated"] for report in counts["evaluated"]] == [[4], [4]]
    assert sum(bool(report["invalidated"]) for report in reports) == 2


@pytest.mark.parametrize(("name", "again"), [("tensor", 0), ("tensor, selective", 0), ("tensor, full", 2)])
def test_tensor_parallel(counts, name, again):
    """Two all-reduces a layer forward and two backward, one of the embedding, one of the head; recomputation's own."""
    for report in counts[name]:
        m, layers = report["micro_batches"], report["layers"]
        times = m * ((4 + again) * layers + 2)
        assert given(report, "tensor", "all_reduce") == (times, times * activation(report))
        numbers = 5 * SEQUENCE * report["sequences"]  # of each token, for the loss
        assert given(report, "tensor", "all_gather") == (m, m * numbers * FP32)


def test_sequence_parallel(counts):
    for report in counts["sequence"]:
        m, layers, tokens = report["micro_batches"], report["layers"], SEQUENCE * report["sequences"]
        gathers, scatters, norms = 6 * layers + 3, 4 * layers + 2, 2 * layers + 1
        gathered = m * (gathers * activation(report) // RANKS + 5 * tokens * FP32)
        assert given(report, "tensor", "all_gather") == (m * (gathers + 1), gathered)
        assert given(report, "tensor", "reduce_scatter") == (m * scatters, m * scatters * activation(report))
        assert given(report, "tensor", "all_reduce") == (m * norms, m * norms * HIDDEN * FP32)


@pytest.mark.parametrize(("name", "virtual"), [("pipeline", 1), ("virtual", 2)])
def test_pipeline(counts, name, virtual):
    for report in counts[name]:
        times = report["micro_batches"] * (2 * virtual - 1)  # at either end one way leads nowhere
        assert given(report, "pipeline", "send") == (times, times * activation(report))
        assert given(report, "pipeline", "all_reduce") == (1, VOCABULARY * HIDDEN * FP32)  # the tied embedding


def test_context_parallel(counts):
    """Queries, keys, values and the result change places in each layer, and so do their gradients."""
    for report in counts["context"]:
        times = report["micro_batches"] * 8 * report["layers"]
        size = FP32 * SEQUENCE // RANKS * report["sequences"] * HEADS
        assert given(report, "context", "all_to_all") == (times, times * size)


def test_all_together(counts):
    """Tensor, sequence and pipeline parallelism under ZeRO-3, which gathers everything once: the whole of a step."""
    for rank, report in enumerate(counts["together"]):
        first = rank < 4
        m, layers, size = report["micro_batches"], report["layers"], parameters(report) * FP32
        embedding = report["sizes"]["embedding.weight"] * FP32
        tokens = SEQUENCE * report["sequences"]
        gathers = (6 * layers + (1 if first else 2)) * activation(report) / 2
        gathers += 0 if first else 5 * tokens * FP32
        scatters = (4 * layers + 1) * activation(report) / 2
        norms = (2 * layers + (0 if first else 1)) * HIDDEN * FP32
        message = activation(report) / 2  # each tensor-parallel rank sends its part of the sequence
        zero = m * size / 2 + (size + (m - 1) * embedding * first) / 2
        tied = embedding / RANKS  # the ZeRO ranks' parts of its gradient
        assert sent(report) == m * (gathers + scatters + norms + message) + zero + tied


# What is held, under ZeRO-3 x tensor 2 x pipeline 2 x data 2


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_each_rank_holds_an_eighth(memory, precision, width):
    """Plus a constant: norms, which tensor-parallel ranks hold alike, and of which the last stage has one more."""
    whole = memory["whole"]["parameters"]
    norms = 9 * HIDDEN
    for rank, held in enumerate(memory[precision]):
        own = (4 if rank < 4 else 5) * HIDDEN / 2  # of its stage, divided by ZeRO alone
        elements = whole / 8 + own - norms / 8
        assert held["parameters"] == elements * width
        assert held["gradients"] == elements * FP32
        assert held["optimizer"] == 3 * elements * FP32  # fp32 weights and two moments
        assert own - norms / 8 < 0.01 * whole


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_rank_ever_gathers_more_than_a_layer(memory, precision):
    """Of those of its own stage and tensor-parallel part; with ZeRO-3 set to hold as little as it can."""
    for held in memory[precision]:
        assert held["gathered"] == 0
        assert held["most gathered"] == memory["whole"]["largest"] / 2

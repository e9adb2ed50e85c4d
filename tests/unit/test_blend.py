"""The mix of a blend at every point, and which window each sample of a run is."""

import random
from fractions import Fraction

import numpy as np
import pytest

from megalite.data.blend import Apportionment, Blend, SampleOrder, exact_shares
from megalite.data.permutation import KeyedPermutation

# A checkpoint's position means these very orders; a change here breaks every resume.
GOLDEN_SOURCES = [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]
GOLDEN_WINDOWS = [3, 0, 4, 1, 2, 5, 1, 2, 4, 0]


def random_shares(seed):
    """From two sources to 60, of like weights, of wildly different ones, or many tiny ones beside a large one."""
    rng = random.Random(seed)
    count = rng.choice([2, 3, 5, 60])
    match seed % 3:
        case 0:
            return [rng.randint(1, 9) for _ in range(count)]
        case 1:
            return [int(10 ** rng.uniform(0, 12)) for _ in range(count)]
        case _:
            return [10**6, *(rng.randint(1, 30) for _ in range(count - 1))]


def by_definition(weights, samples):
    """The order as its definition says it, in fractions: among the released the earliest deadline, then the first."""
    taken, order = [0] * len(weights), []
    for position in range(1, samples + 1):
        released = [i for i, w in enumerate(weights) if w * position > taken[i]]
        source = min(released, key=lambda i: (-(-(taken[i] + 1) // weights[i]), i))
        order.append((source, taken[source]))
        taken[source] += 1
    return order


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([3.0, 6.0], [1, 2]),
        ([1e-7, 1.0], [1, 10**7]),
        ([1.3e12, 7e11], [13, 7]),
        ([0.1 + 0.2, 0.3], [30000000000000004, 30000000000000000]),
        ([5.0], [1]),
    ],
)
def test_weights_are_their_decimal_text(weights, shares):
    common = np.gcd.reduce(shares)
    assert exact_shares(weights) == [share // int(common) for share in shares]


@pytest.mark.parametrize("weights", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_weights_that_are_none(weights):
    with pytest.raises(ValueError, match="weights must be positive"):
        exact_shares(weights)


@pytest.mark.parametrize("seed", range(18))
def test_the_mix_is_within_one_sample_of_the_weights_at_every_point(seed):
    shares = np.array(random_shares(seed), dtype=object)  # Python's integers: exact
    apportionment = Apportionment(shares.tolist())
    taken = np.zeros(len(shares), dtype=object)
    for position in range(1, 1501):
        source, own = apportionment(position - 1)
        assert own == taken[source]
        taken[source] += 1
        assert (abs(taken * apportionment.period - shares * position) < apportionment.period).all(), position


@pytest.mark.parametrize("seed", range(9))
def test_order_is_the_one_defined(seed):
    shares = random_shares(seed)
    weights = [Fraction(share, sum(shares)) for share in shares]
    assert list(map(Apportionment(shares), range(300))) == by_definition(weights, 300)


def test_a_period_gives_each_its_share_and_the_next_is_alike():
    shares = [5, 2, 9, 1]
    order = list(map(Apportionment(shares), range(3 * 17)))
    sources = [source for source, _ in order]
    assert [sources[:17].count(i) for i in range(4)] == shares
    assert sources[:17] == sources[17:34] == sources[34:]


@pytest.mark.parametrize("shares", [[7, 3], [123456789, 987654321, 5]])
def test_samples_can_be_asked_for_in_any_order(shares):
    forward = list(map(Apportionment(shares), range(200)))
    anywhere = Apportionment(shares)
    for sample in random.Random(1).choices(range(200), k=100):
        assert anywhere(sample) == forward[sample]


def test_a_sample_far_away_costs_its_period_only():
    periods = 10**15
    assert Apportionment([7, 3])(10 * periods + 5) == (1, 3 * periods + 1)


@pytest.mark.parametrize("shares", [[], [1, 0], [-1]])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="shares must be positive"):
        Apportionment(shares)


def test_without_a_blend_the_order_is_the_keyed_permutation_of_each_epoch():
    order = SampleOrder(10, seed=1234)
    epochs = [[KeyedPermutation(10, 1234, epoch)(i) for i in range(10)] for epoch in range(3)]
    assert [order(k) for k in range(30)] == [window for epoch in epochs for window in epoch]
    assert order(3) == epochs[0][3]


def test_each_source_is_visited_once_an_epoch_in_an_order_of_its_own():
    blend = Blend(["a", "b", "c"], [0.5, 0.25, 0.25], [20, 40, 43])
    order = SampleOrder(43, seed=7, blend=blend)
    windows = [order(k) for k in range(160)]
    parts = [[w - start for w in windows if start <= w < end] for start, end in ((0, 20), (20, 40), (40, 43))]
    assert [len(part) for part in parts] == [80, 40, 40]
    first, second = ([tuple(part[i : i + 20]) for i in range(0, len(part), 20)] for part in parts[:2])
    assert all(sorted(epoch) == list(range(20)) for epoch in (*first, *second))
    assert len({*first, *second}) == 6  # two sources of one size do not go the same way either
    assert all(sorted(parts[2][i : i + 3]) == [0, 1, 2] for i in range(0, 39, 3))


def test_order_of_a_blend_is_reproducible():
    blend = Blend(["a", "b"], [2.0, 1.0], [4, 6])
    order = SampleOrder(6, seed=1234, blend=blend)
    assert [Apportionment(blend.shares)(k)[0] for k in range(10)] == GOLDEN_SOURCES
    assert [order(k) for k in range(10)] == GOLDEN_WINDOWS


def test_epochs_are_those_of_the_windows_drawn():
    blend = Blend(["a", "b"], [0.9, 0.1], [7, 1007])
    order = SampleOrder(1007, seed=1, blend=blend)
    drawn = [order(k) < 7 for k in range(500)]
    for samples in (0, 1, 10, 499):
        epochs = blend.epochs(samples)
        assert abs(epochs["a"] - sum(drawn[:samples]) / 7) < 1 / 7
        assert abs(epochs["b"] - (samples - sum(drawn[:samples])) / 1000) < 1 / 1000


def test_fingerprint_depends_on_what_is_drawn_from_where():
    base = ("print", [0.7, 0.3], [5, 9])
    others = [("other", [0.7, 0.3], [5, 9]), ("print", [0.6, 0.4], [5, 9]), ("print", [0.7, 0.3], [4, 9])]
    prints = [Blend(["a", "b"], weights, ends).fingerprint(data) for data, weights, ends in (base, *others)]
    assert len(set(prints)) == 4
    # The same proportions, and other paths: the same samples.
    assert Blend(["c", "d"], [7.0, 3.0], [5, 9]).fingerprint("print") == prints[0]


@pytest.mark.parametrize(("weights", "ends"), [([1.0], [3, 4]), ([1.0, 1.0], [3, 3]), ([1.0, 1.0], [0, 3])])
def test_no_blend(weights, ends):
    with pytest.raises(ValueError, match="no blend"):
        Blend(["a", "b"], weights, ends)

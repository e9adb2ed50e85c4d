"""The learning rate: end points and monotony of every schedule."""

from itertools import pairwise

import pytest

from megalite.config import TrainingConfig
from megalite.training.lr_schedule import learning_rate_at, wsd_decay_steps

PEAK, LOW = 1e-3, 1e-4
DECAYING = ["cosine", "linear", "wsd"]


def rates(schedule: str, max_steps: int, warmup: int = 0, decay: int | None = None) -> list[float]:
    """The rates of steps 1 .. max_steps."""
    training = TrainingConfig(
        learning_rate=PEAK, min_learning_rate=LOW, lr_schedule=schedule, warmup_steps=warmup, decay_steps=decay
    )
    return [learning_rate_at(step, training, max_steps) for step in range(1, max_steps + 1)]


@pytest.mark.parametrize("schedule", [*DECAYING, "constant"])
def test_warmup_is_linear_from_zero_to_the_peak(schedule):
    got = rates(schedule, 100, warmup=20)
    assert got[:20] == pytest.approx([PEAK * step / 20 for step in range(1, 21)])


@pytest.mark.parametrize("schedule", DECAYING)
@pytest.mark.parametrize("warmup", [0, 1, 20, 99])
def test_decay_falls_from_the_peak_to_the_minimum_at_the_last_step(schedule, warmup):
    got = rates(schedule, 100, warmup)
    after = got[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))
    assert got[-1] == pytest.approx(LOW, rel=1e-9)
    assert all(LOW * (1 - 1e-9) <= rate <= PEAK for rate in after)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_the_first_step_without_warmup_is_almost_the_peak(schedule):
    assert 0.98 * PEAK < rates(schedule, 100)[0] < PEAK


def test_cosine_and_linear_at_the_middle():
    middle = (PEAK + LOW) / 2
    for schedule in ("cosine", "linear"):
        assert rates(schedule, 120, warmup=20)[70 - 1] == pytest.approx(middle)
    # A quarter of the way, the cosine is above the line: (1 + cos(pi / 4)) / 2 of the way up.
    assert rates("cosine", 120, warmup=20)[45 - 1] == pytest.approx(LOW + (PEAK - LOW) * 0.8535533906)
    assert rates("linear", 120, warmup=20)[45 - 1] == pytest.approx(LOW + (PEAK - LOW) * 0.75)


def test_constant_stays():
    assert rates("constant", 50, warmup=10)[9:] == [PEAK] * 41


def test_wsd_is_flat_then_linear():
    got = rates("wsd", 100, warmup=10, decay=20)
    assert got[9:80] == [PEAK] * 71
    assert got[80:] == pytest.approx([PEAK - (PEAK - LOW) * i / 20 for i in range(1, 21)])


def test_wsd_decays_over_a_tenth_of_the_run_by_default():
    got = rates("wsd", 200)
    assert got[179] == PEAK
    assert got[180] < PEAK


@pytest.mark.parametrize("schedule", [*DECAYING, "constant"])
def test_a_warmup_longer_than_the_run_just_warms_up(schedule):
    assert rates(schedule, 10, warmup=40) == pytest.approx([PEAK * step / 40 for step in range(1, 11)])


@pytest.mark.parametrize("schedule", [*DECAYING, "constant"])
def test_a_warmup_that_fills_the_run_ends_at_the_peak(schedule):
    assert rates(schedule, 10, warmup=10)[-1] == PEAK


@pytest.mark.parametrize("schedule", DECAYING)
def test_a_run_of_one_step(schedule):
    assert rates(schedule, 1) == pytest.approx([LOW])
    assert rates(schedule, 1, warmup=1) == [PEAK]


def test_wsd_decay_never_reaches_into_the_warmup():
    training = TrainingConfig(lr_schedule="wsd", warmup_steps=97)
    assert wsd_decay_steps(training, 100) == 3
    assert wsd_decay_steps(training, 97) == 1
    assert wsd_decay_steps(training, 5) == 1

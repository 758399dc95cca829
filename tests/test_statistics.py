"""Intervals against known values and against their promised coverage."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_vlm.report.statistics import (
    Interval,
    bootstrap_interval,
    paired_bootstrap,
    paired_seed_interval,
    seed_interval,
)

floats = st.floats(-1e3, 1e3, allow_nan=False)


def test_t_interval_equals_the_textbook() -> None:
    # s = 1.5811, t(4, 0.975) = 2.7764, half width = 2.7764 x 1.5811 / sqrt(5)
    interval = seed_interval([1, 2, 3, 4, 5])
    assert interval.mean == 3
    assert interval.low == pytest.approx(3 - 1.96324, abs=1e-4)
    assert interval.high == pytest.approx(3 + 1.96324, abs=1e-4)
    assert (interval.n, interval.over, interval.method) == (5, "seeds", "95 % t interval over 5 seeds")


@pytest.mark.parametrize(("n", "t"), [(3, 4.302653), (10, 2.262157), (30, 2.045230)])
def test_t_quantiles(n: int, t: float) -> None:
    values = [0.0] * (n - 1) + [1.0]
    spread = float(np.std(values, ddof=1)) / math.sqrt(n)
    interval = seed_interval(values)
    assert interval.high is not None
    assert (interval.high - interval.mean) / spread == pytest.approx(t, rel=1e-6)


def test_t_interval_covers_as_promised() -> None:
    rng = random.Random(1)
    hits = 0
    for _ in range(2000):
        interval = seed_interval([rng.gauss(10, 2) for _ in range(4)])
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 10 <= interval.high
    assert 0.935 < hits / 2000 < 0.965


@pytest.mark.parametrize(("values", "method"), [([7.0], "one seed"), ([6.0, 8.0], "mean of two seeds")])
def test_no_interval_below_three_seeds(values: list[float], method: str) -> None:
    assert seed_interval(values) == Interval(7.0, None, None, f"{method}, no interval below three", len(values))
    assert seed_interval(values).excludes_zero is None


def test_a_diverged_seed_leaves_no_interval() -> None:
    interval = seed_interval([0.4, math.nan, 0.5])
    assert interval.low is None
    assert interval.to_json()["mean"] is None
    assert interval.show(2) == "–"


def test_pairing_by_seed_takes_seed_noise_out() -> None:
    noise = {0: -3.0, 1: 0.5, 2: 4.0, 3: 1.0}
    paired = paired_seed_interval({s: 1 + e for s, e in noise.items()}, {**noise, 9: 100.0})
    assert paired is not None
    assert (paired.mean, paired.low, paired.high, paired.n) == (1, 1, 1, 4)
    assert paired.method == "95 % paired t interval over 4 seeds"
    assert paired_seed_interval({0: 1.0}, {1: 1.0}) is None


def test_bootstrap_of_a_share_is_near_the_normal_interval() -> None:
    credits = [1.0] * 800 + [0.0] * 200
    interval = bootstrap_interval(credits)
    half = 1.96 * 100 * math.sqrt(0.8 * 0.2 / 1000)
    assert interval.mean == pytest.approx(80)
    assert interval.low == pytest.approx(80 - half, abs=0.25)
    assert interval.high == pytest.approx(80 + half, abs=0.25)
    assert interval.method == "95 % bootstrap over 1,000 questions, one seed: says nothing about seed noise"
    assert interval == bootstrap_interval(credits)
    assert interval != bootstrap_interval([*credits[:-1], 0.5])


def test_paired_bootstrap_is_tighter_where_questions_are_hard_for_both() -> None:
    rng = random.Random(0)
    hard = [rng.random() for _ in range(600)]
    theirs = [float(h < 0.70) for h in hard]
    ours = [float(h < 0.73) for h in hard]
    paired = paired_bootstrap(ours, theirs)
    shuffled = paired_bootstrap(sorted(ours), theirs)
    assert paired.excludes_zero
    assert not shuffled.excludes_zero
    assert paired.mean == pytest.approx(shuffled.mean)
    label = "95 % paired bootstrap over 600 questions, one seed: says nothing about seed noise"
    assert (paired.method, paired.over) == (label, "questions")
    assert "two seeds averaged" in paired_bootstrap(ours, theirs, n_seeds=2).method


def test_paired_bootstrap_covers_as_promised() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        ours, theirs = rng.random(150) < 0.6, rng.random(150) < 0.5
        interval = paired_bootstrap(ours.astype(float).tolist(), theirs.astype(float).tolist())
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 10 <= interval.high
    assert 0.90 <= hits / 200 <= 0.99


def test_a_large_test_set() -> None:
    interval = bootstrap_interval([1.0, 0.0] * 5000)
    assert "10,000 questions" in interval.method
    assert interval.mean == 50
    assert interval.low == pytest.approx(50 - 0.98, abs=0.1)


def test_a_bootstrap_over_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        bootstrap_interval([])
    with pytest.raises(ValueError, match="zip"):
        paired_bootstrap([1.0], [])


@given(st.lists(floats, min_size=3, max_size=12), floats, st.floats(0.1, 10))
def test_t_interval_moves_and_scales_with_its_data(values: list[float], shift: float, scale: float) -> None:
    before, after = seed_interval(values), seed_interval([scale * v + shift for v in values])
    assert before.low is not None
    assert after.low is not None
    assert after.low == pytest.approx(scale * before.low + shift, abs=1e-6 * scale * 1e4)


def test_intervals_as_text() -> None:
    seeds = Interval(0.834, -0.1, 1.768, "m", 5)
    assert seeds.show(2, "%") == "0.83 ± 0.93 %"
    assert seeds.show(2, signed=True) == "+0.83 [−0.10, +1.77]"
    questions = Interval(91.24, 90.83, 91.65, "m", 900, over="questions")
    assert questions.show(2, "%") == "91.24 % [90.83, 91.65]"
    assert Interval(0.3, None, None, "m", 1).show(4) == "0.3000"

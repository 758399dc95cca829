"""The objective of a search: what the words mean, in numbers, and what is refused."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.search.objective import LOSS, Objective

UNIFORM = {"gqa": 50.0, "pope": 80.0, "mme": 1200.0}
TRIAL = {"gqa": 55.0, "pope": 72.0, "mme": 1500.0}


def test_relative_is_the_mean_of_ratios() -> None:
    assert Objective().values(TRIAL, UNIFORM, 2.0) == (pytest.approx((1.1 + 0.9 + 1.25) / 3),)
    assert Objective().values(UNIFORM, UNIFORM, 2.0) == (pytest.approx(1.0),)


def test_a_baseline_of_zero_counts_in_points() -> None:
    baseline = {"gqa": 50.0, "mme": 0.0}
    assert Objective().values({"gqa": 50.0, "mme": 30.0}, baseline, 2.0) == (pytest.approx((1.0 + 1.3) / 2),)
    assert Objective().values(baseline, baseline, 2.0) == (pytest.approx(1.0),)


def test_the_other_kinds() -> None:
    assert Objective.parse("gqa").values(TRIAL, {}, 2.0) == (55.0,)
    assert Objective.parse("loss").values({}, {}, 2.0) == (-2.0,)
    assert Objective.parse("gqa=2,pope=1").values(TRIAL, UNIFORM, 2.0) == (pytest.approx((2 * 1.1 + 0.9) / 3),)
    assert Objective.parse("pareto:pope, gqa").values(TRIAL, {}, 2.0) == (72.0, 55.0)
    assert [Objective.parse(text).n_values for text in ("relative", "gqa", "loss", "pareto:gqa,pope")] == [1, 1, 1, 2]
    assert [Objective.parse(text).needs_baseline for text in ("relative", "gqa=1", "gqa", "loss")] == [1, 1, 0, 0]
    assert Objective.parse("pareto:gqa,pope").names == ("gqa", "pope")


@pytest.mark.parametrize("text", ["relative", "loss", "gqa", "gqa=2,pope=0.1", "gqa=1", "pareto:gqa,pope,mme"])
def test_text_comes_back(text: str) -> None:
    assert str(Objective.parse(text)) == text
    assert Objective.parse(str(Objective.parse(text))) == Objective.parse(text)
    assert len(Objective.parse(text).names) == Objective.parse(text).n_values


SCORES = st.fixed_dictionaries({name: st.floats(0, 100) for name in UNIFORM})


@given(SCORES, SCORES, SCORES, st.floats(0, 1))
def test_values_are_affine_in_the_scores(
    one: dict[str, float], other: dict[str, float], baseline: dict[str, float], share: float
) -> None:
    baseline = {name: score if score > 1 else 0.0 for name, score in baseline.items()}
    between = {name: share * one[name] + (1 - share) * other[name] for name in one}
    for text in ("relative", "gqa", "gqa=2,mme=1", "pareto:gqa,pope"):
        objective = Objective.parse(text)
        at_one, at_other, here = (objective.values(s, baseline, 1.0) for s in (one, other, between))
        assert here == pytest.approx(tuple(share * a + (1 - share) * b for a, b in zip(at_one, at_other, strict=True)))
        assert [LOSS in dict(affine.weights) for affine in objective.affine(baseline)] == [False] * objective.n_values


@pytest.mark.parametrize("text", ["", "best:gqa", "gqa,pope", "gqa=x", "gqa=0", "gqa=-1", "gqa=1,gqa=2", "pareto:gqa"])
def test_what_is_no_objective(text: str) -> None:
    with pytest.raises(ConfigError, match="objective"):
        Objective.parse(text)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"measured are gqa, pope, mme\. Did you mean 'gqa'\?"):
        Objective.parse("gqq").check(UNIFORM)
    with pytest.raises(ConfigError, match="use 'loss'"):
        Objective().check(())
    Objective.parse("pareto:gqa,mme").check(UNIFORM)
    with pytest.raises(ConfigError, match="needs the score of 'mme', and this trial has gqa"):
        Objective().values({"gqa": 1.0}, {"gqa": 1.0, "mme": 2.0}, 1.0)
    with pytest.raises(DataError, match="diverged"):
        Objective.parse("loss").values({}, {}, math.nan)
    assert Objective.parse("gqa").values(TRIAL, {}, math.nan) == (55.0,), "a loss that nobody asked for"
    with pytest.raises(ConfigError, match="weights come with"):
        Objective("relative", (), (1.0,))
    with pytest.raises(ConfigError, match="is unknown"):
        Objective("best")  # type: ignore[arg-type]

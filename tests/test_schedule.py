"""The rank schedule: stages as text, scaling, budget, JSON, table, and the paper's Table V."""

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_vlm.allocation import AllocationRequest, Budget, uniform
from hydra_vlm.config import Config
from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph, preset
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule, Scaling, format_stages, hand_schedule, parse_stages

TINY = llama_graph("tiny", 3, hidden=8, feed_forward=24)


@pytest.mark.parametrize("text", ["1-8,9-12,13-24", "1-24", "13-24,1-8+10,9+11-12", "24,1-23"])
def test_stages_round_trip(text: str) -> None:
    assert format_stages(parse_stages(text, 24)) == text


def test_stages_are_zero_based_and_forgive_spaces() -> None:
    assert parse_stages(" 1 - 2 + 4 , 3", 4) == ((0, 1, 3), (2,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1-3,5-6", "layer 4 is in no stage"),
        ("1-3,3-6", "layer 3 is in more than one stage"),
        ("1-7", "within layers 1-6"),
        ("0-6", "within layers 1-6"),
        ("3-1,4-6", "within layers 1-6"),
        ("1-3,,4-6", "does not parse"),
        ("", "does not parse"),
        ("all", "does not parse"),
    ],
)
def test_bad_stages(text: str, message: str) -> None:
    with pytest.raises(StageError, match=message):
        parse_stages(text, 6)


@pytest.mark.parametrize(
    ("scaling", "scale", "alpha"),
    [
        (Scaling(), 2.0, 32.0),
        (Scaling("constant", 0.5), 0.5, 8.0),
        (Scaling("fixed", 256), 16.0, 256.0),
        (Scaling("rslora", 8), 2.0, 32.0),
        (Scaling("balanced", 2.0, 4), 1.0, 16.0),
    ],
)
def test_scaling(scaling: Scaling, scale: float, alpha: float) -> None:
    assert math.isclose(scaling.scale(16), scale)
    assert math.isclose(scaling.alpha(16), alpha)
    assert math.isclose(scaling.alpha(7) / 7, scaling.scale(7))


def test_bad_scaling() -> None:
    with pytest.raises(ConfigError, match="balanced, constant, fixed, rslora"):
        Scaling("linear")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="positive"):
        Scaling("fixed", 0)
    with pytest.raises(ConfigError, match="'rslora' has no standard rank"):
        Scaling("rslora", 2.0, 4)
    with pytest.raises(ConfigError, match="1 or more, got 0"):
        Scaling("balanced", 2.0, 0)
    with pytest.raises(ConfigError, match="needs the budget's uniform rank"):
        Scaling("balanced").scale(4)


@given(st.floats(1e-3, 1e3), st.integers(1, 512), st.lists(st.integers(1, 512), min_size=21, max_size=21))
def test_balanced_modules_step_as_far_as_those_of_uniform_lora(value: float, rank: int, ranks: list[int]) -> None:
    schedule = RankSchedule(
        "z", TINY, tuple(ranks), rank * TINY.cost + TINY.cost - 1, scaling=Scaling("balanced", value)
    )
    assert schedule.scaling == Scaling("balanced", value, rank)
    assert schedule.scaling.scale(rank) == value  # uniform LoRA's, to the bit
    for r, (scale, step) in schedule.steps().items():
        assert math.isclose(scale * math.sqrt(r), value * math.sqrt(rank))
        assert math.isclose(schedule.scaling.alpha(r) / r, scale)
        assert math.isclose(schedule.scaling.stabilised().scale(r), scale)
        assert math.isclose(step, 1)
    assert RankSchedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


def test_the_standard_rank_is_the_budgets_unless_it_was_said() -> None:
    ranks = (1,) * 21
    kept = RankSchedule("wide", TINY, ranks, 8 * TINY.cost, scaling=Scaling("balanced", 2.0, 4))
    assert kept.scaling.standard_rank == 4
    small = RankSchedule("small", TINY, ranks, TINY.cost - 1, scaling=Scaling("balanced"))
    assert small.scaling.standard_rank == 1
    plain = RankSchedule("plain", TINY, ranks, 4 * TINY.cost, scaling=Scaling("constant")).to_json()
    assert plain["scaling"] == {"rule": "constant", "value": 2.0}  # as files have it that know no standard rank
    plain["scaling"]["rule"] = "balanced"
    assert RankSchedule.from_json(plain).scaling == Scaling("balanced", 2.0, 4)
    wish = Config().scaling
    measured = uniform(AllocationRequest(TINY, Budget.of_rank(TINY, 7), scaling=Scaling(wish.rule, wish.value)))
    assert (measured.scaling.standard_rank, measured.steps()) == (7, {7: (2.0, 1.0)})


@pytest.mark.parametrize(
    ("name", "stages", "ranks", "total_rank", "over"),
    [
        ("Config1", "1-4,5-20,21-24", (128, 64, 128), 2048, False),
        ("Config2", "1-4,5-20,21-24", (256, 128, 256), 4096, True),
        ("Config3", "1-8,9-16,17-24", (64, 128, 256), 3584, True),
        ("Config4", "1-8,9-12,13-24", (124, 126, 131), 3068, False),
    ],
)
def test_table_v(name: str, stages: str, ranks: tuple[int, ...], total_rank: int, over: bool) -> None:
    graph = preset("mobilellama-1.4b")
    schedule = hand_schedule(graph, parse_stages(stages, 24), ranks, 128 * graph.cost, name)
    assert schedule.parameters == total_rank * graph.layer_cost(0)
    assert schedule.over_budget is over
    assert ("OVER BUDGET" in schedule.table()) is over
    if over:
        with pytest.raises(BudgetError, match=name) as caught:
            schedule.check()
        assert caught.value.budget == schedule.parameters
    else:
        schedule.check()


def test_rank_zero_is_not_adapted() -> None:
    schedule = hand_schedule(TINY, ((0,), (1, 2)), (0, 3), 3 * TINY.cost, "top only")
    assert schedule.parameters == 2 * 3 * TINY.layer_cost(0)
    assert schedule.rank(0, "q_proj") == 0
    assert schedule.by_layer()[2]["up_proj"] == 3


def test_hand_schedule_needs_a_rank_for_each_stage() -> None:
    with pytest.raises(StageError, match="2 stages need as many ranks, got 1"):
        hand_schedule(TINY, ((0,), (1, 2)), (1,), 100, "short")
    with pytest.raises(StageError, match="layer 3 is in no stage"):
        hand_schedule(TINY, ((0,), (1,)), (1, 2), 100, "gap")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": (1, 2)}, "2 ranks"),
        ({"ranks": (-1,) * 21}, "layer 1, q_proj: rank -1"),
        ({"budget": 0}, "positive"),
    ],
)
def test_bad_schedules(change: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"name": "x", "graph": TINY, "ranks": (1,) * 21, "budget": 10} | change
    with pytest.raises(ConfigError, match=message):
        RankSchedule(**fields)


def test_table_collapses_equal_neighbours_and_marks_missing_components() -> None:
    shapes = [(0, "qkv_proj", 8, 24), (0, "o_proj", 8, 8), (1, "qkv_proj", 8, 24), (2, "qkv_proj", 8, 24)]
    graph = ComputationGraph("uneven", tuple(Projection(*shape) for shape in shapes))
    table = RankSchedule("mine", graph, (1, 2, 3, 3), budget=300, scaling=Scaling("balanced", 2.0, 2)).table()
    assert [line.split() for line in table.splitlines()[:-2]] == [
        ["layers", "qkv_proj", "o_proj", "parameters"],
        ["1", "1", "2", "64"],
        ["2-3", "3", "-", "192"],
        ["rank", "scale", "step"],
        ["1", "2.828", "1.00"],
        ["2", "2", "1.00"],
        ["3", "1.633", "1.00"],
    ]
    assert table.splitlines()[-1] == "mine: 256 of 300 parameters (85.33%), 44 unspent"


SCHEDULE = RankSchedule("z", TINY, tuple(range(21)), 999, ((0, 2), (1,)), 2, Scaling("fixed", 16))


def test_json_round_trip() -> None:
    data = json.loads(json.dumps(SCHEDULE.to_json(), sort_keys=True))
    assert data["ranks"][1]["q_proj"] == 7
    assert data["stages"] == "1+3,2"
    assert RankSchedule.from_json(data) == SCHEDULE
    assert "OVER BUDGET" in repr(SCHEDULE)


def test_json_that_was_edited_or_is_something_else() -> None:
    data = SCHEDULE.to_json()
    data["ranks"][0]["q_proj"] += 1
    with pytest.raises(ConfigError, match="edited or damaged"):
        RankSchedule.from_json(data)
    with pytest.raises(ConfigError, match="not a rank schedule"):
        RankSchedule.from_json({"graph": TINY.to_json()})


@pytest.mark.parametrize("value", [True, 2.5, "8", None, math.nan, math.inf, 10**30, [1]])
@pytest.mark.parametrize("key", ["budget", "delta", "parameters", "scaling", "rank", "width", "norm", "steps"])
def test_numbers_that_are_read_back_are_numbers(key: str, value: object) -> None:
    graph = llama_graph("g", 2, 8, 24)
    n = len(graph.projections)
    schedule = RankSchedule("s", graph, (2,) * n, 2 * graph.cost, ((0,), (1,)), 1).to_json()
    profile = GradientNormProfile(graph, ((1.0, 2.0),) * n, ((0.0, 0.0),) * n, 4, 1).to_json()
    if (key, value) in (("delta", None), ("scaling", 2.5), ("norm", 2.5)) or (
        key in ("scaling", "norm") and value == 10**30
    ):
        return  # these are allowed
    if key == "scaling":
        schedule["scaling"]["value"] = value
    elif key == "rank":
        schedule["ranks"][0]["q_proj"] = value
    elif key == "width":
        schedule["graph"]["layers"][0]["q_proj"][0] = profile["graph"]["layers"][0]["q_proj"][0] = value
    elif key == "norm":
        profile["mean"][0]["q_proj"][0] = value
    elif key == "steps":
        profile["steps"] = value
    else:
        schedule[key] = value
    read = GradientNormProfile.from_json if key in ("norm", "steps") else RankSchedule.from_json
    with pytest.raises(ConfigError):
        read(profile if key in ("norm", "steps") else schedule)  # type: ignore[arg-type]

"""The solution space: every candidate is feasible and inside, and nothing inside is missed, doubled or preferred."""

import json
import math
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_vlm.allocation import TABLE_VI, AllocationRequest, Budget, coarse, fine, refine, uniform
from hydra_vlm.errors import BudgetError, ConfigError, GraphMismatchError, StageError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph, preset
from hydra_vlm.profile import GradientNormProfile, stages_of
from hydra_vlm.schedule import RankSchedule, Scaling, hand_schedule
from hydra_vlm.search.membership import adopt, contains, distance
from hydra_vlm.search.proposals import listed, mutate, repair, sample, scatter, size
from hydra_vlm.search.space import Candidate, Space, Tuning, Value, candidate, parameters
from hydra_vlm.search.ways import Ways
from test_allocation import check_stages_ascend, graphs, table_i

LLAMA = preset("mobilellama-1.4b")
GROUPED = llama_graph("smollm2-135m", 30, hidden=576, feed_forward=1536, kv_features=192)
EMBEDDED = llama_graph("embedded", 8, hidden=128, feed_forward=352)
TUNING = Tuning.around(4e-3)


def tiny_graph(uneven: bool = False) -> ComputationGraph:
    """Four layers of three components with narrow keys; uneven: the last layer has other components."""
    shapes = {"q_proj": (16, 16), "k_proj": (16, 8), "up_proj": (16, 40)}
    made = [Projection(layer, c, *shape) for layer in range(3) for c, shape in shapes.items()]
    last = {"fc1": (16, 24), "k_proj": (16, 8)} if uneven else shapes
    return ComputationGraph("tiny", (*made, *(Projection(3, c, *shape) for c, shape in last.items())))


def rising(graph: ComputationGraph, weights: tuple[float, ...] = (0.5, 0.6, 2.0, 1.1)) -> GradientNormProfile:
    names = {c: weights[i % len(weights)] for i, c in enumerate(graph.components)}
    mean = tuple(((1 + p.layer) * names[p.component],) * 2 for p in graph.projections)
    return GradientNormProfile(graph, mean, ((0.0, 0.0),) * len(mean), 4, 1)


def space_of(graph: ComputationGraph, rank: int, **fields: object) -> Space:
    profile = table_i(graph) if "gate_proj" in graph.components else rising(graph)
    return Space(graph, Budget.of_rank(graph, rank), profile, **fields)  # type: ignore[arg-type]


# What the closed space holds


def ladder(space: Space, n: int, delta: int, first: int) -> RankSchedule | None:
    """Eq. 5, 6 and 8 read aloud."""
    graph, budget, profile = space.graph, space.budget.parameters, space.profile
    assert profile is not None
    stages = stages_of(profile, n)
    costs = [sum(graph.layer_cost(layer) for layer in stage) for stage in stages]
    ranks = [first + i * delta for i in range(n - 1)]
    total = budget * graph.n_layers // graph.cost - sum(len(s) * r for s, r in zip(stages, ranks, strict=False))
    left = budget - sum(c * r for c, r in zip(costs, ranks, strict=False))
    last = min(total // len(stages[-1]), left // costs[-1])
    if (first != last) if n == 1 else (last < ranks[-1] + delta):
        return None
    return replace(hand_schedule(graph, stages, [*ranks, last], budget, "coarse"), delta=delta)


def brute_force(space: Space, n_stages: range, deltas: range) -> set[tuple[int, ...]]:
    """The ranks of every choice there is, tried one by one."""
    graph, (low, high) = space.graph, space.offsets
    found: set[tuple[int, ...]] = set()
    for n, delta, first in product(n_stages, deltas, range(1, space.budget.rank * graph.n_layers + 1)):
        base = ladder(space, n, delta, first)
        if base is None:
            continue
        request = AllocationRequest(graph, space.budget, space.profile, base.stages, delta=delta)
        found |= {refine(replace(request, rule="profile"), base).ranks} if "profile" in space.rules else set()
        if "paper" not in space.rules:
            continue
        inside = [k for k, table in TABLE_VI.items() if all(low <= units <= high for units in table.values())]
        found |= {refine(replace(request, setting=k), base).ranks for k in inside}
        for units in product(range(low, high + 1), repeat=len(graph.components)):
            offsets = dict(zip(graph.components, (unit * delta // 2 for unit in units), strict=True))
            pairs = zip(base.ranks, graph.projections, strict=True)
            ranks = tuple(rank + offsets[p.component] for rank, p in pairs)
            if first + min(offsets.values()) >= 1 and graph.parameters(ranks) <= space.budget.parameters:
                found.add(ranks)
    return found


TINY_SPACES = [
    space_of(tiny_graph(), 3, offsets=(-2, 2), deltas=(1, 2)),
    space_of(tiny_graph(), 4, deltas=(1, 3), n_stages=(2, 4)),
    space_of(tiny_graph(), 5, deltas=(2, 2), rules=("profile",)),
    space_of(tiny_graph(uneven=True), 3, offsets=(-2, 2), deltas=(1, 3)),
]


@pytest.mark.parametrize("space", TINY_SPACES)
def test_the_list_is_what_brute_force_finds(space: Space) -> None:
    assert space.deltas is not None
    found = [one.schedule.ranks for one in listed(space)]
    low, high = space.n_stages or (1, 4)
    assert len(found) == len(set(found))
    assert set(found) == brute_force(space, range(low, high + 1), range(space.deltas[0], space.deltas[1] + 1))
    assert len(found) <= size(space)


@pytest.mark.parametrize("space", TINY_SPACES)
def test_what_is_not_listed_is_not_contained(space: Space) -> None:
    inside = {one.schedule.ranks for one in listed(space)}
    draw = random.Random(0)
    some = next(listed(space)).schedule
    for ranks in draw.sample(sorted(inside), min(len(inside), 60)):
        assert contains(space, replace(some, ranks=ranks, stages=None, delta=None))
        moved = list(ranks)
        moved[draw.randrange(len(moved))] += draw.choice((-1, 1))
        assert contains(space, replace(some, ranks=tuple(moved))) is (tuple(moved) in inside)


@pytest.mark.parametrize("space", TINY_SPACES)
def test_samples_are_uniform_over_the_list(space: Space) -> None:
    inside = {one.schedule.ranks for one in listed(space)}
    draw, times = random.Random(1), 10
    counts = Counter(sample(space, draw).schedule.ranks for _ in range(times * len(inside)))
    assert set(counts) <= inside
    square = sum((counts[ranks] - times) ** 2 / times for ranks in inside)
    freedom = len(inside) - 1
    assert abs(square - freedom) < 5 * math.sqrt(2 * freedom)  # chi-square, five standard deviations


def test_counting_is_exact_and_numbers_every_way_once() -> None:
    ways = Ways((3, 5, 11), (-2, 0, 1, 4))
    for limit in (-39, -38, 0, 7, 76):
        asked = [v for v in product(ways.options, repeat=3) if 3 * v[0] + 5 * v[1] + 11 * v[2] <= limit]
        assert list(ways.walk(limit)) == asked
        assert [ways.pick(i, limit) for i in range(ways.count(limit))] == asked


def test_a_coarse_grid_leaves_no_way_out() -> None:
    ways = Ways((100_003, 70_001, 1_000_033), (-2, 0, 1, 4))
    picked = [ways.pick(i, 900_000) for i in range(ways.count(900_000))]
    asked = set(ways.walk(900_000))
    assert asked <= set(picked)
    assert len(picked) == len(set(picked)) <= len(asked) + 3


@pytest.mark.parametrize("rank", [2, 4, 8, 32])
@pytest.mark.parametrize("graph", [EMBEDDED, GROUPED], ids=["embedded", "grouped"])
def test_what_the_allocators_make_is_inside(graph: ComputationGraph, rank: int) -> None:
    space = space_of(graph, rank)
    request = AllocationRequest(graph, space.budget, space.profile, n_stages=3, delta=2)
    made = [uniform(request), coarse(request), fine(replace(request, rule="profile"))]
    made += [fine(replace(request, setting=setting, n_stages=2)) for setting in TABLE_VI]
    for schedule in made:
        found = adopt(space, schedule)
        assert found is not None, schedule
        assert found.schedule.ranks == schedule.ranks


def test_config4_is_inside_and_overspending_is_not() -> None:
    stages = tuple(tuple(range(*ends)) for ends in ((0, 8), (8, 12), (12, 24)))
    norms = [1.0] * 8 + [2.0] * 4 + [3.0] * 12
    mean = tuple((norms[p.layer],) * 2 for p in LLAMA.projections)
    profile = GradientNormProfile(LLAMA, mean, ((0.0, 0.0),) * len(mean), 4, 1)
    space = Space(LLAMA, Budget.of_rank(LLAMA, 128), profile)
    config4 = hand_schedule(LLAMA, stages, (124, 126, 131), space.budget.parameters, "Config4")
    found = adopt(space, config4)
    assert found is not None
    assert [found.values[name] for name in ("n_stages", "delta", "first_rank", "rule")] == [3, 2, 124, "paper"]
    assert found.schedule.stages == stages
    assert not contains(space, hand_schedule(LLAMA, stages, (125, 127, 132), space.budget.parameters, "over"))
    assert not contains(space, hand_schedule(LLAMA, stages, (131, 126, 124), space.budget.parameters, "falling"))
    assert not contains(space, hand_schedule(LLAMA, stages, (0, 1, 2), space.budget.parameters, "not adapted"))
    assert not contains(space, uniform(AllocationRequest(EMBEDDED, Budget.of_rank(EMBEDDED, 4))))
    assert not contains(space, replace(config4, scaling=Scaling("constant", 1.0)))


# What holds in every space


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    graph = draw(graphs())
    n = len(graph.projections)
    norm = st.integers(0, 50).map(lambda step: step / 1000)
    mean = draw(st.lists(st.tuples(norm, norm), min_size=n, max_size=n))
    rank, extra = draw(st.integers(1, 200) | st.integers(1, 8)), draw(st.integers(0, graph.cost - 1))
    profile = GradientNormProfile(graph, tuple(mean), ((0.0, 0.0),) * n, 4, 1)
    scaling = draw(st.sampled_from([Scaling(), Scaling("fixed", 16.0), Scaling("rslora", 8.0)]))
    return Space(
        graph,
        Budget.of_parameters(graph, rank * graph.cost + draw(st.sampled_from([0, extra]))),
        profile,
        open=draw(st.booleans()),
        tuned=draw(st.none() | st.just(TUNING)),
        deltas=draw(st.none() | st.just((1, 9))),
        offsets=draw(st.sampled_from([(-4, 4), (-2, 4), (-1, 1), (0, 0)])),
        scaling=scaling,
    )


def check(space: Space, found: Candidate) -> None:
    """Feasible, inside, and the same again by its values and its JSON."""
    schedule = found.schedule
    assert schedule.parameters <= space.budget.parameters == schedule.budget
    assert contains(space, schedule)
    if space.open:
        assert schedule.unspent < min(space.graph.costs)
        assert schedule.stages is None
    else:
        assert min(schedule.ranks) >= 1
        check_stages_ascend(schedule)
    assert set(found.values) == {p.name for p in parameters(space)}
    again = candidate(space, found.values)
    assert again == found
    assert Candidate.from_json(json.loads(json.dumps(found.to_json()))) == found
    if space.tuned is None:
        assert found.learning_rate is None
        assert schedule.scaling == space.scaling
    else:
        low, high = space.tuned.learning_rate
        assert found.learning_rate is not None
        assert low <= found.learning_rate <= high
        assert schedule.scaling.rule == space.scaling.rule
        least, most = space.tuned.scale
        scale = schedule.scaling.scale(space.budget.rank)
        assert least * (1 - 1e-9) <= scale <= most * (1 + 1e-9)


RANDOM = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@RANDOM
@given(space=spaces(), seed=st.integers(0, 99))
def test_samples_and_steps_stay_inside(space: Space, seed: int) -> None:
    draw = random.Random(seed)
    found = sample(space, draw)
    assert sample(space, random.Random(seed)) == found, "the seed decides"
    check(space, found)
    check(space, scatter(space, draw))
    for _ in range(3):
        moved = mutate(space, found, draw)
        check(space, moved)
        if moved.key == found.key:
            assert space.tuned is None
            assert {sample(space, draw).key for _ in range(5)} == {found.key}, "there is nothing else"
        found = moved


@RANDOM
@given(space=spaces(), data=st.data())
def test_any_values_lead_inside(space: Space, data: st.DataObject) -> None:
    values: dict[str, Value] = {}
    for p in parameters(space):
        if p.kind == "categorical":
            values[p.name] = data.draw(st.sampled_from(p.options))
        elif p.kind == "int":
            values[p.name] = data.draw(st.integers(int(p.low) - 2, int(p.high) + 2))
        else:
            values[p.name] = data.draw(st.floats(p.low / 2, p.high * 2))
    found = candidate(space, values)
    assert candidate(space, values) == found
    check(space, found)


@RANDOM
@given(space=spaces(), seed=st.integers(0, 99))
def test_repair_leads_inside_and_rests_there(space: Space, seed: int) -> None:
    draw = random.Random(seed)
    highest = draw.choice((1, 3, 40, 1000))
    found = repair(space, [draw.randint(-1, highest) for _ in space.graph.projections])
    check(space, found)
    assert repair(space, found.schedule.ranks).schedule == found.schedule
    inside = sample(space, draw)
    assert repair(space, inside.schedule.ranks).schedule.ranks == inside.schedule.ranks
    if not space.open:
        below = repair(space, [max(1, rank - 1) for rank in inside.schedule.ranks])
        assert distance(below.schedule, inside.schedule) <= 1


def test_repair_keeps_proportions_and_what_is_not_adapted() -> None:
    space = space_of(EMBEDDED, 4, open=True)
    asked = [4 * (p.layer % 2) * (1 + (p.component == "up_proj")) for p in EMBEDDED.projections]
    ranks = repair(space, asked).schedule.ranks
    for rank, wanted, p in zip(ranks, asked, EMBEDDED.projections, strict=True):
        assert (rank == 0) is (wanted == 0), p
    by_wanted = {wanted: {r for r, w in zip(ranks, asked, strict=True) if w == wanted} for wanted in (4, 8)}
    assert max(by_wanted[4]) <= min(by_wanted[8])


def test_repair_takes_a_near_choice() -> None:
    space = space_of(EMBEDDED, 32)
    inside = repair(space, coarse(AllocationRequest(EMBEDDED, space.budget, space.profile)).ranks)
    moved = list(inside.schedule.ranks)
    moved[5] += 1
    moved[20] -= 1
    assert distance(repair(space, moved).schedule, inside.schedule) < 0.02


def test_open_steps_reach_zero_and_come_back() -> None:
    space = space_of(EMBEDDED, 4, open=True)
    draw, found, zeros = random.Random(0), None, []
    found = adopt(space, uniform(AllocationRequest(EMBEDDED, space.budget)))
    assert found is not None
    for _ in range(60):
        found = mutate(space, found, draw)
        zeros.append(found.schedule.ranks.count(0))
    assert max(zeros) > 5
    assert any(later < sooner for sooner, later in pairwise(zeros))


def test_scatter_has_more_contrast_than_a_uniform_draw() -> None:
    space, draw = space_of(EMBEDDED, 4), random.Random(0)
    uniform_draws, scattered = ([make(space, draw) for _ in range(60)] for make in (sample, scatter))
    stages = [Counter(one.values["n_stages"] for one in ones) for ones in (uniform_draws, scattered)]
    assert max(stages[1].values()) < 25 < max(stages[0].values())


# Distance, tuning, the flat view


def test_distance_is_the_share_spent_differently() -> None:
    graph, budget = tiny_graph(), Budget.of_rank(tiny_graph(), 4)
    one = uniform(AllocationRequest(graph, budget))
    assert distance(one, one) == 0
    all_in_first = RankSchedule("first", graph, (16,) * 3 + (0,) * 9, budget.parameters)
    assert distance(one, all_in_first) == distance(all_in_first, one) == pytest.approx(0.75)
    with pytest.raises(GraphMismatchError, match="two models"):
        distance(one, uniform(AllocationRequest(EMBEDDED, Budget.of_rank(EMBEDDED, 4))))


def test_uniform_lora_can_be_tuned_alike() -> None:
    space = space_of(EMBEDDED, 4, tuned=TUNING, n_stages=(1, 1), offsets=(0, 0), rules=("paper",))
    draw = random.Random(0)
    found = [sample(space, draw) for _ in range(200)]
    assert {one.schedule.ranks for one in found} == {(4,) * 56}
    rates = sorted(one.learning_rate or 0.0 for one in found)
    assert rates[100] == pytest.approx(4e-3, rel=0.2)  # the middle of a log scale
    assert len({one.key for one in found}) == 200
    moved = mutate(space, found[0], draw)
    assert moved.key != found[0].key
    assert moved.schedule.ranks == found[0].schedule.ranks


@pytest.mark.parametrize("scaling", [Scaling(), Scaling("fixed", 8.0), Scaling("rslora", 4.0)])
def test_a_scale_is_that_at_the_standard_rank(scaling: Scaling) -> None:
    space = space_of(EMBEDDED, 4, tuned=TUNING, scaling=scaling)
    found = sample(space, random.Random(0))
    assert found.schedule.scaling.scale(4) == pytest.approx(found.values["scale"])
    adopted = adopt(space, found.schedule, found.learning_rate)
    assert adopted is not None
    assert adopted.key == found.key
    assert adopt(space, found.schedule, 1.0) is None


def test_the_flat_view_of_the_paper() -> None:
    view = {p.name: (p.kind, p.low, p.high) for p in parameters(space_of(LLAMA, 128, tuned=TUNING))}
    assert view["n_stages"] == ("int", 1, 24)
    assert view["delta"] == ("int", 1, 16)
    assert view["first_rank"] == ("int", 1, 128)
    assert view["offset.q_proj"] == ("int", -4, 4)
    assert view["learning_rate"] == ("float", 1e-3, 16e-3)
    free = parameters(space_of(EMBEDDED, 4, open=True))
    assert (free[8].name, free[8].low, free[8].high) == ("rank.2.k_proj", 0, 16)
    assert len(free) == 56


# What is refused


def test_spaces_that_cannot_be() -> None:
    with pytest.raises(StageError, match="Give a profile, or open the space"):
        Space(EMBEDDED, Budget.of_rank(EMBEDDED, 4))
    with pytest.raises(StageError, match="Set n_stages to 8"):
        space_of(EMBEDDED, 4, n_stages=(9, 9))
    with pytest.raises(BudgetError, match="Raise the budget to rank") as caught:
        space_of(EMBEDDED, 2, n_stages=(4, 6), deltas=(2, 3))
    assert caught.value.budget is not None
    least = Budget.of_parameters(EMBEDDED, caught.value.budget)
    assert Space(EMBEDDED, least, table_i(EMBEDDED), n_stages=(4, 6), deltas=(2, 3))
    less = Budget.of_parameters(EMBEDDED, caught.value.budget - 1)
    with pytest.raises(BudgetError):
        Space(EMBEDDED, less, table_i(EMBEDDED), n_stages=(4, 6), deltas=(2, 3))
    with pytest.raises(BudgetError, match="Raise it to"):
        Space(EMBEDDED, Budget(100, 0), open=True)
    with pytest.raises(BudgetError, match="Raise the budget to rank 1"):
        Space(EMBEDDED, Budget(EMBEDDED.cost - 1, 0), table_i(EMBEDDED))
    with pytest.raises(ConfigError, match="offsets must include 0"):
        space_of(EMBEDDED, 4, offsets=(1, 4))
    with pytest.raises(ConfigError, match="deltas must be"):
        space_of(EMBEDDED, 4, deltas=(0, 4))
    with pytest.raises(ConfigError, match="rules must be some of paper, profile"):
        space_of(EMBEDDED, 4, rules=())
    with pytest.raises(GraphMismatchError):
        Space(EMBEDDED, Budget.of_rank(EMBEDDED, 4), table_i(GROUPED))
    with pytest.raises(ConfigError, match="positive and in order"):
        Tuning((1e-3, 1e-4), (1.0, 2.0))


def test_requests_that_cannot_be() -> None:
    space = space_of(EMBEDDED, 4)
    found = sample(space, random.Random(0))
    with pytest.raises(ConfigError, match="'rank' does not agree"):
        candidate(space, {**found.values, "rank": 1})
    with pytest.raises(ConfigError, match="use one of paper, profile"):
        candidate(space, {**found.values, "rule": "mine"})
    with pytest.raises(ConfigError, match="must be a number"):
        candidate(space, {**found.values, "delta": math.nan})
    with pytest.raises(ConfigError, match="7 ranks do not fit the 56 projections"):
        repair(space, [1] * 7)
    with pytest.raises(ConfigError, match="draw from this one"):
        next(listed(space_of(EMBEDDED, 4, tuned=TUNING)))
    with pytest.raises(ConfigError, match="not a candidate"):
        Candidate.from_json({"choices": {}})


# What it costs


def test_a_thousand_draws_and_steps_on_three_graphs_are_quick() -> None:
    seconds = 0.0
    for graph, rank in ((LLAMA, 128), (GROUPED, 32), (EMBEDDED, 4)):
        start = time.process_time()
        space, draw = space_of(graph, rank), random.Random(0)
        found = [sample(space, draw) for _ in range(500)]
        moved = [mutate(space, one, draw) for one in found]
        seconds += time.process_time() - start
        assert all(one.key != other.key for one, other in zip(found, moved, strict=True))
        assert len({one.key for one in found}) > 450
        for one in (*found[::25], *moved[::25]):
            check(space, one)
    assert seconds < 5  # below 2 where nothing else runs


def test_the_space_needs_the_standard_library_only() -> None:
    code = (
        "import sys, hydra_vlm.search.proposals; sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'optuna')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""From budget to ranks: the paper's numbers, and what must hold on every graph, profile and budget."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hydra_vlm.allocation import (
    ALLOCATORS,
    TABLE_VI,
    AllocationRequest,
    Budget,
    allocate,
    apply_setting,
    coarse,
    decreasing,
    exponential,
    fill,
    fine,
    linear,
    measured_offsets,
    proportional,
    random_feasible,
    repair,
    require_stages,
    uniform,
)
from hydra_vlm.errors import BudgetError, ConfigError, GraphMismatchError, StageError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph, preset
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule, Stages, parse_stages
from hydra_vlm.signals import Signal

LLAMA = preset("mobilellama-1.4b")
CONFIG4 = AllocationRequest(LLAMA, Budget.of_rank(LLAMA, 128), stages=parse_stages("1-8,9-12,13-24", 24))
TABLE_I = {
    "down_proj": 1.49,
    "gate_proj": 1.47,
    "up_proj": 1.67,
    "k_proj": 0.64,
    "o_proj": 1.43,
    "q_proj": 0.63,
    "v_proj": 1.42,
}


def profile_of(graph: ComputationGraph, components: dict[str, float], layers: list[float]) -> GradientNormProfile:
    mean = tuple((layers[p.layer] * components[p.component],) * 2 for p in graph.projections)
    return GradientNormProfile(graph, mean, ((0.0, 0.0),) * len(mean), steps=8, skipped=2)


def table_i(graph: ComputationGraph) -> GradientNormProfile:
    return profile_of(graph, TABLE_I, [0.005 + 0.0017 * layer for layer in range(graph.n_layers)])


def stage_ranks(schedule: RankSchedule) -> tuple[int, ...]:
    assert schedule.stages is not None
    ranks = [{rank for i in stage for rank in schedule.by_layer()[i].values()} for stage in schedule.stages]
    assert all(len(found) == 1 for found in ranks), "a coarse stage has one rank"
    return tuple(found.pop() for found in ranks)


# The paper's numbers


def test_config4() -> None:
    schedule = coarse(CONFIG4)
    assert stage_ranks(schedule) == (124, 126, 131)
    assert (schedule.budget, schedule.unspent, schedule.delta) == (121_110_528, 4 * 39_424, 2)


def test_the_literal_step_of_one() -> None:
    assert stage_ranks(coarse(replace(CONFIG4, step=1))) == (125, 127, 130)


OFFSETS = {
    1: {"q_proj": -2, "k_proj": -2, "up_proj": 2},
    2: {"q_proj": -2, "k_proj": -2, "up_proj": 2, "down_proj": 2},
    3: {"q_proj": -2, "k_proj": -2},
    4: {"q_proj": -1, "k_proj": -1, "up_proj": 2},
    5: {"q_proj": -2, "k_proj": -2, "up_proj": 4},
}


@pytest.mark.parametrize(("setting", "over"), [(1, False), (2, True), (3, False), (4, True), (5, True)])
def test_table_vi(setting: int, over: bool) -> None:
    base = coarse(CONFIG4)
    schedule = apply_setting(base, setting)
    for p in LLAMA.projections:
        asked = base.rank(p.layer, p.component) + OFFSETS[setting].get(p.component, 0)
        assert schedule.rank(p.layer, p.component) == asked
    assert schedule.over_budget is over
    allocated = fine(replace(CONFIG4, setting=setting))
    if over:
        assert allocated.parameters <= allocated.budget < schedule.parameters
        assert all(got <= asked for got, asked in zip(allocated.ranks, schedule.ranks, strict=True))
    else:
        assert allocated == schedule


def test_setting1_saves_1024_parameters_a_layer() -> None:
    assert coarse(CONFIG4).parameters - fine(CONFIG4).parameters == 24 * 1024


def test_setting1_on_grouped_query_attention_gives_back() -> None:
    graph = llama_graph("smollm2-135m", 30, hidden=576, feed_forward=1536, kv_features=192)
    stages = parse_stages("1-10,11-20,21-30", 30)
    request = AllocationRequest(graph, Budget.of_rank(graph, 32), stages=stages)
    base, asked = coarse(request), apply_setting(coarse(request), 1)
    assert asked.parameters - base.parameters == 30 * 384
    assert base.unspent < 30 * 384
    without = fine(request)
    assert 0 <= without.unspent < max(graph.costs)
    lowered = {p.component for p, a, b in zip(graph.projections, asked.ranks, without.ranks, strict=True) if a != b}
    assert lowered == {"up_proj"}, "without a profile the costliest raised component gives back"
    measured = fine(replace(request, profile=table_i(graph)))
    assert 0 <= measured.unspent < max(graph.costs)
    gave = [p.layer for p, a, b in zip(graph.projections, asked.ranks, measured.ranks, strict=True) if a != b]
    assert max(gave) < 15, "with a profile the layers of low norm give back"


def test_measured_offsets_of_table_i_are_setting1() -> None:
    profile = table_i(LLAMA)
    offsets = {component: offset for component, offset in measured_offsets(profile, 2).items() if offset}
    assert offsets == OFFSETS[1]
    schedule = fine(replace(CONFIG4, rule="profile", profile=profile))
    assert 0 <= schedule.unspent < min(LLAMA.costs)
    paper = apply_setting(coarse(CONFIG4), 1)
    assert all(got >= asked for got, asked in zip(schedule.ranks, paper.ranks, strict=True))


def test_another_profile_leads_to_other_offsets() -> None:
    graph = llama_graph("tiny", 4, 16, 48)
    turned = profile_of(graph, TABLE_I | {"q_proj": 3.0, "up_proj": 0.2}, [1.0, 2.0, 3.0, 4.0])
    offsets = measured_offsets(turned, 2)
    assert (offsets["q_proj"], offsets["up_proj"]) == (2, -2)


# Small budgets and fallbacks


def naive_coarse(sizes: list[int], rank: int, delta: int, step: int, start: int) -> list[int] | None:
    """Eq. 5-8 read aloud, for layers of equal shape."""
    kept, first = None, start
    while True:
        ranks = [first + i * delta for i in range(len(sizes) - 1)]
        left = rank * sum(sizes) - sum(n * r for n, r in zip(sizes, ranks, strict=False))
        ranks.append(left // sizes[-1])
        if left < 0 or ranks[-1] < ranks[-2] + delta:
            return kept
        kept, first = ranks, first + step


@pytest.mark.parametrize("rank", [3, 4, 8, 16, 32, 64, 128, 256, 512])
@pytest.mark.parametrize("step", [None, 1])
def test_coarse_at_every_scale(rank: int, step: int | None) -> None:
    schedule = coarse(replace(CONFIG4, budget=Budget.of_rank(LLAMA, rank), step=step))
    delta = 2 if rank > 3 else 1  # 1, 3, 5 on 8, 4 and 12 layers are 80 ranks, more than 3 x 24
    assert schedule.delta == delta
    start = max(1, 2 * ((rank - 23) // 2))
    assert list(stage_ranks(schedule)) == naive_coarse([8, 4, 12], rank, delta, step or delta, start)


def test_a_start_too_high_is_lowered() -> None:
    graph = llama_graph("two", 2, 16, 48)
    request = AllocationRequest(graph, Budget.of_rank(graph, 100), stages=((0,), (1,)), delta=60)
    assert stage_ranks(coarse(request)) == (70, 130), "Eq. 7 starts at 98, where Eq. 5 fails"


def test_one_stage_is_uniform() -> None:
    for rank in (1, 7, 512):
        request = replace(CONFIG4, budget=Budget.of_rank(LLAMA, rank), stages=parse_stages("1-24", 24))
        assert coarse(request).ranks == uniform(request).ranks == (rank,) * 168


def test_infeasible_names_the_nearest_rank_and_stage_count() -> None:
    request = AllocationRequest(LLAMA, Budget.of_rank(LLAMA, 2), profile=table_i(LLAMA), n_stages=7)
    with pytest.raises(BudgetError, match=r"rank budget 2 .* 7 stages.* Raise the budget to rank 4 .*n_stages to 3"):
        coarse(request)
    coarse(replace(request, budget=Budget.of_rank(LLAMA, 4)))
    coarse(replace(request, n_stages=3))


def test_named_stages_at_rank_one() -> None:
    with pytest.raises(BudgetError) as caught:
        coarse(replace(CONFIG4, budget=Budget.of_rank(LLAMA, 1)))
    assert caught.value.budget is not None
    assert stage_ranks(coarse(replace(CONFIG4, budget=Budget.of_parameters(LLAMA, caught.value.budget)))) == (
        1,
        2,
        3,
    )


def test_a_budget_below_rank_one() -> None:
    with pytest.raises(BudgetError, match="Raise it to rank 1") as caught:
        Budget.of_parameters(LLAMA, LLAMA.cost - 1)
    assert caught.value.budget == LLAMA.cost
    with pytest.raises(BudgetError, match="below rank 1"):
        Budget.of_rank(LLAMA, 0)
    measured = replace(CONFIG4, signals=(signal_of(LLAMA, "effective_rank"),), signal="effective_rank")
    for name in ALLOCATORS:
        with pytest.raises(BudgetError) as caught:
            allocate(name, replace(measured, budget=Budget(LLAMA.cost - 1, 0)))
        assert caught.value.budget is not None
        allocate(name, replace(measured, budget=Budget.of_parameters(LLAMA, caught.value.budget)))


def test_bad_requests() -> None:
    budget = Budget.of_rank(LLAMA, 8)
    with pytest.raises(StageError, match="neither stages nor a profile"):
        coarse(AllocationRequest(LLAMA, budget))
    with pytest.raises(ConfigError, match="give a profile"):
        fine(replace(CONFIG4, rule="profile"))
    with pytest.raises(ConfigError, match="delta must be"):
        replace(CONFIG4, delta=0)
    with pytest.raises(ConfigError, match="step must be"):
        replace(CONFIG4, step=0)
    with pytest.raises(ConfigError, match="Table VI"):
        replace(CONFIG4, setting=6)
    with pytest.raises(ConfigError, match="paper, profile"):
        replace(CONFIG4, rule="guess")  # type: ignore[arg-type]
    with pytest.raises(StageError, match="layer 24 is in no stage"):
        replace(CONFIG4, stages=((0,), tuple(range(1, 23))))
    with pytest.raises(GraphMismatchError):
        replace(CONFIG4, profile=table_i(llama_graph("other", 3, 8, 24)))
    with pytest.raises(ConfigError, match="uniform, coarse"):
        allocate("best", CONFIG4)
    with pytest.raises(ConfigError, match="no delta"):
        apply_setting(uniform(CONFIG4), 1)


def signal_of(graph: ComputationGraph, kind: str) -> Signal:
    return Signal(graph, kind, tuple(1.0 + i % 5 for i in range(len(graph.projections))), steps=8)


def test_an_allocator_says_which_signal_it_lacks() -> None:
    bare = AllocationRequest(LLAMA, Budget.of_rank(LLAMA, 8), signals=(signal_of(LLAMA, "sensitivity"),))
    for name in ("coarse", "fine", "decreasing"):
        with pytest.raises(ConfigError, match=rf"{name} ranks .* gradient_norm.*given: sensitivity\).*name the stages"):
            allocate(name, bare)
    with pytest.raises(ConfigError, match="profile --signal gradient_norm"):
        allocate("fine", replace(CONFIG4, rule="profile"))
    for make in (proportional, lambda request: allocate("proportional", request)):
        with pytest.raises(ConfigError, match=r"follow the signal effective_rank.*--signal effective_rank"):
            make(replace(bare, signal="effective_rank"))
    for name in ("uniform", "linear", "exponential", "random"):
        assert ALLOCATORS[name].needs(bare) is None
    assert ALLOCATORS["coarse"].needs(CONFIG4) is None, "its stages are named by hand"
    zeros = Signal(LLAMA, "sensitivity", (0.0,) * len(LLAMA.projections), 1)
    with pytest.raises(ConfigError, match="0 everywhere"):
        proportional(replace(bare, signals=(zeros,), signal="sensitivity"))
    with pytest.raises(GraphMismatchError, match="signal sensitivity was measured on 'other'"):
        replace(bare, signals=(signal_of(llama_graph("other", 3, 8, 24), "sensitivity"),))


def test_ranks_in_proportion_to_a_signal() -> None:
    graph = llama_graph("even", 4, 64, 64)
    signal = signal_of(graph, "sensitivity")
    request = AllocationRequest(graph, Budget.of_rank(graph, 12), signals=(signal,), signal="sensitivity")
    made = proportional(request)
    ratios = [rank / value for rank, value in zip(made.ranks, signal.values, strict=True)]
    unit = graph.parameters(made.ranks) / sum(v * c for v, c in zip(signal.values, graph.costs, strict=True))
    assert all(abs(ratio - unit) * value <= 1 for ratio, value in zip(ratios, signal.values, strict=True))
    assert made.unspent < min(graph.costs)
    steep = replace(signal, values=(1e6, *signal.values[1:]))
    bounded = proportional(replace(request, signals=(steep,)))
    assert bounded.ranks[0] == 64, "a full rank, and the others share the rest"
    assert bounded.ranks[4] > 3 * bounded.ranks[5]
    of_norms = proportional(
        replace(request, profile=profile_of(graph, TABLE_I, [1.0, 2, 3, 4]), signal="gradient_norm")
    )
    assert of_norms.rank(3, "up_proj") > of_norms.rank(0, "q_proj")


# Rivals


@pytest.mark.parametrize(("schedule", "ratio"), [(linear(CONFIG4), 3), (exponential(CONFIG4), 9)])
def test_ramps_rise_with_depth(schedule: RankSchedule, ratio: int) -> None:
    means = [fmean(layer.values()) for layer in schedule.by_layer()]
    assert means == sorted(means)
    assert means[-1] / means[0] == pytest.approx(ratio, rel=0.03)


def test_decreasing_mirrors_coarse() -> None:
    assert stage_ranks(replace(decreasing(CONFIG4), stages=CONFIG4.stages)) == (133, 127, 125)
    even = replace(CONFIG4, stages=parse_stages("1-8,9-16,17-24", 24))
    assert stage_ranks(coarse(even)) == (126, 128, 130)
    assert stage_ranks(replace(decreasing(even), stages=even.stages)) == (130, 128, 126)


def test_random_is_seeded() -> None:
    assert random_feasible(CONFIG4) == random_feasible(CONFIG4)
    assert random_feasible(CONFIG4).ranks != random_feasible(replace(CONFIG4, seed=1)).ranks
    means = [fmean(random_feasible(replace(CONFIG4, seed=seed)).ranks) for seed in range(5)]
    assert all(100 < mean < 160 for mean in means)


def test_repair_and_fill_say_when_they_cannot() -> None:
    graph = llama_graph("tiny", 1, 8, 24)
    with pytest.raises(BudgetError) as caught:
        repair([3] * 7, graph, graph.cost - 1, lambda position, rank: 0.0)
    assert caught.value.budget == graph.cost
    assert fill([1] * 7, graph, graph.cost, lambda position, rank: 0.0) == (1,) * 7


# What holds on every graph


@st.composite
def graphs(draw: st.DrawFn) -> ComputationGraph:
    """LLaMA-like with and without grouped-query attention, fused, and layers unlike each other."""
    n_layers = draw(st.integers(1, 7))
    width = st.sampled_from([8, 24, 64, 96, 320])
    kind = draw(st.sampled_from(["llama", "fused", "uneven"]))
    if kind == "llama":
        return llama_graph(kind, n_layers, draw(width), draw(width), draw(st.none() | width))
    if kind == "fused":
        hidden, wide = draw(width), draw(width)
        shapes = {
            "qkv_proj": (hidden, 2 * hidden),
            "o_proj": (hidden, hidden),
            "gate_up_proj": (hidden, 2 * wide),
        }
        shapes |= {"down_proj": (wide, hidden)}
        made = [Projection(layer, c, *shape) for layer in range(n_layers) for c, shape in shapes.items()]
        return ComputationGraph(kind, tuple(made))
    names = st.sets(st.sampled_from([*TABLE_I, "qkv_proj", "fc1"]), min_size=1, max_size=4)
    made = [Projection(i, c, draw(width), draw(width)) for i in range(n_layers) for c in sorted(draw(names))]
    return ComputationGraph(kind, tuple(made))


@st.composite
def requests(draw: st.DrawFn) -> AllocationRequest:
    graph = draw(graphs())
    rank = draw(st.integers(1, 512) | st.integers(1, 12))
    extra = draw(st.integers(0, graph.cost - 1)) if draw(st.booleans()) else 0
    norm = st.integers(0, 50).map(lambda step: step / 1000)
    n = len(graph.projections)
    profile, stages = None, None
    if draw(st.booleans()):
        mean = draw(st.lists(st.tuples(norm, norm), min_size=n, max_size=n))
        profile = GradientNormProfile(graph, tuple(mean), ((0.0, 0.0),) * n, 4, 1)
    if profile is None or draw(st.booleans()):
        labels = draw(st.lists(st.integers(0, 3), min_size=graph.n_layers, max_size=graph.n_layers))
        stages = tuple(tuple(i for i, at in enumerate(labels) if at == stage) for stage in sorted(set(labels)))
    return AllocationRequest(
        graph,
        Budget.of_parameters(graph, rank * graph.cost + extra),
        profile,
        stages,
        n_stages=draw(st.integers(0, 8)),
        delta=draw(st.integers(1, 9) | st.just(64)),
        step=draw(st.none() | st.integers(1, 5)),
        setting=draw(st.sampled_from(sorted(TABLE_VI))),
        rule="paper" if profile is None else draw(st.sampled_from(["paper", "profile"])),
        seed=draw(st.integers(0, 9)),
    )


def component_ranks(schedule: RankSchedule, component: str) -> Iterator[list[int]]:
    """The ranks of a component in each stage that has it, lowest stage first."""
    stages: Stages = schedule.stages or ()
    layers = schedule.by_layer()
    for stage in stages:
        ranks = [layers[layer][component] for layer in stage if component in layers[layer]]
        if ranks:
            yield ranks


def check_stages_ascend(schedule: RankSchedule) -> None:
    assert schedule.stages is not None
    assert schedule.delta is not None
    for component in schedule.graph.components:
        for lower, upper in pairwise(component_ranks(schedule, component)):
            assert max(lower) + schedule.delta <= min(upper)
    if len({tuple(layer) for layer in schedule.by_layer()}) == 1:
        means = [fmean(r for i in stage for r in schedule.by_layer()[i].values()) for stage in schedule.stages]
        assert all(low + schedule.delta <= high + 1e-9 for low, high in pairwise(means))


def check_full(schedule: RankSchedule) -> None:
    """No projection whose raise Eq. 5 allows is affordable; without stages, no projection at all is."""
    left, layers = schedule.unspent, schedule.graph.projections
    for i, p in enumerate(layers):
        if p.cost <= left:
            raised = replace(schedule, ranks=(*schedule.ranks[:i], schedule.ranks[i] + 1, *schedule.ranks[i + 1 :]))
            assert schedule.stages is not None
            with pytest.raises(AssertionError):
                check_stages_ascend(raised)


def check_nearest(name: str, request: AllocationRequest, error: BudgetError) -> None:
    """The requests that the error names are feasible, and the budget is the smallest that is."""
    assert error.nearest
    assert error.budget is not None
    assert error.budget > request.budget.parameters
    allocate(name, replace(request, budget=Budget.of_parameters(request.graph, error.budget)))
    with pytest.raises(BudgetError):
        allocate(name, replace(request, budget=Budget.of_parameters(request.graph, error.budget - 1)))
    rank = -(-error.budget // request.graph.cost)
    assert f"rank {rank} " in error.nearest
    allocate(name, replace(request, budget=Budget.of_rank(request.graph, rank)))
    if error.n_stages is not None:
        allocate(name, replace(request, n_stages=error.n_stages))
        assert error.n_stages < request.n_stages


def check_possible(request: AllocationRequest, error: StageError) -> None:
    """The number of stages that the error names can be made."""
    assert error.nearest
    assert error.n_stages is not None
    assert len(replace(request, n_stages=error.n_stages).partition) == error.n_stages


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=70, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests())
def test_every_schedule_keeps_its_promises(name: str, request: AllocationRequest) -> None:
    try:
        schedule = allocate(name, request)
    except BudgetError as error:
        check_nearest(name, request, error)
        return
    except StageError as error:
        check_possible(request, error)
        return
    except ConfigError:
        check_unmeasured(name, request)
        return
    assert min(schedule.ranks) >= 1
    assert schedule.graph.parameters(schedule.ranks) <= schedule.budget == request.budget.parameters
    assert RankSchedule.from_json(schedule.to_json()) == schedule
    if name in ("coarse", "fine"):
        assert schedule.delta is not None
        assert schedule.delta <= request.delta
        check_stages_ascend(schedule)
    if name == "coarse":
        stage_ranks(schedule)
    if name in ("linear", "exponential", "decreasing", "random", "proportional") or schedule.name == "fine-profile":
        check_full(schedule)


@pytest.mark.parametrize("name", ALLOCATORS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(request=requests(), parameters=st.integers(-5, 10**4) | st.floats(0, 4).map(lambda x: x))
def test_what_an_error_names_as_nearest_works(name: str, request: AllocationRequest, parameters: float) -> None:
    """Also below rank 1, and where the stages are too many for the profile and the budget at once."""
    asked = int(parameters * request.graph.cost) if isinstance(parameters, float) else parameters
    request = replace(request, budget=Budget(asked, max(0, asked) // request.graph.cost))
    try:
        allocate(name, request)
    except BudgetError as error:
        check_nearest(name, request, error)
    except StageError as error:
        check_stages_work(name, request, error)
    except ConfigError:
        check_unmeasured(name, request)


def check_unmeasured(name: str, request: AllocationRequest) -> None:
    """Without norms, or where they are all zero, there is nothing to be in proportion to."""
    assert name == "proportional"
    assert request.profile is None or not any(request.profile.norms)


def check_stages_work(name: str, request: AllocationRequest, error: StageError) -> None:
    """The number of stages that the error names is served, with the budget that it names where that is too small."""
    assert error.n_stages is not None
    fewer = replace(request, n_stages=error.n_stages)
    if "raise the budget" in error.nearest:
        assert request.budget.parameters < request.graph.cost
        fewer = replace(fewer, budget=Budget.of_rank(request.graph, 1))
    allocate(name, fewer)


@given(request=requests())
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_more_stages_than_any_profile_can_make_are_refused_beforehand(request: AllocationRequest) -> None:
    graph, n = request.graph, max(1, min(request.n_stages, request.graph.n_layers))
    try:
        require_stages(graph, request.budget, n)
    except BudgetError as error:
        check_beforehand(request, n, error)


def check_beforehand(request: AllocationRequest, n: int, error: BudgetError) -> None:
    """The allocator refuses, too, and what the error names serves it, here with the costliest partition."""
    graph = request.graph
    assert error.budget is not None
    assert error.n_stages is not None
    require_stages(graph, Budget.of_parameters(graph, error.budget), n)
    require_stages(graph, request.budget, error.n_stages)
    stages = (*((layer,) for layer in range(n - 1)), tuple(range(n - 1, graph.n_layers)))
    every = replace(request, stages=stages, profile=None, rule="paper")
    with pytest.raises(BudgetError):
        coarse(every)
    coarse(replace(every, budget=Budget.of_parameters(graph, error.budget)))


def test_a_budget_above_the_widest_module_is_refused_before_anything_is_made_of_it() -> None:
    graph = llama_graph("narrow", 4, 128, 256, kv_features=64)
    for rank, parameters in ((129, None), (10**6, None), (None, 128 * graph.cost + 1), (None, 10**15)):
        with pytest.raises(BudgetError, match=r"more than 'narrow' can hold.* Lower it to rank 128 ") as caught:
            Budget.asked(graph, rank, parameters)
        assert caught.value.budget is not None
        assert Budget.asked(graph, None, caught.value.budget) == Budget.asked(graph, 128, None)
    with pytest.raises(BudgetError, match="Raise it to rank 3 "):
        Budget.asked(graph, None, 5, least=3)
    with pytest.raises(ConfigError, match="the budget is empty"):
        Budget.asked(graph, None, None)

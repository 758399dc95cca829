"""From a budget to a rank schedule: HyDRA's coarse and fine ranks (Eq. 5-10) and the rivals set by hand.

Every allocator maps an AllocationRequest to a RankSchedule with all ranks >= 1 and g(G, Z) <= C, or raises an
error that names the nearest request that works.

What holds across stages, S_1 being the lowest in gradient norm, with Δd the `delta` of the schedule returned:

- coarse: one rank for each stage, R_i >= R_{i-1} + Δd (Eq. 5).
- fine, both rules, also after giving back and filling: for each component, its every rank in a stage is at
  least Δd above its every rank in the stage before (the last one before that has the component). Where layers
  have the same components, the mean rank of the stages ascends by at least Δd too.
- uniform, linear, exponential, decreasing, random, proportional: nothing; their `delta` is None.

What is left unspent: linear, exponential, decreasing, random and proportional leave less than the cheapest increment of
one rank, fine by the profile rule less than the cheapest that Δd allows. Uniform, coarse and fine by the paper's
rule leave what their formulas leave.

Symbols of the paper: G graph, Z schedule, g(G, Z) its parameters, C budget, R_standard the rank of uniform
LoRA with that budget, N_l number of layers, N_R = R_standard x N_l total rank, S_i stage of n_i layers with
rank R_i, Δd the least distance of stages.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean
from typing import Literal, get_args

from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile, require_same_graph, stages_of
from hydra_vlm.schedule import DEFAULT_SCALING, RankSchedule, Scaling, Stages, check_stages
from hydra_vlm.signals import GRADIENT_NORM, Signal
from hydra_vlm.spending import Ascent, Worth, fill, in_proportion, repair

FineRule = Literal["paper", "profile"]

TABLE_VI: Mapping[int, Mapping[str, int]] = {
    1: {"q_proj": -2, "k_proj": -2, "up_proj": +2},
    2: {"q_proj": -2, "k_proj": -2, "up_proj": +2, "down_proj": +2},
    3: {"q_proj": -2, "k_proj": -2},
    4: {"q_proj": -1, "k_proj": -1, "up_proj": +2},
    5: {"q_proj": -2, "k_proj": -2, "up_proj": +4},
}
"""Settings 1-5: component -> offset from the coarse rank, in units of Δd/2."""

NOTABLE = 0.25
"""How far from the components' mean, as a share of it, a component's norm is notably low or high.

With the norms of Table I that picks Q and K (low) and Up (high), which is what Eq. 9-10 adjust.
"""

LINEAR_RATIO = 3.0
EXPONENTIAL_RATIO = 9.0
"""Rank of the last layer to that of the first, in the schedules that rise with depth."""


@dataclass(frozen=True, slots=True)
class Budget:
    """C: `parameters` to spend, and `rank` (R_standard), the largest uniform rank that they pay."""

    parameters: int
    rank: int

    @classmethod
    def of_rank(cls, graph: ComputationGraph, rank: int) -> "Budget":
        """What uniform LoRA of this rank costs (Eq. 4); raises BudgetError below rank 1."""
        return cls.of_parameters(graph, rank * graph.cost)

    @classmethod
    def of_parameters(cls, graph: ComputationGraph, parameters: int) -> "Budget":
        """A number of trainable LoRA parameters; raises BudgetError below those of rank 1."""
        if parameters < graph.cost:
            raise _below_rank_one(graph, parameters)
        return cls(parameters, parameters // graph.cost)

    @classmethod
    def asked(cls, graph: ComputationGraph, rank: int | None, parameters: int | None, least: int = 1) -> "Budget":
        """What a user asks for: `parameters`, or where they are not given, what uniform LoRA of `rank` costs.

        `least` is the rank that serves what comes next, for the error of a budget below rank 1; 0 leaves that error to
        the allocator.

        Raises:
            ConfigError: neither is given.
            BudgetError: it is below rank 1, or more than the graph can hold.
        """
        if parameters is None and rank is None:
            raise ConfigError("the budget is empty: give a rank or a number of parameters.")
        asked = parameters if parameters is not None else (rank or 0) * graph.cost
        if least and asked < graph.cost:
            raise _below_rank_one(graph, asked, least)
        require_held(graph, asked, f"a budget of {asked:,} parameters" if parameters is not None else f"rank {rank:,}")
        return cls(asked, asked // graph.cost)


def require_held(graph: ComputationGraph, parameters: int, what: str) -> None:
    """Raises BudgetError when `what` has more parameters than uniform LoRA at the widest projection's full rank."""
    widest = max(graph.projections, key=lambda p: min(p.in_features, p.out_features))
    most = min(widest.in_features, widest.out_features)
    if parameters > most * graph.cost:
        raise BudgetError(
            f"{what} is more than {graph.name!r} can hold: its widest projection, {widest.component}, has rank {most}, "
            "and a higher one expresses nothing more.",
            nearest=f"Lower it to rank {most} ({most * graph.cost:,} parameters).",
            budget=most * graph.cost,
        )


def _below_rank_one(graph: ComputationGraph, parameters: int, least: int = 1) -> BudgetError:
    return BudgetError(
        f"a budget of {parameters:,} parameters is below rank 1 for every projection of {graph.name!r}.",
        nearest=f"Raise it to rank {least} ({least * graph.cost:,} parameters).",
        budget=least * graph.cost,
    )


@dataclass(frozen=True)
class AllocationRequest:
    """What a schedule is to be made of; each allocator reads what it needs.

    Stages are `stages`, or made from `profile` into `n_stages`. `delta` is Δd, `step` that of R_1 (None: Δd,
    which gives the paper's Config4; the text of Section III.B says 1). `setting` is one of Table VI, `rule`
    says whether fine offsets are the paper's or follow `profile`, `seed` is for the random schedule. `signals` are what
    was measured beside the profile, `signal` the kind of these (or of the profile) that ranks in proportion follow.

    Whether the budget is enough is the allocator's to say. Raises ConfigError, StageError or GraphMismatchError
    (foreign profile).
    """

    graph: ComputationGraph
    budget: Budget
    profile: GradientNormProfile | None = None
    stages: Stages | None = None
    n_stages: int = 3
    delta: int = 2
    step: int | None = None
    setting: int = 1
    rule: FineRule = "paper"
    seed: int = 0
    scaling: Scaling = DEFAULT_SCALING
    signals: tuple[Signal, ...] = ()
    signal: str = GRADIENT_NORM

    def __post_init__(self) -> None:
        for what, value in (("delta", self.delta), ("step", self.step)):
            if value is not None and value < 1:
                raise ConfigError(f"{what} must be a positive integer, got {value}.")
        if self.setting not in TABLE_VI:
            raise ConfigError(f"setting {self.setting} is not in Table VI: use one of 1-{max(TABLE_VI)}.")
        if self.rule not in get_args(FineRule):
            raise ConfigError(f"rule {self.rule!r} is unknown: use one of {', '.join(get_args(FineRule))}.")
        for measured in (self.profile, *self.signals):
            if measured is not None:
                require_same_graph(measured, self.graph)
        if self.stages is not None:
            check_stages(self.stages, self.graph.n_layers)

    @cached_property
    def partition(self) -> Stages:
        """The stages to use, lowest gradient norm first; raises StageError when nothing tells them."""
        if self.stages is not None:
            return self.stages
        if self.profile is not None:
            try:
                return stages_of(self.profile, self.n_stages)
            except StageError as error:
                raise _affordable_stages(self, self.profile, error) from None
        raise StageError(
            "stages are sets of layers with similar gradient norms; neither stages nor a profile is given.",
            nearest="Name the stages, such as 1-8,9-12,13-24, or give a profile and n_stages.",
        )

    def measured(self, kind: str) -> Signal | None:
        """The signal of this kind; None where it was not measured."""
        of_profile = [self.profile.signal()] if self.profile is not None else []
        return next((signal for signal in (*of_profile, *self.signals) if signal.kind == kind), None)

    def schedule(self, name: str, ranks: Sequence[int], delta: int | None = None) -> RankSchedule:
        """These ranks as a schedule, checked against the budget; `delta` when they came from the stages."""
        stages = None if delta is None else self.partition
        made = RankSchedule(name, self.graph, tuple(ranks), self.budget.parameters, stages, delta, scaling=self.scaling)
        made.check()
        return made


@dataclass(frozen=True)
class Allocator:
    """A way from a request to a schedule, and the kind of signal that it needs for a request, if any."""

    make: Callable[[AllocationRequest], RankSchedule]
    needs: Callable[[AllocationRequest], str | None] = lambda request: None

    def __call__(self, request: AllocationRequest) -> RankSchedule:
        return self.make(request)


# HyDRA


def coarse(request: AllocationRequest) -> RankSchedule:
    """One rank for each stage, by Eq. 5-8.

    R_1 starts at Eq. 7 (at 1 where that is not positive) and rises by `step` as long as the last stage, which
    takes what is left (Eq. 8), keeps Eq. 5 and g(G, Z) <= C; the last R_1 that does is taken. Where the start
    itself fails, the largest smaller R_1 that works is taken. Where none does, the largest smaller Δd for
    which one works, which is then the schedule's `delta`. A single stage is uniform LoRA.

    Raises BudgetError when not even Δd = 1 works, with the smallest budget and, for stages made from a
    profile, the largest number of stages that would.
    """
    stage_ranks, delta = _stage_ranks(request)
    return request.schedule("coarse", _spread(request.graph, request.partition, stage_ranks), delta)


def _stage_ranks(request: AllocationRequest) -> tuple[tuple[int, ...], int]:
    """R_1 … R_t and the Δd in force."""
    frame = Frame.of(request, request.partition)
    if len(frame.sizes) == 1:
        _require_rank_one(request)
        return (request.budget.rank,), request.delta
    for delta in range(min(request.delta, frame.total_rank), 0, -1):
        if frame.ranks(1, delta) is None:
            continue
        start = frame.start()
        accepted = frame.ranks(start, delta)
        if accepted is None:
            smaller = (frame.ranks(first, delta) for first in range(start - 1, 0, -1))
            return next(ranks for ranks in smaller if ranks is not None), delta
        step = request.step or delta
        first = start + step
        while (ranks := frame.ranks(first, delta)) is not None:
            accepted, first = ranks, first + step
        return accepted, delta
    raise _infeasible(request, frame)


@dataclass(frozen=True)
class Frame:
    """What Eq. 5-8 know of two or more stages: layers and parameters per rank of each, N_R and C."""

    sizes: tuple[int, ...]
    costs: tuple[int, ...]
    total_rank: int
    parameters: int

    @classmethod
    def of(cls, request: AllocationRequest, stages: Stages) -> "Frame":
        """Of these stages under the request's budget."""
        graph, parameters = request.graph, request.budget.parameters
        costs = tuple(sum(graph.layer_cost(layer) for layer in stage) for stage in stages)
        # N_R = R_standard x N_l (Eq. 6); parameters between two uniform ranks count in proportion.
        return cls(tuple(map(len, stages)), costs, parameters * graph.n_layers // graph.cost, parameters)

    def start(self) -> int:
        """The first R_1: 2⌊(R_standard - 2α)/2⌋ with 2α = N_l - 1 (Eq. 7), at least 1."""
        n_layers = sum(self.sizes)
        return max(1, 2 * ((self.total_rank // n_layers - (n_layers - 1)) // 2))

    def ranks(self, first: int, delta: int) -> tuple[int, ...] | None:
        """R_1 = first, …, with the last stage taking what is left (Eq. 8), or None when that breaks Eq. 5."""
        lower = [first + i * delta for i in range(len(self.sizes) - 1)]
        total_left = self.total_rank - _dot(self.sizes[:-1], lower)
        parameters_left = self.parameters - _dot(self.costs[:-1], lower)
        last = min(total_left // self.sizes[-1], parameters_left // self.costs[-1])
        return (*lower, last) if last >= lower[-1] + delta else None

    def least_parameters(self, delta: int = 1) -> int:
        """The smallest C for which ranks(1, delta) exists."""
        ladder = range(1, 1 + delta * len(self.sizes), delta)
        total = _dot(self.sizes, ladder)
        return max(_dot(self.costs, ladder), -(-total * sum(self.costs) // sum(self.sizes)))


def require_stages(graph: ComputationGraph, budget: Budget, n_stages: int) -> None:
    """Raises BudgetError when no partition into so many stages fits the budget, whatever the profile will be.

    It names a rank that serves every partition: at rank n, n stages can always have ranks 1 to n.
    """
    n = min(n_stages, graph.n_layers)
    costs = sorted(graph.layer_costs, reverse=True)
    sizes = (graph.n_layers - n + 1, *[1] * (n - 1))
    at_best = Frame(sizes, (sum(costs[: sizes[0]]), *costs[sizes[0] :]), 0, 0)
    if at_best.least_parameters() > budget.parameters:
        raise BudgetError(
            f"rank budget {budget.rank} ({budget.parameters:,} parameters) cannot give {n} stages ascending ranks from "
            "1 on, however the layers are divided.",
            nearest=f"Raise the budget to rank {n} ({n * graph.cost:,} parameters), or lower n_stages to "
            f"{max(1, budget.rank)}.",
            budget=n * graph.cost,
            n_stages=max(1, budget.rank),
        )


def _require_rank_one(request: AllocationRequest) -> None:
    if request.budget.parameters < request.graph.cost:
        raise _below_rank_one(request.graph, request.budget.parameters)


def _dot(weights: Sequence[int], values: Sequence[int]) -> int:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


def _infeasible(request: AllocationRequest, frame: Frame) -> BudgetError:
    """Says which budget would serve these stages, and how many stages this budget would serve."""
    least = frame.least_parameters()
    nearest = f"Raise the budget to rank {-(-least // request.graph.cost)} (at least {least:,} parameters)"
    fewer = None
    if request.stages is None and request.profile is not None:
        fewer = _most_stages(request, request.profile, len(frame.sizes) - 1)
        nearest += f" or lower n_stages to {fewer}" if fewer else ""
    return BudgetError(
        f"rank budget {request.budget.rank} ({frame.parameters:,} parameters) cannot give {len(frame.sizes)} "
        "stages ascending ranks from 1 on, not even with delta 1.",
        nearest=nearest + ".",
        budget=least,
        n_stages=fewer,
    )


def _most_stages(request: AllocationRequest, profile: GradientNormProfile, most: int) -> int | None:
    """The largest number of stages, at most `most`, that the budget serves; None where it serves not even one."""

    def served(n: int) -> bool:
        return Frame.of(request, stages_of(profile, n)).least_parameters() <= request.budget.parameters

    return next((n for n in range(most, 0, -1) if served(n)), None)


def _affordable_stages(request: AllocationRequest, profile: GradientNormProfile, error: StageError) -> StageError:
    """The same error, naming a number of stages that the profile makes and the budget serves."""
    if error.n_stages is None:
        return error
    message = str(error).removesuffix(error.nearest).strip()
    n = _most_stages(request, profile, error.n_stages)
    if n is None:
        cost = request.graph.cost
        return StageError(message, f"Set n_stages to 1 and raise the budget to rank 1 ({cost:,} parameters).", 1)
    return StageError(message, f"Set n_stages to {n}.", n)


def _spread(graph: ComputationGraph, stages: Stages, stage_ranks: Sequence[int]) -> list[int]:
    """One rank for each projection from one for each stage."""
    of_layer = {layer: rank for stage, rank in zip(stages, stage_ranks, strict=True) for layer in stage}
    return [of_layer[p.layer] for p in graph.projections]


def fine(request: AllocationRequest) -> RankSchedule:
    """Coarse ranks with an offset for each component, by `rule`; always g(G, Z) <= C.

    paper: the setting of Table VI; where that exceeds C (grouped-query attention; Settings 2, 4 and 5 also on
    the paper's own Config4) rank is given back where the profile says it is worth least, or without a profile
    from the costliest component raised above the coarse rank.
    profile: components with a notably low norm get -Δd, with a notably high norm +Δd (`measured_offsets`),
    then what is left of the budget goes where the norm per parameter is highest (`measured_worth`).

    Raises ConfigError for the profile rule without a profile, and what `coarse` raises.
    """
    return refine(request, coarse(request))


def refine(request: AllocationRequest, base: RankSchedule) -> RankSchedule:
    """The fine ranks, as `fine` makes them, around any coarse schedule of the request's stages and budget.

    Raises ConfigError for the profile rule without a profile, and for a `base` without `delta`.
    """
    if base.delta is None:
        raise ConfigError(f"schedule {base.name!r} has no delta, so offsets have no size.")
    order = Ascent.of(request.graph, request.partition, base.delta)
    if request.rule == "paper":
        name, shifted = f"fine-setting{request.setting}", apply_setting(base, request.setting).ranks
    elif request.profile is not None:
        name, shifted = "fine-profile", _shift(base, measured_offsets(request.profile, base.delta))
    else:
        raise ConfigError("rule 'profile' follows measured gradient norms: give a profile, or use rule 'paper'.")
    worth = _costliest_last(base) if request.profile is None else measured_worth(request.profile, shifted)
    ranks = repair(shifted, request.graph, request.budget.parameters, worth, order)
    if request.rule == "profile":
        ranks = fill(ranks, request.graph, request.budget.parameters, worth, order)
    return request.schedule(name, ranks, base.delta)


def apply_setting(base: RankSchedule, setting: int) -> RankSchedule:
    """A setting of Table VI on a coarse schedule, unrepaired: it may exceed the budget.

    Components that a graph does not have by these names (a fused qkv_proj) keep the coarse rank. Half of an
    odd Δd is rounded to the cheaper side, -3/2 to -2. A component that would fall below rank 1 in the lowest
    stage is lowered by less, in all stages alike, so that its ranks still ascend. Raises ConfigError when the
    schedule has no `delta`.
    """
    if base.delta is None:
        raise ConfigError(f"schedule {base.name!r} has no delta, so the offsets of Table VI have no size.")
    offsets = {component: units * base.delta // 2 for component, units in TABLE_VI[setting].items()}
    return replace(base, name=f"fine-setting{setting}", ranks=_shift(base, offsets))


def _shift(base: RankSchedule, offsets: Mapping[str, int]) -> tuple[int, ...]:
    lowest = 1 - min(base.ranks)
    return tuple(
        rank + max(offsets.get(p.component, 0), lowest)
        for rank, p in zip(base.ranks, base.graph.projections, strict=True)
    )


def measured_offsets(profile: GradientNormProfile, delta: int) -> dict[str, int]:
    """-Δd, 0 or +Δd for each component, as its norm is notably below, near or above the mean of its part's."""
    norms = profile.component_norms()
    offsets = {}
    for layers in profile.graph.part_layers.values():
        components = {p.component for layer in layers for p in profile.graph.layer(layer)}
        mean = fmean(norms[component] for component in components)
        for component in components:
            high, low = norms[component] > (1 + NOTABLE) * mean, norms[component] < (1 - NOTABLE) * mean
            offsets[component] = delta * (high - low)
    return offsets


def measured_worth(profile: GradientNormProfile, base: Sequence[int]) -> Worth:
    """Norm per parameter, divided by how many-th unit above `base` it is, or times how many-th below.

    The division spreads rank in proportion to norm per parameter (the highest-averages rule of seat
    apportionment); without it a single projection would take everything.
    """
    per_parameter = [norm / cost for norm, cost in zip(profile.norms, profile.graph.costs, strict=True)]

    def worth(position: int, rank: int) -> float:
        above = rank - base[position]
        return per_parameter[position] / above if above > 0 else per_parameter[position] * (1 - above)

    return worth


def _costliest_last(base: RankSchedule) -> Worth:
    """Least worth: what is furthest above the coarse rank, in parameters."""

    def worth(position: int, rank: int) -> float:
        return -(rank - base.ranks[position]) * base.graph.costs[position]

    return worth


# Rivals by hand


def uniform(request: AllocationRequest) -> RankSchedule:
    """Standard LoRA: R_standard everywhere."""
    _require_rank_one(request)
    return request.schedule("uniform", [request.budget.rank] * len(request.graph.projections))


def linear(request: AllocationRequest) -> RankSchedule:
    """Ranks rise evenly with depth, the last layer's three times the first's, and spend the budget."""
    return _ramp(request, "linear", lambda depth: 1 + (LINEAR_RATIO - 1) * depth)


def exponential(request: AllocationRequest) -> RankSchedule:
    """Ranks rise by a factor with depth, the last layer's nine times the first's, and spend the budget."""
    return _ramp(request, "exponential", lambda depth: EXPONENTIAL_RATIO**depth)


def _ramp(request: AllocationRequest, name: str, weight: Callable[[float], float]) -> RankSchedule:
    _require_rank_one(request)
    graph = request.graph
    weights = [weight(graph.depth(layer)) for layer in range(graph.n_layers)]
    scale = request.budget.parameters / sum(w * cost for w, cost in zip(weights, graph.layer_costs, strict=True))
    return request.schedule(name, _near(request, [scale * weights[p.layer] for p in graph.projections]))


def decreasing(request: AllocationRequest) -> RankSchedule:
    """The mirror image of `coarse`: its stage ranks in reverse, the highest for the lowest gradient norm.

    Stages differ in size, so the mirror image costs more or less than C; all its ranks are moved up or down
    together until it spends the budget. Raises what `coarse` raises.
    """
    stage_ranks, _ = _stage_ranks(request)
    mirrored = _spread(request.graph, request.partition, stage_ranks[::-1])
    move = (request.budget.parameters - request.graph.parameters(mirrored)) / request.graph.cost
    return request.schedule("decreasing", _near(request, [rank + move for rank in mirrored]))


def random_feasible(request: AllocationRequest) -> RankSchedule:
    """Ranks >= 1 drawn by `seed`: what rank 1 everywhere leaves of C is split uniformly at random.

    Uniform means over all ways to split it between projections (a flat Dirichlet draw).
    """
    _require_rank_one(request)
    graph = request.graph
    draw = random.Random(request.seed)
    shares = [draw.expovariate(1.0) for _ in graph.projections]
    free = (request.budget.parameters - graph.cost) / sum(shares)
    targets = [1 + free * share / cost for share, cost in zip(shares, graph.costs, strict=True)]
    return request.schedule("random", _near(request, targets))


def _near(request: AllocationRequest, targets: Sequence[float]) -> tuple[int, ...]:
    """The ranks nearest to real-valued targets that spend the budget."""
    graph, parameters = request.graph, request.budget.parameters

    def shortfall(position: int, rank: int) -> float:
        return targets[position] - rank

    ranks = [max(1, math.floor(target)) for target in targets]
    return fill(repair(ranks, graph, parameters, shortfall), graph, parameters, shortfall)


def proportional(request: AllocationRequest) -> RankSchedule:
    """Ranks in proportion to the signal of kind `request.signal`, that spend the budget.

    None is below 1 or above the projection's full rank. Raises ConfigError for a signal that is missing or zero
    everywhere.
    """
    signal = request.measured(request.signal)
    if signal is None:
        raise _unmeasured("proportional", request.signal, request)
    if not any(signal.values):
        raise ConfigError(f"signal {signal.kind} is 0 everywhere, so nothing is in proportion to it: measure it anew.")
    _require_rank_one(request)
    return request.schedule(
        "proportional", _near(request, in_proportion(signal.values, request.graph, request.budget.parameters))
    )


def _unmeasured(name: str, kind: str, request: AllocationRequest) -> ConfigError:
    given = ", ".join(signal.kind for signal in request.signals) or "none"
    otherwise = "name the stages, such as 1-8,9-12,13-24" if name in STAGED else "take an allocator such as uniform"
    return ConfigError(
        f"{name} ranks follow the signal {kind}, which is not given (signals given: {given}): measure it with "
        f"`hydra-vlm profile --signal {kind}` and give it, or {otherwise}."
    )


def _norms_for_stages(request: AllocationRequest) -> str | None:
    return GRADIENT_NORM if request.stages is None else None


def _norms_for_fine(request: AllocationRequest) -> str | None:
    return GRADIENT_NORM if request.rule == "profile" else _norms_for_stages(request)


ALLOCATORS: Mapping[str, Allocator] = {
    "uniform": Allocator(uniform),
    "coarse": Allocator(coarse, _norms_for_stages),
    "fine": Allocator(fine, _norms_for_fine),
    "proportional": Allocator(proportional, lambda request: request.signal),
    "linear": Allocator(linear),
    "exponential": Allocator(exponential),
    "decreasing": Allocator(decreasing, _norms_for_stages),
    "random": Allocator(random_feasible),
}

STAGED = frozenset({"coarse", "fine", "decreasing"})
"""Allocators whose ranks go from stage to stage."""


def allocate(name: str, request: AllocationRequest) -> RankSchedule:
    """The schedule of the allocator of this name; raises ConfigError for another name, or a signal that is missing."""
    allocator = allocator_of(name)
    kind = allocator.needs(request)
    if kind is not None and request.measured(kind) is None:
        raise _unmeasured(name, kind, request)
    return allocator(request)


def allocator_of(name: str) -> Allocator:
    """The allocator of this name; raises ConfigError for another name."""
    if name not in ALLOCATORS:
        raise ConfigError(f"no allocator is called {name!r}: use one of {', '.join(ALLOCATORS)}.")
    return ALLOCATORS[name]

"""The solution space around a profile: which schedules a search may try under a budget, and how they are named.

Closed (`staged.py`): N_s, Δd, R_1 (and so every R_i), the rule, and component offsets in units of Δd/2. Every schedule
keeps Eq. 5 across its stages and g(G, Z) <= C. Open: a rank for every projection, 0 meaning not adapted; g(G, Z) <= C,
and less is left of C than the cheapest projection's next rank. Either may be tuned: learning rate and scale vary too,
for uniform LoRA as for any other schedule.

Symbols of the paper: G graph, Z schedule, g(G, Z) its parameters, C budget, N_s number of stages, Δd `delta`, R_i rank
of stage i.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast, get_args

from hydra_vlm.allocation import Budget, FineRule
from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.schedule import DEFAULT_SCALING, RankSchedule, Scaling, Stages
from hydra_vlm.search.staged import Choice, Span, StagedSpace, fitted, ranks_of
from hydra_vlm.spending import fill, repair

Value = int | float | str
"""What a named choice may be."""

HIGH = 4
"""In the flat view of the open space a rank is asked for in 0 … HIGH x R_standard; only proportions count."""


Tuned = tuple[float, float]
"""A learning rate and a scale."""


@dataclass(frozen=True)
class Tuning:
    """The ranges of learning rate and scale, lowest and highest, both drawn on a log scale.

    The scale is the factor on LoRA's update at rank R_standard: α/r itself where that is constant.
    Raises ConfigError for a range that is not positive, finite and in order.
    """

    learning_rate: tuple[float, float]
    scale: tuple[float, float]

    def __post_init__(self) -> None:
        for what, (low, high) in (("learning_rate", self.learning_rate), ("scale", self.scale)):
            if not 0 < low <= high < math.inf:
                raise ConfigError(f"the range of {what} must be positive and in order, got {low} to {high}.")

    @classmethod
    def around(cls, learning_rate: float, scale: float = DEFAULT_SCALING.value, factor: float = 4.0) -> "Tuning":
        """From a `factor`-th to `factor` times a recipe's own values."""
        return cls((learning_rate / factor, learning_rate * factor), (scale / factor, scale * factor))

    @property
    def middle(self) -> Tuned:
        """The learning rate and scale in the middle of their ranges, on a log scale."""
        (low, high), (least, most) = self.learning_rate, self.scale
        return math.sqrt(low * high), math.sqrt(least * most)


@dataclass(frozen=True)
class Space:
    """What may vary under a budget, around a profile.

    `open` frees every rank; without it, a profile is needed and `n_stages`, `deltas`, `offsets` (units of Δd/2, -4 to 4
    holds all of Table VI) and `rules` say what varies, each lowest and highest; None means: as many stages as the
    profile makes, and Δd up to an eighth of R_standard, or 2. `scaling` is that of every schedule; `tuned` replaces its
    value.

    Raises BudgetError when no schedule fits the budget, StageError when the profile does not make so many stages or is
    missing, ConfigError for a range that is none, GraphMismatchError for a foreign profile.
    """

    graph: ComputationGraph
    budget: Budget
    profile: GradientNormProfile | None = None
    open: bool = False
    tuned: Tuning | None = None
    n_stages: Span | None = None
    deltas: Span | None = None
    offsets: Span = (-4, 4)
    rules: tuple[FineRule, ...] = ("paper", "profile")
    scaling: Scaling = DEFAULT_SCALING

    def __post_init__(self) -> None:
        for what, span, least in (
            ("n_stages", self.n_stages, 1),
            ("deltas", self.deltas, 1),
            ("offsets", self.offsets, -math.inf),
        ):
            from_one = " of at least 1" if least == 1 else ""
            if span is not None and not least <= span[0] <= span[1]:
                raise ConfigError(f"{what} must be a lowest value{from_one} and a highest one, got {span}.")
        if not self.offsets[0] <= 0 <= self.offsets[1]:
            raise ConfigError(f"offsets must include 0, the coarse ranks, got {self.offsets}.")
        if not self.rules or not set(self.rules) <= set(get_args(FineRule)):
            raise ConfigError(f"rules must be some of {', '.join(get_args(FineRule))}, got {self.rules}.")
        if self.profile is not None:
            require_same_graph(self.profile, self.graph)
        if self.open:
            self._check_open()
        else:
            assert self.staged  # raises where no schedule is
        scaling = self.scaling.under(self.graph, self.budget.parameters)
        object.__setattr__(self, "scaling", scaling)  # as it is in every schedule of the space; the field is frozen

    def _check_open(self) -> None:
        least = min(self.graph.costs)
        if self.budget.parameters < least:
            raise BudgetError(
                f"a budget of {self.budget.parameters:,} parameters is below rank 1 for any projection of "
                f"{self.graph.name!r}.",
                nearest=f"Raise it to {least:,} parameters.",
                budget=least,
            )

    @cached_property
    def staged(self) -> StagedSpace:
        """The closed space; raises StageError without a profile."""
        if self.profile is None:
            raise StageError(
                "the closed space follows measured gradient norms, and no profile is given.",
                nearest="Give a profile, or open the space.",
            )
        norms = self.profile.layer_norms()
        most = max(len({norms[layer] for layer in layers}) for layers in self.graph.part_layers.values())
        return StagedSpace(
            self.graph,
            self.budget,
            self.profile,
            self.n_stages or (1, most),
            self.deltas or (1, max(2, self.budget.rank // 8)),
            self.offsets,
            self.rules,
        )

    def scaled(self, scale: float) -> Scaling:
        """The scaling with this factor at rank R_standard."""
        return replace(self.scaling, value=scale / replace(self.scaling, value=1.0).scale(max(1, self.budget.rank)))

    def scale_of(self, scaling: Scaling) -> float:
        """The factor of a scaling at rank R_standard."""
        return scaling.scale(max(1, self.budget.rank))


@dataclass(frozen=True)
class Candidate:
    """One point of a space: its named choices, the schedule that follows, and the learning rate where that is tuned.

    A tuned scale is in `schedule.scaling`.
    """

    choices: tuple[tuple[str, Value], ...]
    schedule: RankSchedule
    learning_rate: float | None = None

    @property
    def values(self) -> dict[str, Value]:
        """The choices by name, as `candidate` takes them."""
        return dict(self.choices)

    @property
    def key(self) -> tuple[tuple[int, ...], Scaling, float | None]:
        """What makes two candidates the same training run: different choices may lead to one schedule."""
        return self.schedule.ranks, self.schedule.scaling, self.learning_rate

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object."""
        return {
            "choices": self.values,
            "schedule": self.schedule.to_json(),
            "learning_rate": self.learning_rate,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Candidate":
        """The inverse of `to_json`; raises ConfigError on anything else."""
        try:
            rate = data["learning_rate"]
            return cls(
                tuple((str(name), value) for name, value in data["choices"].items()),
                RankSchedule.from_json(data["schedule"]),
                None if rate is None else float(rate),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"not a candidate: {type(error).__name__} {error}.") from error


# Making candidates


def make(
    space: Space, choices: Sequence[tuple[str, Value]], ranks: Sequence[int], tuned: Tuned | None, stages: Stages | None
) -> Candidate:
    """A candidate of these choices and ranks; `stages` only for the closed space."""
    values: list[tuple[str, Value]] = list(choices)
    scaling, rate = space.scaling, None
    if space.tuned is not None:
        assert tuned is not None  # the two come together
        rate, scaling = tuned[0], space.scaled(tuned[1])
        values += [("learning_rate", tuned[0]), ("scale", tuned[1])]
    delta = None if stages is None else int(dict(choices)["delta"])
    name = "open" if space.open else "staged"
    schedule = RankSchedule(name, space.graph, tuple(ranks), space.budget.parameters, stages, delta, scaling)
    return Candidate(tuple(values), schedule, rate)


def staged_candidate(space: Space, choice: Choice, tuned: Tuned | None) -> Candidate:
    """The candidate of a choice in the closed space, which must be inside of it."""
    ranks = ranks_of(space.staged, choice)
    assert ranks is not None  # inside
    named: list[tuple[str, Value]] = [("n_stages", choice.n_stages), ("delta", choice.delta)]
    named += [("first_rank", choice.first_rank), ("rule", choice.rule)]
    named += [(f"offset.{c}", units) for c, units in zip(space.graph.components, choice.offsets, strict=True)]
    return make(space, named, ranks, tuned, space.staged.partitions[choice.n_stages])


def open_candidate(space: Space, ranks: Sequence[int], tuned: Tuned | None) -> Candidate:
    """The candidate of these ranks, which must be inside of the open space."""
    return make(space, list(zip(_rank_names(space.graph), ranks, strict=True)), ranks, tuned, None)


def _rank_names(graph: ComputationGraph) -> list[str]:
    return [f"rank.{p.layer + 1}.{p.component}" for p in graph.projections]


def choice_of(graph: ComputationGraph, values: Mapping[str, Value]) -> Choice:
    """The choice in the closed space that these named values are."""
    n, delta, first = (int(values[name]) for name in ("n_stages", "delta", "first_rank"))
    offsets = tuple(int(values[f"offset.{component}"]) for component in graph.components)
    return Choice(n, delta, first, cast(FineRule, values["rule"]), offsets)


def tuned_of(space: Space, found: Candidate) -> Tuned | None:
    """The learning rate and scale of a candidate."""
    if space.tuned is None:
        return None
    return float(found.values["learning_rate"]), float(found.values["scale"])


def spend(space: Space, targets: Sequence[float]) -> tuple[int, ...]:
    """Ranks near to real-valued targets within C that leave less than the cheapest increment unspent.

    What is left goes where ranks fall shortest of their targets; a target of 0 stays rank 0 as long as anything else is
    affordable.
    """

    def shortfall(position: int, rank: int) -> float:
        return targets[position] - rank if targets[position] > 0 else -math.inf

    graph, budget = space.graph, space.budget.parameters
    ranks: Sequence[int] = [math.floor(target) for target in targets]
    if graph.parameters(ranks) > budget:  # by rounding, where targets spend C to the last parameter
        ranks = repair(ranks, graph, budget, shortfall)
    return fill(ranks, graph, budget, shortfall)


# The flat view


@dataclass(frozen=True)
class Parameter:
    """One named choice as samplers see it: its kind and range, both ends included, or its `options`."""

    name: str
    kind: Literal["int", "float", "categorical"]
    low: float = 0
    high: float = 0
    log: bool = False
    options: tuple[str, ...] = ()


def parameters(space: Space) -> tuple[Parameter, ...]:
    """All choices of the space, for samplers that know named parameters only; `candidate` takes their values.

    In the open space any rank vector is scaled to the budget, so a candidate's own ranks may lie above these ranges.
    """
    if space.open:
        high = max(1, HIGH * space.budget.rank)
        pairs = zip(_rank_names(space.graph), space.graph.costs, strict=True)
        found = [Parameter(name, "int", 0, min(high, space.budget.parameters // cost)) for name, cost in pairs]
    else:
        rooms = space.staged.rooms
        deltas = {delta for room in rooms.values() for delta in room}
        firsts = [end for room in rooms.values() for firsts in room.values() for end in (firsts[0], firsts[-1])]
        found = [Parameter("n_stages", "int", min(rooms), max(rooms))]
        found += [Parameter("delta", "int", min(deltas), max(deltas))]
        found += [Parameter("first_rank", "int", min(firsts), max(firsts))]
        found += [Parameter("rule", "categorical", options=space.rules)]
        found += [Parameter(f"offset.{c}", "int", *space.offsets) for c in space.graph.components]
    if space.tuned is not None:
        found += [Parameter("learning_rate", "float", *space.tuned.learning_rate, log=True)]
        found += [Parameter("scale", "float", *space.tuned.scale, log=True)]
    return tuple(found)


def candidate(space: Space, values: Mapping[str, Value]) -> Candidate:
    """The candidate of these values, or the one near to them that the space holds; the same for the same values.

    Values beyond a range go to its end. Raises ConfigError for names that are not those of `parameters`, and for
    values of another kind.
    """
    known = {p.name: p for p in parameters(space)}
    if set(values) != set(known):
        wrong = sorted(set(values) ^ set(known))[0]
        raise ConfigError(f"this space needs a value for each of {', '.join(known)}, and {wrong!r} does not agree.")
    for name, p in known.items():
        value = values[name]
        if p.kind == "categorical" and value not in p.options:
            raise ConfigError(f"{name} is {value!r}: use one of {', '.join(p.options)}.")
        if p.kind != "categorical" and (isinstance(value, str) or not math.isfinite(value)):
            raise ConfigError(f"{name} is {value!r}: it must be a number.")
    tuned = None
    if space.tuned is not None:
        rate, scale = (min(max(float(values[n]), known[n].low), known[n].high) for n in ("learning_rate", "scale"))
        tuned = rate, scale
    if space.open:
        return open_candidate(space, proportioned(space, [int(values[n]) for n in _rank_names(space.graph)]), tuned)
    return staged_candidate(space, fitted(space.staged, choice_of(space.graph, values)), tuned)


def proportioned(space: Space, ranks: Sequence[int]) -> tuple[int, ...]:
    """Any ranks, scaled to spend the budget; no rank above 0 means the same rank everywhere."""
    asked = [max(0, rank) for rank in ranks]
    if not any(asked):
        asked = [1] * len(asked)
    spent = space.graph.parameters(asked)
    return spend(space, [rank * space.budget.parameters / spent for rank in asked])

"""The closed space: schedules that the paper's formulas give, for every N_s, Δd, R_1, rule and component offset.

A choice becomes ranks in one of two ways:

- plain: every projection of component c in stage i has rank R_i + o_c, R_i by Eq. 5 and 8, the offset o_c in units of
  Δd/2; no rank is below 1, and g(G, Z) <= C as it stands.
- settled: what `allocation.refine` makes of the profile's rule, or of a setting of Table VI that does not fit as it
  stands; it gives rank back, and fills.

Any other offset that goes beyond the budget is outside of the space; `fitted` leads back into it. Thus every schedule
that `allocation.coarse` and `allocation.fine` make in the ranges given is inside.

Symbols of the paper: N_s number of stages, Δd `delta`, R_i rank of stage i, R_1 `first_rank`, C budget.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from hydra_vlm.allocation import TABLE_VI, AllocationRequest, Budget, FineRule, Frame, measured_offsets, refine
from hydra_vlm.errors import BudgetError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.profile import GradientNormProfile, stages_of
from hydra_vlm.schedule import RankSchedule, Stages
from hydra_vlm.search.ways import Ways

Span = tuple[int, int]
"""Lowest and highest value, both included."""


class Rung(NamedTuple):
    """What fixes the stage ranks: N_s, Δd, R_1."""

    n_stages: int
    delta: int
    first_rank: int


class Choice(NamedTuple):
    """One choice; `offsets` are in units of Δd/2, one for each component of the graph, all 0 with rule `profile`."""

    n_stages: int
    delta: int
    first_rank: int
    rule: FineRule
    offsets: tuple[int, ...]

    @property
    def rung(self) -> Rung:
        """What fixes the stage ranks."""
        return Rung(self.n_stages, self.delta, self.first_rank)


@dataclass(frozen=True)
class StagedSpace:
    """The ranges of N_s, Δd and offsets, and which of their combinations the budget allows.

    Raises BudgetError when it allows none, StageError when the profile cannot make so many stages.
    """

    graph: ComputationGraph
    budget: Budget
    profile: GradientNormProfile
    n_stages: Span
    deltas: Span
    offsets: Span
    rules: tuple[FineRule, ...]

    def __post_init__(self) -> None:
        if not self.rooms:
            self._refuse()

    def _refuse(self) -> None:
        delta = self.deltas[0]
        least, n = min((frame.least_parameters(delta), n) for n, frame in self.frames.items())
        raise BudgetError(
            f"rank budget {self.budget.rank} ({self.budget.parameters:,} parameters) has no schedule of "
            f"{self.n_stages[0]}-{self.n_stages[1]} stages whose ranks ascend by at least {delta}.",
            nearest=f"Raise the budget to rank {-(-least // self.graph.cost)} (at least {least:,} parameters, for {n} "
            f"stages){', or let n_stages begin at 1' if self.budget.rank else ''}.",
            budget=least,
        )

    @cached_property
    def partitions(self) -> dict[int, Stages]:
        """The stages for each N_s."""
        return {n: stages_of(self.profile, n) for n in range(self.n_stages[0], self.n_stages[1] + 1)}

    @cached_property
    def frames(self) -> dict[int, Frame]:
        """What Eq. 5-8 know of the stages, for each N_s."""
        request = AllocationRequest(self.graph, self.budget)
        return {n: Frame.of(request, stages) for n, stages in self.partitions.items()}

    @cached_property
    def rooms(self) -> dict[int, dict[int, range]]:
        """N_s -> Δd -> R_1 from lowest to highest, as far as the budget allows."""
        deltas = range(self.deltas[0], self.deltas[1] + 1)
        found = {
            n: {delta: firsts for delta in deltas if (firsts := self._firsts(frame, delta))}
            for n, frame in self.frames.items()
        }
        return {n: room for n, room in found.items() if room}

    def _firsts(self, frame: Frame, delta: int) -> range:
        if len(frame.sizes) == 1:
            return range(max(1, self.budget.rank), self.budget.rank + 1)
        tries = range(1, frame.total_rank + 2)  # Eq. 5 fails for good from some R_1 on
        return tries[: bisect_left(tries, True, key=lambda first: frame.ranks(first, delta) is None)]

    @cached_property
    def _ladders(self) -> dict[Rung, tuple[tuple[int, ...], int]]:
        """For each rung, in order, its stage ranks and what they leave of C."""
        found = {}
        for n, room in self.rooms.items():
            frame = self.frames[n]
            for delta, firsts in room.items():
                for first in firsts:
                    ranks = (first,) if n == 1 else frame.ranks(first, delta)
                    assert ranks is not None  # by the end of the room
                    spent = sum(map(mul, frame.costs, ranks))
                    found[Rung(n, delta, first)] = ranks, self.budget.parameters - spent
        return found

    def stage_ranks(self, rung: Rung) -> tuple[int, ...]:
        """R_1 … R_t (Eq. 5 and 8)."""
        return self._ladders[rung][0]

    def slack(self, rung: Rung) -> int:
        """C less the parameters of the stage ranks alone."""
        return self._ladders[rung][1]

    @cached_property
    def component_costs(self) -> tuple[int, ...]:
        """Parameters of one rank more in all projections of a component."""
        costs = dict.fromkeys(self.graph.components, 0)
        for p in self.graph.projections:
            costs[p.component] += p.cost
        return tuple(costs.values())

    @cached_property
    def component_worth(self) -> tuple[float, ...]:
        """Measured norm per parameter of each component."""
        norms = self.profile.component_norms()
        pairs = zip(self.graph.components, self.component_costs, strict=True)
        return tuple(norms[component] / cost for component, cost in pairs)

    @cached_property
    def component_of(self) -> tuple[int, ...]:
        """The number of each projection's component."""
        at = {component: i for i, component in enumerate(self.graph.components)}
        return tuple(at[p.component] for p in self.graph.projections)

    @cached_property
    def stage_of(self) -> dict[int, tuple[int, ...]]:
        """For each N_s, the number of each projection's stage."""
        found = {}
        for n, stages in self.partitions.items():
            of_layer = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
            found[n] = tuple(of_layer[p.layer] for p in self.graph.projections)
        return found

    @cached_property
    def settings(self) -> dict[tuple[int, ...], int]:
        """The settings of Table VI within the range of offsets, as offsets of this graph's components."""
        found: dict[tuple[int, ...], int] = {}
        for setting, table in TABLE_VI.items():
            units = tuple(table.get(component, 0) for component in self.graph.components)
            if self.offsets[0] <= min(units) and max(units) <= self.offsets[1]:
                found.setdefault(units, setting)
        return found

    @cached_property
    def measured(self) -> tuple[int, ...]:
        """The offsets of the profile's rule, in units of Δd/2."""
        offsets = measured_offsets(self.profile, 2)
        return tuple(offsets[component] for component in self.graph.components)

    def levels(self, delta: int, first_rank: int) -> dict[int, int]:
        """Offset in ranks -> in units, ascending, for all that leave R_1 at rank 1 or more.

        Half of an odd Δd is rounded to the cheaper side, so two units may mean one offset: the one nearer to 0 counts.
        """
        lowest = self.offsets[0] * delta // 2
        return _levels(self.offsets, delta, max(lowest, 1 - first_rank))

    def spread(self, rung: Rung, offsets: Sequence[int]) -> tuple[int, ...]:
        """Ranks from stage ranks and offsets in ranks, one for each component."""
        ranks, stages = self.stage_ranks(rung), self.stage_of[rung.n_stages]
        return tuple([ranks[stage] + offsets[c] for stage, c in zip(stages, self.component_of, strict=True)])

    def fits(self, rung: Rung, offsets: Sequence[int]) -> bool:
        """Whether these offsets, in ranks, are plain: no rank below 1, within C as they stand."""
        spent = sum(map(mul, self.component_costs, offsets))
        return rung.first_rank + min(offsets) >= 1 and spent <= self.slack(rung)

    def refined(self, rung: Rung, rule: FineRule, setting: int) -> RankSchedule:
        """What `allocation.refine` makes of these stage ranks."""
        stages = self.partitions[rung.n_stages]
        request = AllocationRequest(
            self.graph, self.budget, self.profile, stages, delta=rung.delta, setting=setting, rule=rule
        )
        plain = self.spread(rung, (0,) * len(self.component_costs))
        return refine(request, request.schedule("coarse", plain, rung.delta))

    # Numbered choices

    @cached_property
    def rungs(self) -> tuple[Rung, ...]:
        """All of them, in order."""
        return tuple(self._ladders)

    def ways(self, rung: Rung) -> tuple[Ways, int, int]:
        """The vectors of plain offsets, the unit in which they count, and their limit in that unit."""
        offsets = tuple(self.levels(rung.delta, rung.first_rank))
        # An even Δd is half of it times a whole unit, so that all even Δd share a count.
        unit = rung.delta // 2 if rung.delta % 2 == 0 else 1
        ways = _counted(self.component_costs, tuple(offset // unit for offset in offsets))
        return ways, unit, self.slack(rung) // unit

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        """How many plain choices there are up to and with each rung."""
        if "paper" not in self.rules:
            return (0,) * len(self.rungs)
        return tuple(accumulate(self.n_plain(rung) for rung in self.rungs))

    @cached_property
    def settled_kinds(self) -> tuple[tuple[FineRule, tuple[int, ...]], ...]:
        """The rule and offsets of every choice that may have to be settled, for each rung."""
        neutral = (0,) * len(self.component_costs)
        kinds: list[tuple[FineRule, tuple[int, ...]]] = []
        if "paper" in self.rules:
            kinds += [("paper", units) for units in self.settings if units != neutral]
        if "profile" in self.rules:
            kinds.append(("profile", neutral))
        return tuple(kinds)

    @property
    def n_choices_plain(self) -> int:
        """How many of the numbered choices are plain, the first ones."""
        return self._ends[-1]

    @property
    def n_choices(self) -> int:
        """How many choices are numbered; some of them give the same ranks, or none."""
        return self.n_choices_plain + len(self.rungs) * len(self.settled_kinds)

    def numbered(self, index: int) -> Choice:
        """The choice of this number, 0 to n_choices - 1."""
        if index >= self.n_choices_plain:
            at, kind = divmod(index - self.n_choices_plain, len(self.settled_kinds))
            return Choice(*self.rungs[at], *self.settled_kinds[kind])
        at = bisect_left(self._ends, index + 1)
        return self.plain(self.rungs[at], index - (self._ends[at - 1] if at else 0))

    def n_plain(self, rung: Rung) -> int:
        """How many plain choices a rung has."""
        ways, _, limit = self.ways(rung)
        return ways.count(limit)

    def plain(self, rung: Rung, index: int) -> Choice:
        """The plain choice of this number, 0 to n_plain - 1, of a rung."""
        ways, unit, limit = self.ways(rung)
        units = self.levels(rung.delta, rung.first_rank)
        return Choice(*rung, "paper", tuple(units[unit * option] for option in ways.pick(index, limit)))

    def plain_choices(self, rung: Rung) -> Iterator[Choice]:
        """All plain choices of a rung."""
        ways, unit, limit = self.ways(rung)
        units = self.levels(rung.delta, rung.first_rank)
        for options in ways.walk(limit) if "paper" in self.rules else ():
            yield Choice(*rung, "paper", tuple(units[unit * option] for option in options))


@lru_cache(maxsize=1024)
def _levels(units: Span, delta: int, lowest: int) -> dict[int, int]:
    found: dict[int, int] = {}
    for unit in sorted(range(units[0], units[1] + 1), key=abs):
        found.setdefault(unit * delta // 2, unit)
    return {offset: found[offset] for offset in sorted(found) if offset >= lowest}


@lru_cache(maxsize=1024)
def _counted(costs: tuple[int, ...], options: tuple[int, ...]) -> Ways:
    return Ways(costs, options)  # keeps its tables, and most rungs share them


def ranks_of(space: StagedSpace, choice: Choice) -> tuple[int, ...] | None:
    """The ranks that follow, or None when the choice is outside of the space."""
    rung = choice.rung
    if choice.rule == "profile":
        return space.refined(rung, "profile", 1).ranks
    offsets = [units * choice.delta // 2 for units in choice.offsets]
    if space.fits(rung, offsets):
        return space.spread(rung, offsets)
    setting = space.settings.get(choice.offsets)
    return None if setting is None else space.refined(rung, "paper", setting).ranks


def fitted(space: StagedSpace, choice: Choice) -> Choice:
    """The choice itself where it is inside of the space, else one inside near to it; any integers will do.

    N_s goes to the nearest that the budget allows, Δd and R_1 into their ranges for it. Offsets that leave R_1 below
    rank 1 are raised, then the highest offsets are lowered until the ranks fit, of equal ones the one of least norm per
    parameter first.
    """
    n = min(space.rooms, key=lambda n: (abs(n - choice.n_stages), n))
    delta = min(space.rooms[n], key=lambda d: (abs(d - choice.delta), d))
    firsts = space.rooms[n][delta]
    rung = Rung(n, delta, min(max(choice.first_rank, firsts[0]), firsts[-1]))
    neutral = (0,) * len(space.component_costs)
    if choice.rule not in space.rules:
        choice = choice._replace(rule=space.rules[0])
    if choice.rule == "profile":
        return Choice(*rung, "profile", neutral)
    low, high = space.offsets
    asked = tuple(min(max(units, low), high) for units in choice.offsets)
    if asked in space.settings:
        return Choice(*rung, "paper", asked)
    return Choice(*rung, "paper", _lowered(space, rung, asked))


def _lowered(space: StagedSpace, rung: Rung, asked: Sequence[int]) -> tuple[int, ...]:
    levels = space.levels(rung.delta, rung.first_rank)
    ladder = list(levels)
    offsets = [max(units * rung.delta // 2, ladder[0]) for units in asked]
    slack = space.slack(rung)
    spent = sum(map(mul, space.component_costs, offsets))
    while spent > slack:  # ends at the latest when no offset is above 0
        c = max(range(len(offsets)), key=lambda c: (offsets[c], -space.component_worth[c], -c))
        lower = ladder[bisect_left(ladder, offsets[c]) - 1]
        spent -= space.component_costs[c] * (offsets[c] - lower)
        offsets[c] = lower
    return tuple(levels[offset] for offset in offsets)

"""Whether a schedule is in a solution space, by which choice, and how far two schedules are apart."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from hydra_vlm.errors import GraphMismatchError
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.search.space import Candidate, Space, Tuned, open_candidate, staged_candidate
from hydra_vlm.search.staged import Choice, Rung, StagedSpace, ranks_of


def adopt(space: Space, schedule: RankSchedule, learning_rate: float | None = None) -> Candidate | None:
    """The candidate that a schedule from elsewhere is in this space, or None when it is not in it.

    Ranks and scaling count; the name, the budget it was made for and (beyond a hint where to look) its stages do not.
    A tuned learning rate that is not given is the middle of its range.
    """
    if schedule.graph.difference(space.graph) is not None or schedule.parameters > space.budget.parameters:
        return None
    tuned = None
    if space.tuned is not None:
        tuned = (learning_rate or space.tuned.middle[0], space.scale_of(schedule.scaling))
        inside = map(_within, tuned, (space.tuned.learning_rate, space.tuned.scale))
        if replace(schedule.scaling, value=space.scaling.value) != space.scaling or not all(inside):
            return None
    elif schedule.scaling != space.scaling:
        return None
    found = _adopt_open(space, schedule, tuned) if space.open else _adopt_staged(space, schedule, tuned)
    # The scale may have lost its last digit on the way; the schedule's own counts.
    return None if found is None else replace(found, schedule=replace(found.schedule, scaling=schedule.scaling))


def _adopt_open(space: Space, schedule: RankSchedule, tuned: Tuned | None) -> Candidate | None:
    left = space.budget.parameters - schedule.parameters
    return open_candidate(space, schedule.ranks, tuned) if left < min(space.graph.costs) else None


def _adopt_staged(space: Space, schedule: RankSchedule, tuned: Tuned | None) -> Candidate | None:
    choice = locate(space, schedule)
    return None if choice is None else staged_candidate(space, choice, tuned)


def _within(value: float, span: tuple[float, float]) -> bool:
    return span[0] * (1 - 1e-9) <= value <= span[1] * (1 + 1e-9)


def locate(space: Space, schedule: RankSchedule) -> Choice | None:
    """The choice in the closed space that gives a schedule's ranks, or None."""
    if min(schedule.ranks) < 1:
        return None
    near = None if schedule.stages is None or schedule.delta is None else (len(schedule.stages), schedule.delta)
    plain = find_plain(space.staged, schedule.ranks)
    return plain or find_settled(space.staged, schedule.ranks, near)


def contains(space: Space, schedule: RankSchedule) -> bool:
    """Whether a schedule's ranks and scaling are in this space, wherever the schedule came from."""
    return adopt(space, schedule) is not None


def distance(one: RankSchedule, other: RankSchedule) -> float:
    """The share of the budget that two schedules spend differently: 0 for equal ranks, at most 1.

    Half the sum of cost x difference in rank over all projections, relative to the larger budget. Scaling does not
    count. Raises GraphMismatchError for schedules of two models.
    """
    difference = one.graph.difference(other.graph)
    if difference is not None:
        raise GraphMismatchError(
            f"schedules {one.name!r} and {other.name!r} are of two models: {difference}. Compare schedules of one."
        )
    moved = sum(abs(a - b) * cost for a, b, cost in zip(one.ranks, other.ranks, one.graph.costs, strict=True))
    return moved / (2 * max(one.budget, other.budget))


# From ranks back to a choice of the closed space


def find_plain(staged: StagedSpace, ranks: Sequence[int]) -> Choice | None:
    """The first plain choice that gives these ranks, which keep the budget; None when there is none."""
    low, high = staged.offsets
    for n, room in staged.rooms.items() if "paper" in staged.rules else ():
        table = _constant(staged, n, ranks)
        if table is None:
            continue
        highest, lowest = max(table[0].values()), min(table[0].values())
        for delta, firsts in room.items():
            first = max(firsts[0], highest - high * delta // 2)
            last = min(firsts[-1], lowest - low * delta // 2)
            for rung in (Rung(n, delta, r) for r in range(first, last + 1)):
                offsets = _distances(staged, rung, table)
                levels = staged.levels(delta, rung.first_rank)
                if offsets is not None and all(offset in levels for offset in offsets):
                    return Choice(*rung, "paper", tuple(levels[offset] for offset in offsets))
    return None


def _constant(staged: StagedSpace, n_stages: int, ranks: Sequence[int]) -> list[dict[int, int]] | None:
    """For each stage, component -> its rank; None where that is not one rank."""
    found: list[dict[int, int]] = [{} for _ in range(n_stages)]
    for stage, c, rank in zip(staged.stage_of[n_stages], staged.component_of, ranks, strict=True):
        if found[stage].setdefault(c, rank) != rank:
            return None
    return found


def _distances(staged: StagedSpace, rung: Rung, table: Sequence[dict[int, int]]) -> list[int] | None:
    """Each component's distance from the stage ranks, when it is the same in all stages."""
    offsets: dict[int, int] = {}
    for rank, stage in zip(staged.stage_ranks(rung), table, strict=True):
        for c, own in stage.items():
            if offsets.setdefault(c, own - rank) != own - rank:
                return None
    return [offsets[c] for c in range(len(staged.component_costs))]


def find_settled(staged: StagedSpace, ranks: tuple[int, ...], near: tuple[int, int] | None = None) -> Choice | None:
    """The first settled choice that gives these ranks; `near`, an N_s and Δd, is looked at first."""
    rooms = [(n, delta) for n, room in staged.rooms.items() for delta in room]
    for n, delta in sorted(rooms, key=lambda room: room != near):
        blocks = _blocks(staged, n, ranks)
        if not _ascends(blocks, delta):
            continue
        for rung in (Rung(n, delta, first) for first in staged.rooms[n][delta]):
            for rule, units in staged.settled_kinds:
                choice = Choice(*rung, rule, units)
                if _may_settle(staged, choice, blocks) and ranks_of(staged, choice) == ranks:
                    return choice
    return None


class _Block(NamedTuple):
    """The lowest and highest rank of a component in a stage."""

    low: int
    high: int


def _blocks(staged: StagedSpace, n_stages: int, ranks: Sequence[int]) -> list[dict[int, _Block]]:
    """For each stage, component -> its ranks."""
    found: list[dict[int, _Block]] = [{} for _ in range(n_stages)]
    for stage, c, rank in zip(staged.stage_of[n_stages], staged.component_of, ranks, strict=True):
        block = found[stage].get(c)
        if block is None:
            found[stage][c] = _Block(rank, rank)
        elif not block.low <= rank <= block.high:
            found[stage][c] = _Block(min(block.low, rank), max(block.high, rank))
    return found


def _ascends(blocks: Sequence[dict[int, _Block]], delta: int) -> bool:
    """Whether every component's ranks rise by at least Δd from each stage to the next that has it (Eq. 5)."""
    for c in {c for stage in blocks for c in stage}:
        column = [stage[c] for stage in blocks if c in stage]
        if any(lower.high + delta > upper.low for lower, upper in pairwise(column)):
            return False
    return True


def _may_settle(staged: StagedSpace, choice: Choice, blocks: Sequence[dict[int, _Block]]) -> bool:
    """A quick necessary condition: giving back only lowers ranks, and filling alone only raises them."""
    rung = choice.rung
    units = staged.measured if choice.rule == "profile" else choice.offsets
    offsets = [max(unit * rung.delta // 2, 1 - rung.first_rank) for unit in units]
    fits = staged.fits(rung, offsets)
    for rank, stage in zip(staged.stage_ranks(rung), blocks, strict=True):
        for c, block in stage.items():
            below, above = block.low < rank + offsets[c], block.high > rank + offsets[c]
            if (fits and below) or (above and choice.rule == "paper"):
                return False
    return True

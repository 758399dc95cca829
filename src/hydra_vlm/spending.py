"""Spending a budget exactly: ranks are taken away or added one unit at a time, by what a unit is worth.

Shared by all allocators; `Ascent` keeps the stages in order while ranks move (Eq. 5).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise

from hydra_vlm.errors import BudgetError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.schedule import Stages

NEXT_TO_NOTHING = 1e-9
"""A weight below this share of the largest counts as this share."""

Worth = Callable[[int, int], float]
"""worth(position, r): what the r-th unit of rank is worth at a projection; must not rise with r."""


@dataclass(frozen=True)
class Ascent:
    """Stages ascend by at least `delta` for each component.

    `below` and `above` hold, for each projection, the positions of the same component in the next lower and
    next higher stage that has it.
    """

    below: tuple[tuple[int, ...], ...]
    above: tuple[tuple[int, ...], ...]
    delta: int

    @classmethod
    def of(cls, graph: ComputationGraph, stages: Stages, delta: int) -> "Ascent":
        """The order that these stages demand."""
        below: list[tuple[int, ...]] = [()] * len(graph.projections)
        above = list(below)
        stage_of = {layer: stage for stage, layers in enumerate(stages) for layer in layers}
        for component in graph.components:
            groups: dict[int, list[int]] = {}
            for position, p in enumerate(graph.projections):
                if p.component == component:
                    groups.setdefault(stage_of[p.layer], []).append(position)
            ordered = [tuple(groups[stage]) for stage in sorted(groups)]
            for lower, upper in pairwise(ordered):
                for position in lower:
                    above[position] = upper
                for position in upper:
                    below[position] = lower
        return cls(tuple(below), tuple(above), delta)

    def may_lower(self, ranks: Sequence[int], position: int) -> bool:
        """Whether one unit less keeps the order."""
        return all(ranks[position] - 1 >= ranks[other] + self.delta for other in self.below[position])

    def may_raise(self, ranks: Sequence[int], position: int) -> bool:
        """Whether one unit more keeps the order."""
        return all(ranks[position] + 1 <= ranks[other] - self.delta for other in self.above[position])


def repair(
    ranks: Sequence[int], graph: ComputationGraph, budget: int, worth: Worth, order: Ascent | None = None
) -> tuple[int, ...]:
    """Takes away the unit of rank that is worth least, again and again, until g(G, Z) <= budget.

    No rank falls below 1. Of equal worth, the lower rank and then the shallower layer gives first. With
    `order`, units that Δd needs are spared. Raises BudgetError when rank 1 everywhere, or the order, needs
    more than the budget.
    """
    result = list(ranks)
    spent = graph.parameters(result)
    heap = [(worth(i, rank), rank, i) for i, rank in enumerate(result)]
    heapify(heap)
    spared: set[int] = set()
    while spent > budget:
        if not heap:
            raise BudgetError(
                f"ranks cannot be lowered to {budget:,} parameters: {spent:,} remain.",
                nearest=f"A budget of {spent:,} parameters works.",
                budget=spent,
            )
        i = heappop(heap)[-1]
        if result[i] <= 1:
            continue
        if order is not None and not order.may_lower(result, i):
            spared.add(i)
            continue
        result[i] -= 1
        spent -= graph.costs[i]
        again = {i} if order is None else {i} | spared.intersection(order.above[i])
        spared -= again
        for j in again:
            heappush(heap, (worth(j, result[j]), result[j], j))
    return tuple(result)


def fill(
    ranks: Sequence[int],
    graph: ComputationGraph,
    budget: int,
    worth: Worth,
    order: Ascent | None = None,
    most: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Adds the affordable unit of rank that is worth most, again and again until none is affordable.

    Of equal worth, the higher rank and then the shallower layer gets first. Less than the cheapest increment
    (with `order`: the cheapest that keeps it) is then unspent. With `most`, no rank exceeds its own there.
    """
    result = list(ranks)
    left = budget - graph.parameters(result)
    heap = [(-worth(i, rank + 1), -rank, i) for i, rank in enumerate(result)]
    heapify(heap)
    blocked: set[int] = set()
    while heap:
        i = heappop(heap)[-1]
        if graph.costs[i] > left or (most is not None and result[i] >= most[i]):  # and stays so
            continue
        if order is not None and not order.may_raise(result, i):
            blocked.add(i)
            continue
        result[i] += 1
        left -= graph.costs[i]
        again = {i} if order is None else {i} | blocked.intersection(order.below[i])
        blocked -= again
        for j in again:
            heappush(heap, (-worth(j, result[j] + 1), -result[j], j))
    return tuple(result)


def in_proportion(weights: Sequence[float], graph: ComputationGraph, budget: int) -> list[float]:
    """Real-valued ranks in proportion to the weights that spend the budget, each at least 1 and at most a full rank.

    Where a bound holds one back, the others share what it leaves (or takes), still in proportion to each other.
    """
    most = [min(p.in_features, p.out_features) for p in graph.projections]
    shares = [max(weight / max(weights), NEXT_TO_NOTHING) for weight in weights]

    def ranks(factor: float) -> list[float]:
        return [min(max(1.0, factor * share), full) for share, full in zip(shares, most, strict=True)]

    low, high = 0.0, max(most) / NEXT_TO_NOTHING
    for _ in range(100):  # each halves what lies between them
        middle = (low + high) / 2
        cost = sum(rank * each for rank, each in zip(ranks(middle), graph.costs, strict=True))
        low, high = (middle, high) if cost <= budget else (low, middle)
    return ranks(low)

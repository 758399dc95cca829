"""Ranks that move: training starts wider than the budget and ends inside it. When, and what came of it. No torch.

A run has a few points, none in its last third, at which every projection gets a new rank under the budget that holds
from there on. The last of these budgets is C.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hydra_vlm.allocation import Budget
from hydra_vlm.config import TrainingConfig
from hydra_vlm.graph import ComputationGraph, at_least, finite, nan_for_none, none_for_nan, whole
from hydra_vlm.schedule import RankSchedule, Scaling

SQUEEZE = (0.5,)
"""Share of the steps after which `squeeze` decides."""

DYNAMIC = (0.3, 0.45, 0.6)
"""Those of `dynamic`."""


@dataclass(frozen=True)
class Point:
    """After optimizer step `step`, `budget` holds."""

    step: int
    budget: Budget


@dataclass(frozen=True)
class Plan:
    """The schedule that a training starts with, and the points at which its ranks move."""

    wide: RankSchedule
    points: tuple[Point, ...]


def plan_of(graph: ComputationGraph, budget: Budget, scaling: Scaling, settings: TrainingConfig, steps: int) -> Plan:
    """What `training.ranks`, `training.width` ask for in a run of so many steps.

    From point to point the budget falls by the same factor. In a run that is too short for all points some fall
    together, and the last counts.
    """
    wide = wide_schedule(graph, budget, scaling, settings.width)
    shares = {"fixed": (), "squeeze": SQUEEZE, "dynamic": DYNAMIC}[settings.ranks]
    found: dict[int, Point] = {}
    for number, share in enumerate(shares, start=1):
        step = max(1, math.floor(share * steps))
        parameters = round(wide.parameters * (budget.parameters / wide.parameters) ** (number / len(shares)))
        found[step] = Point(step, Budget.of_parameters(graph, parameters) if number < len(shares) else budget)
    return Plan(wide, tuple(found.values()))


def wide_schedule(graph: ComputationGraph, budget: Budget, scaling: Scaling, width: float) -> RankSchedule:
    """Uniform at `width` times the budget's uniform rank, no rank above half of its module's smaller side.

    It is never below the budget's own rank.
    """
    asked = max(budget.rank, round(width * budget.rank))
    halves = (min(p.in_features, p.out_features) // 2 for p in graph.projections)
    ranks = tuple(max(budget.rank, min(asked, half)) for half in halves)
    own = scaling.under(graph, budget.parameters)  # whatever the ranks at first, steps are those of the budget
    return RankSchedule("wide", graph, ranks, max(budget.parameters, graph.parameters(ranks)), scaling=own)


@dataclass(frozen=True)
class Move:
    """One decision: ranks before and after `step`, who decided, the validation loss on both sides.

    `spectra` are the singular values of each projection's update in the metric of its inputs, on which was decided, to
    four digits.
    `probed` are ranks and losses of the schedules that were tried by forward passes. Losses are nan without validation
    data. `seconds` and `passes` (records that went forward) are what it took.
    """

    step: int
    decider: str
    before: tuple[int, ...]
    after: RankSchedule
    loss_before: float
    loss_after: float
    spectra: tuple[tuple[float, ...], ...]
    probed: tuple[tuple[tuple[int, ...], float], ...] = ()
    passes: int = 0
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for the terminal."""
        low, high = min(self.after.ranks), max(self.after.ranks)
        losses = f": validation loss {self.loss_before:.4f} -> {self.loss_after:.4f}"
        return (
            f"step {self.step}: {self.decider} moves ranks to {low}-{high}, {self.after.parameters:,} parameters"
            f"{losses if math.isfinite(self.loss_before) else ''}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "decider": self.decider,
            "before": list(self.before),
            "after": self.after.to_json(),
            "loss_before": none_for_nan(self.loss_before),
            "loss_after": none_for_nan(self.loss_after),
            "spectra": [list(found) for found in self.spectra],
            "probed": [[list(ranks), none_for_nan(loss)] for ranks, loss in self.probed],
            "passes": self.passes,
            "seconds": self.seconds,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Move":
        return cls(
            step=at_least(1, whole(data["step"])),
            decider=str(data["decider"]),
            before=tuple(at_least(0, whole(rank)) for rank in data["before"]),
            after=RankSchedule.from_json(data["after"]),
            loss_before=nan_for_none(data["loss_before"]),
            loss_after=nan_for_none(data["loss_after"]),
            spectra=tuple(tuple(at_least(0, finite(value)) for value in found) for found in data["spectra"]),
            probed=tuple((tuple(map(whole, ranks)), nan_for_none(loss)) for ranks, loss in data["probed"]),
            passes=at_least(0, whole(data["passes"])),
            seconds=at_least(0, finite(data["seconds"])),
        )

"""One schedule of the table: its ranks, where it came from, and its choice in the solution space. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from hydra_vlm.allocation import Budget
from hydra_vlm.errors import DataError
from hydra_vlm.graph import ComputationGraph, whole
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import REFERENCE_SCALING, RankSchedule
from hydra_vlm.search.space import Candidate, Space, Value

SpaceName = Literal["closed", "open"]

SCALING = REFERENCE_SCALING
"""What the table's trials were trained with."""


def closed_space(graph: ComputationGraph, budget: Budget, profile: GradientNormProfile) -> Space:
    """The paper's space, with Δd up to R_standard: at small budgets its default range holds little contrast."""
    return Space(graph, budget, profile, deltas=(1, max(2, budget.rank)), scaling=SCALING)


def open_space(graph: ComputationGraph, budget: Budget, profile: GradientNormProfile) -> Space:
    """A rank for every projection, 0 meaning not adapted."""
    return Space(graph, budget, profile, open=True, scaling=SCALING)


@dataclass(frozen=True)
class Entry:
    """A schedule: `id` ("z000"), `origin` (uniform, coarse, fine, rival, closed, open), `name` in words, `ranks`.

    `ranks` are in the order of the graph's projections; `choices` are those of the candidate in `space`, which is
    "closed" where the closed space holds the schedule and "open" elsewhere. Sampled schedules say how in their name.
    """

    id: str
    origin: str
    name: str
    space: SpaceName
    ranks: tuple[int, ...]
    choices: tuple[tuple[str, Value], ...]

    def schedule(self, graph: ComputationGraph, budget: Budget) -> RankSchedule:
        """The schedule under the table's budget, named by the id."""
        return RankSchedule(self.id, graph, self.ranks, budget.parameters, scaling=SCALING)

    def candidate(self, graph: ComputationGraph, budget: Budget) -> Candidate:
        """The candidate as samplers know it."""
        return Candidate(self.choices, self.schedule(graph, budget))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; the choices of an open entry are its ranks and are left out."""
        found: dict[str, Any] = {"id": self.id, "origin": self.origin, "name": self.name, "space": self.space}
        found["ranks"] = list(self.ranks)
        if self.space == "closed":
            found["choices"] = dict(self.choices)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any], graph: ComputationGraph) -> "Entry":
        """The inverse of `to_json`, for schedules of this graph; raises DataError on anything else."""
        try:
            space = data["space"]
            ranks = tuple(whole(rank) for rank in data["ranks"])
            if space not in ("closed", "open") or len(ranks) != len(graph.projections):
                raise ValueError(f"space {space!r} with {len(ranks)} ranks for {len(graph.projections)} projections")
            pairs = zip(graph.projections, ranks, strict=True)
            by_name = data["choices"] if space == "closed" else {rank_name(p): rank for p, rank in pairs}
            choices = tuple((str(name), value) for name, value in by_name.items())
            return cls(str(data["id"]), str(data["origin"]), str(data["name"]), cast(SpaceName, space), ranks, choices)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"not an entry of RankBench: {type(error).__name__} {error}.") from error


def rank_name(projection: Any) -> str:
    """The name of a projection's rank among the choices of the open space."""
    return f"rank.{projection.layer + 1}.{projection.component}"

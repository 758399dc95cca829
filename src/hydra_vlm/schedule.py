"""The rank schedule Z: a rank for every projection, the stages it came from, its budget and its scaling rule.

Stages are sets of 0-based layers, lowest gradient norm first. In text they are 1-based: "1-8,9-12,13-24";
a stage that is not contiguous in depth joins its parts with "+": "1-3+7,4-6".

Symbols of the paper: Z rank schedule, g(G, Z) its parameters, C the budget, S_i stage i, R_i its rank,
Δd the least distance of neighbouring stages' ranks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.graph import DECODER, ComputationGraph, finite, whole

Stages = tuple[tuple[int, ...], ...]
ScalingRule = Literal["balanced", "constant", "fixed", "rslora"]


def check_stages(stages: Stages, n_layers: int) -> None:
    """Raises StageError unless every layer 0 … n_layers-1 is in exactly one stage and no stage is empty."""
    if not stages or not all(stages):
        raise StageError("a partition needs at least one stage, and every stage at least one layer.")
    layers = [layer for stage in stages for layer in stage]
    outside = [layer for layer in layers if not 0 <= layer < n_layers]
    if outside:
        raise StageError(f"layer {outside[0] + 1} does not exist: the model has layers 1-{n_layers}.")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise StageError(f"layer {twice[0] + 1} is in more than one stage: each layer belongs to exactly one.")
    missing = sorted(set(range(n_layers)) - set(layers))
    if missing:
        raise StageError(f"layer {missing[0] + 1} is in no stage: add it to one of the {len(stages)}.")


def parse_stages(text: str, n_layers: int) -> Stages:
    """Stages from 1-based text such as "1-8,9-12,13-24" or "1-3+7,4-6"; raises StageError."""
    stages: list[tuple[int, ...]] = []
    for stage in text.split(","):
        layers: list[int] = []
        for part in stage.split("+"):
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
            if match is None:
                raise StageError(
                    f"stage {stage!r} of {text!r} does not parse: write ranges like '1-8,9-12' or '1-3+7'."
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if not 1 <= first <= last <= n_layers:
                raise StageError(f"range {part.strip()!r} of {text!r} does not lie within layers 1-{n_layers}.")
            layers.extend(range(first - 1, last))
        stages.append(tuple(sorted(layers)))
    check_stages(tuple(stages), n_layers)
    return tuple(stages)


def format_stages(stages: Stages) -> str:
    """The inverse of `parse_stages`: 1-based text."""
    return ",".join("+".join(_ranges(stage)) for stage in stages)


def _ranges(layers: Sequence[int]) -> list[str]:
    runs = (
        [layer for _, layer in run] for _, run in groupby(enumerate(sorted(layers)), key=lambda pair: pair[1] - pair[0])
    )
    return [f"{run[0] + 1}-{run[-1] + 1}" if len(run) > 1 else f"{run[0] + 1}" for run in runs]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column flush right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


@dataclass(frozen=True)
class Scaling:
    """What LoRA's update is multiplied with, by rank.

    A module's step grows with scale · sqrt(rank). balanced: value · sqrt(standard_rank / rank), so that every module
    steps as far as in uniform LoRA of `standard_rank` (r_0), whose scale is exactly `value` (s_0). r_0 follows from a
    budget: without it the rule is a wish, which `under` a budget becomes a scaling. constant: `value` at every rank; 2
    is the reference recipe's alpha 256 at rank 128. fixed: value / rank, `value` being a fixed lora_alpha. rslora:
    value / sqrt(rank), rank-stabilised.

    Raises ConfigError for another rule, a value that is not positive, an r_0 below 1 or with another rule.
    """

    rule: ScalingRule = "constant"
    value: float = 2.0
    standard_rank: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in get_args(ScalingRule):
            raise ConfigError(f"scaling rule {self.rule!r} is unknown: use one of {', '.join(get_args(ScalingRule))}.")
        if not (math.isfinite(self.value) and self.value > 0):
            raise ConfigError(f"scaling value must be a positive number, got {self.value}.")
        if self.standard_rank is not None and self.rule != "balanced":
            raise ConfigError(f"scaling rule {self.rule!r} has no standard rank: leave out {self.standard_rank}.")
        if self.standard_rank is not None and self.standard_rank < 1:
            raise ConfigError(f"scaling's standard rank must be 1 or more, got {self.standard_rank}.")

    def under(self, graph: ComputationGraph, budget: int) -> "Scaling":
        """This scaling with its r_0: the rank of uniform LoRA under `budget` parameters, 1 where that is below 1.

        As it is where it has an r_0 or its rule needs none.
        """
        if self.rule != "balanced" or self.standard_rank is not None:
            return self
        return replace(self, standard_rank=uniform_rank(graph, budget))

    def scale(self, rank: int) -> float:
        """The factor on B·A at this rank (>= 1)."""
        match self.rule:
            case "balanced":
                if self.standard_rank is None:
                    raise ConfigError("scaling rule 'balanced' needs the budget's uniform rank: take it `under` one.")
                return self.value * math.sqrt(self.standard_rank / rank)
            case "constant":
                return self.value
            case "fixed":
                return self.value / rank
            case "rslora":
                return self.value / math.sqrt(rank)

    def alpha(self, rank: int) -> float:
        """lora_alpha that gives `scale` in PEFT's plain form alpha / r, with use_rslora off for all rules."""
        return self.value if self.rule == "fixed" else self.scale(rank) * rank

    def stabilised(self) -> "Scaling":
        """The same scales by rule rslora where that gives them: one alpha for all ranks; else as it is."""
        if self.rule != "balanced":
            return self
        return Scaling("rslora", self.scale(1))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; `standard_rank` where there is one."""
        said = {} if self.standard_rank is None else {"standard_rank": self.standard_rank}
        return {"rule": self.rule, "value": self.value, **said}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Scaling":
        """The inverse of `to_json`; raises KeyError, TypeError or ValueError on anything else."""
        rank = data.get("standard_rank")
        return cls(data["rule"], finite(data["value"]), None if rank is None else whole(rank))

    def __str__(self) -> str:
        at = "" if self.standard_rank is None else f" at rank {self.standard_rank}"
        return f"{self.rule} {self.value:g}{at}"


def uniform_rank(graph: ComputationGraph, budget: int) -> int:
    """The largest rank of uniform LoRA under `budget` parameters, 1 where they do not pay it."""
    return max(1, budget // graph.cost)


REFERENCE_SCALING = Scaling("constant", 2.0)
"""alpha / r = 2 at every rank, the reference recipe's."""

DEFAULT_SCALING = Scaling("balanced", 2.0)
"""The reference recipe's scale for uniform LoRA; at other ranks, the scale with which modules step as far."""


@dataclass(frozen=True, repr=False)
class RankSchedule:
    """Z: a rank for each projection of a graph, and the `budget` in parameters (C) it is to keep.

    `ranks` is aligned with `graph.projections`; 0 means that the projection is not adapted.
    `stages` and `delta` (the Δd in force) tell where the ranks came from, where they came from stages.
    A schedule over its budget may exist (Config2 and Config3 of the paper's Table V do) and says so in
    `over_budget`; allocators never return one. A `scaling` that needs an r_0 and has none gets that of the budget.

    Raises ConfigError when ranks do not fit the graph or are negative or the budget is not positive,
    StageError when stages do not.
    """

    name: str
    graph: ComputationGraph
    ranks: tuple[int, ...]
    budget: int
    stages: Stages | None = None
    delta: int | None = None
    scaling: Scaling = DEFAULT_SCALING

    def __post_init__(self) -> None:
        if len(self.ranks) != len(self.graph.projections):
            raise ConfigError(
                f"schedule {self.name!r} has {len(self.ranks)} ranks, but graph {self.graph.name!r} has "
                f"{len(self.graph.projections)} projections: one rank each is needed."
            )
        if self.budget < 1:
            raise ConfigError(f"schedule {self.name!r} has a budget of {self.budget} parameters: it must be positive.")
        for rank, p in zip(self.ranks, self.graph.projections, strict=True):
            if rank < 0:
                raise ConfigError(
                    f"schedule {self.name!r}, layer {p.layer + 1}, {p.component}: rank {rank} is below 0."
                )
        if self.stages is not None:
            check_stages(self.stages, self.graph.n_layers)
        object.__setattr__(self, "scaling", self.scaling.under(self.graph, self.budget))  # the field is frozen

    @cached_property
    def parameters(self) -> int:
        """g(G, Z): trainable LoRA parameters."""
        return self.graph.parameters(self.ranks)

    @property
    def over_budget(self) -> bool:
        """Whether g(G, Z) > C."""
        return self.parameters > self.budget

    @property
    def unspent(self) -> int:
        """C - g(G, Z), in parameters; negative when over budget."""
        return self.budget - self.parameters

    def check(self) -> None:
        """Raises BudgetError when over budget (Eq. 4)."""
        if self.over_budget:
            raise BudgetError(
                f"schedule {self.name!r} has {self.parameters:,} parameters, {-self.unspent:,} more than its "
                f"budget of {self.budget:,}.",
                nearest=f"A budget of {self.parameters:,} parameters allows it.",
                budget=self.parameters,
            )

    def rank(self, layer: int, component: str) -> int:
        """Rank of a component in a layer (0-based); KeyError when the layer has no such component."""
        return self.ranks[self.graph.index(layer, component)]

    def by_layer(self) -> list[dict[str, int]]:
        """Component -> rank, for each layer."""
        layers: list[dict[str, int]] = [{} for _ in range(self.graph.n_layers)]
        for rank, p in zip(self.ranks, self.graph.projections, strict=True):
            layers[p.layer][p.component] = rank
        return layers

    def steps(self) -> dict[int, tuple[float, float]]:
        """Rank -> scale and step size, for the ranks that occur, ascending; 0 is left out.

        The step size is scale · sqrt(rank), relative to that of uniform LoRA under the same budget and scaling.
        """
        scale, standard = self.scaling.scale, uniform_rank(self.graph, self.budget)
        whole_step = scale(standard) * math.sqrt(standard)
        ranks = sorted(set(self.ranks) - {0})
        return {rank: (scale(rank), scale(rank) * math.sqrt(rank) / whole_step) for rank in ranks}

    def table(self) -> str:
        """Plain text: a line for each run of layers with equal ranks, the scale and step size of each rank, the use of
        the budget, what is not adapted."""
        components = self.graph.components
        rows = [["layers", *components, "parameters"]]
        for ranks, run in groupby(enumerate(self.by_layer()), key=lambda pair: pair[1]):
            layers = [layer for layer, _ in run]
            parameters = sum(ranks[p.component] * p.cost for layer in layers for p in self.graph.layer(layer))
            cells = (str(ranks.get(component, "-")) for component in components)
            part, first = self.graph.place(layers[0])
            within = _ranges([first + layer - layers[0] for layer in layers])[0]
            rows.append([within if part == DECODER else f"{part} {within}", *cells, f"{parameters:,}"])
        steps = [[str(rank), f"{scale:.4g}", f"{step:.2f}"] for rank, (scale, step) in self.steps().items()]
        meaning = f"scaling {self.scaling}; step: scale · √rank, relative to uniform LoRA's"
        by_rank = [*_aligned([["rank", "scale", "step"], *steps]), meaning]
        return "\n".join([*_aligned(rows), *by_rank, self.usage(), *self.graph.notes])

    def usage(self) -> str:
        """One line: parameters used, of how many, and what is left or too much."""
        rest = f"{-self.unspent:,} OVER BUDGET" if self.over_budget else f"{self.unspent:,} unspent"
        return (
            f"{self.name}: {self.parameters:,} of {self.budget:,} parameters "
            f"({self.parameters / self.budget:.2%}), {rest}"
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; `ranks` is a list over layers of component -> rank, `stages` is text."""
        return {
            "name": self.name,
            "graph": self.graph.to_json(),
            "ranks": self.by_layer(),
            "parameters": self.parameters,
            "budget": self.budget,
            "stages": None if self.stages is None else format_stages(self.stages),
            "delta": self.delta,
            "scaling": self.scaling.to_json(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "RankSchedule":
        """The inverse of `to_json`; raises ConfigError on anything else, also if ranks and parameters
        disagree."""
        try:
            graph = ComputationGraph.from_json(data["graph"])
            stages = data["stages"]
            schedule = cls(
                name=str(data["name"]),
                graph=graph,
                ranks=tuple(whole(data["ranks"][p.layer][p.component]) for p in graph.projections),
                budget=whole(data["budget"]),
                stages=None if stages is None else parse_stages(stages, graph.n_layers),
                delta=None if data["delta"] is None else whole(data["delta"]),
                scaling=Scaling.from_json(data["scaling"]),
            )
            claimed = whole(data["parameters"])
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"not a rank schedule: {type(error).__name__} {error}.") from error
        if schedule.parameters != claimed:
            raise ConfigError(
                f"schedule {schedule.name!r} claims {claimed:,} parameters, but its ranks have "
                f"{schedule.parameters:,}: it was edited or damaged; make it anew."
            )
        return schedule

    def __repr__(self) -> str:
        stages = "" if self.stages is None else f", stages {format_stages(self.stages)}, delta {self.delta}"
        low, high = min(self.ranks), max(self.ranks)
        return f"RankSchedule({self.usage()}, ranks {low}-{high} on {self.graph.name!r}{stages})"


def hand_schedule(
    graph: ComputationGraph,
    stages: Stages,
    stage_ranks: Sequence[int],
    budget: int,
    name: str,
    scaling: Scaling = DEFAULT_SCALING,
) -> RankSchedule:
    """A schedule written by hand: one rank (0 allowed) for all projections of each stage, as in Table V.

    Nothing is repaired: it may exceed `budget` (parameters) and says so. Raises StageError when stages and
    ranks do not match.
    """
    check_stages(stages, graph.n_layers)
    if len(stages) != len(stage_ranks):
        raise StageError(f"schedule {name!r}: {len(stages)} stages need as many ranks, got {len(stage_ranks)}.")
    of_layer = {layer: rank for stage, rank in zip(stages, stage_ranks, strict=True) for layer in stage}
    ranks = tuple(of_layer[p.layer] for p in graph.projections)
    return RankSchedule(name, graph, ranks, budget, stages, scaling=scaling)

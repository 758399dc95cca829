"""The gradient-norm profile of a short LoRA run (Eq. 1, Fig. 3, Table I), and the stages made from it.

The L2 norm of the gradient of every LoRA tensor (A and B of each projection) is averaged over optimizer
steps. A layer's value is the mean over its tensors, a component's the mean over all tensors of that name.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from hydra_vlm.errors import ConfigError, GraphMismatchError, StageError
from hydra_vlm.graph import ComputationGraph, finite, whole
from hydra_vlm.schedule import Stages
from hydra_vlm.signals import GRADIENT_NORM, Signal

TensorValues = tuple[tuple[float, float], ...]
"""A value for A and one for B, for each projection of a graph, in its order."""


@dataclass(frozen=True, repr=False)
class GradientNormProfile:
    """Gradient norms of A and B for each projection, over the optimizer steps of a short run.

    `mean` and `spread` (standard deviation) are over `steps` steps, one value for A and one for B.
    `skipped` counts the first steps left out: B starts at zero, so A's first gradient is zero too.

    Raises GraphMismatchError when the values are not one pair per projection, ConfigError when one is
    negative or not finite or no step was kept.
    """

    graph: ComputationGraph
    mean: TensorValues
    spread: TensorValues
    steps: int
    skipped: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.skipped < 0:
            raise ConfigError(
                f"a profile needs at least one kept step, got {self.steps} kept and {self.skipped} skipped: "
                "profile for more steps or skip fewer."
            )
        for what, values in (("mean", self.mean), ("spread", self.spread)):
            if len(values) != len(self.graph.projections):
                raise GraphMismatchError(
                    f"profile {what} has {len(values)} entries, graph {self.graph.name!r} has "
                    f"{len(self.graph.projections)} projections."
                )
            for pair, p in zip(values, self.graph.projections, strict=True):
                if not all(math.isfinite(value) and value >= 0 for value in pair):
                    raise ConfigError(
                        f"profile {what} of layer {p.layer + 1}, {p.component} is {pair}: gradient norms "
                        "must be finite and not negative; lower the learning rate or check the data."
                    )

    @cached_property
    def norms(self) -> tuple[float, ...]:
        """One value for each projection: the mean of A's and B's norm."""
        return tuple(fmean(pair) for pair in self.mean)

    def signal(self) -> Signal:
        """The norms as a signal, for whatever follows any kind."""
        about = "Mean L2 norm of the gradients of LoRA's A and B."
        return Signal(self.graph, GRADIENT_NORM, self.norms, self.steps, about)

    def layer_norms(self) -> tuple[float, ...]:
        """The layer curve (Fig. 3): for each layer, the mean over its tensors."""
        return self._by_layer(self.mean)

    def layer_spread(self) -> tuple[float, ...]:
        """For each layer, the mean over its tensors of their standard deviation over steps."""
        return self._by_layer(self.spread)

    def component_norms(self) -> dict[str, float]:
        """The component table (Table I): for each component, the mean over its tensors in all layers."""
        values: dict[str, list[float]] = {component: [] for component in self.graph.components}
        for norm, p in zip(self.norms, self.graph.projections, strict=True):
            values[p.component].append(norm)
        return {component: fmean(norms) for component, norms in values.items()}

    def _by_layer(self, pairs: TensorValues) -> tuple[float, ...]:
        layers: list[list[float]] = [[] for _ in range(self.graph.n_layers)]
        for pair, p in zip(pairs, self.graph.projections, strict=True):
            layers[p.layer].extend(pair)
        return tuple(fmean(layer) for layer in layers)

    def table(self) -> str:
        """Plain text: mean gradient norm by layer (the paper's Fig. 3) and by component (Table I)."""
        layers, spreads = self.layer_norms(), self.layer_spread()
        top = max(layers) or 1.0
        lines = [f"gradient norms over {self.steps} steps ({self.skipped} skipped)", ""]
        labels = [self.graph.label(layer) for layer in range(self.graph.n_layers)]
        width = max(5, *map(len, labels))
        lines.append(f"{'layer':>{width}}  {'mean':>9} {'spread':>9}")
        for label, norm, spread in zip(labels, layers, spreads, strict=True):
            lines.append(f"{label:>{width}}  {norm:9.5f} {spread:9.5f}  {'█' * round(30 * norm / top)}")
        components = self.component_norms()
        width = max(12, *map(len, components))
        lines += ["", f"{'component':{width}} {'mean':>9}"]
        lines += [f"{name:{width}} {norm:9.5f}" for name, norm in components.items()]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; `mean` and `spread` are lists over layers of component -> [A, B]."""
        return {
            "graph": self.graph.to_json(),
            "steps": self.steps,
            "skipped": self.skipped,
            "mean": _nest(self.graph, self.mean),
            "spread": _nest(self.graph, self.spread),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "GradientNormProfile":
        """The inverse of `to_json`; raises ConfigError on anything else."""
        try:
            graph = ComputationGraph.from_json(data["graph"])
            mean, spread = (_flatten(graph, data[key]) for key in ("mean", "spread"))
            return cls(graph, mean, spread, whole(data["steps"]), whole(data["skipped"]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"not a gradient-norm profile: {type(error).__name__} {error}.") from error

    def __repr__(self) -> str:
        layers = self.layer_norms()
        return (
            f"GradientNormProfile({self.graph.name!r}, {self.steps} steps after {self.skipped} skipped, "
            f"layer norms {min(layers):.3g}-{max(layers):.3g})"
        )


def _nest(graph: ComputationGraph, values: TensorValues) -> list[dict[str, list[float]]]:
    layers: list[dict[str, list[float]]] = [{} for _ in range(graph.n_layers)]
    for pair, p in zip(values, graph.projections, strict=True):
        layers[p.layer][p.component] = list(pair)
    return layers


def _flatten(graph: ComputationGraph, layers: Sequence[Mapping[str, Sequence[float]]]) -> TensorValues:
    pairs = (layers[p.layer][p.component] for p in graph.projections)
    return tuple((finite(pair[0]), finite(pair[1])) for pair in pairs)


def require_same_graph(measured: GradientNormProfile | Signal, graph: ComputationGraph) -> None:
    """Raises GraphMismatchError, naming the first difference, when it was measured on another graph.

    The name of the graph does not count, only layers, components and shapes do.
    """
    difference = measured.graph.difference(graph)
    if difference is not None:
        what = f"signal {measured.kind}" if isinstance(measured, Signal) else "profile"
        raise GraphMismatchError(
            f"the {what} was measured on {measured.graph.name!r}, which is not {graph.name!r}: it has {difference}. "
            "Profile this model, or name the one that it belongs to."
        )


def stages_of(profile: GradientNormProfile, n_stages: int) -> Stages:
    """The layers in stages by their gradient norms, each part by itself (norms of two parts do not compare).

    Stage i is the union of the parts' i-th stages, so that Eq. 5-8 spend one budget on all parts. A part with fewer
    distinct norms than `n_stages` has as many stages as it can, the lowest ones.

    Raises StageError as `partition_into_stages` does, when not even one part has that many.
    """
    norms = profile.layer_norms()
    parts = [[norms[layer] for layer in layers] for layers in profile.graph.part_layers.values()]
    most = max(len(set(values)) for values in parts)
    if n_stages > most:
        partition_into_stages(max(parts, key=lambda values: len(set(values))), n_stages)
    joined: list[list[int]] = [[] for _ in range(n_stages)]
    for values, layers in zip(parts, profile.graph.part_layers.values(), strict=True):
        stages = partition_into_stages(values, min(n_stages, len(set(values))) if n_stages > 0 else n_stages)
        for stage, members in zip(joined, stages, strict=False):
            stage.extend(layers[i] for i in members)
    return tuple(map(tuple, joined))


def partition_into_stages(layer_norms: Sequence[float], n_stages: int) -> Stages:
    """K-means on the layers' average gradient norms: sets of 0-based layers, lowest centroid first.

    The problem is one-dimensional, so clusters are runs of the sorted values and dynamic programming over
    them finds the partition with the least within-cluster sum of squares: exact, without restarts or a seed.
    Layers with equal norms share a stage.

    Raises StageError when n_stages is below 1 or above the number of distinct values.
    """
    values = sorted(set(layer_norms))
    if not values or not all(math.isfinite(value) for value in values):
        raise StageError("stages need a finite gradient norm for every layer.", nearest="Profile the model again.")
    if not 1 <= n_stages <= len(values):
        possible = min(max(n_stages, 1), len(values))
        raise StageError(
            f"{n_stages} stages cannot be made of {len(layer_norms)} layers with {len(values)} distinct "
            "gradient norms.",
            nearest=f"Set n_stages to {possible}.",
            n_stages=possible,
        )
    starts = _optimal_runs(values, [list(layer_norms).count(value) for value in values], n_stages)
    runs = [values[a:b] for a, b in zip(starts, [*starts[1:], len(values)], strict=True)]
    stage_of = {value: stage for stage, run in enumerate(runs) for value in run}
    return tuple(
        tuple(layer for layer, norm in enumerate(layer_norms) if stage_of[norm] == stage) for stage in range(n_stages)
    )


def _optimal_runs(values: Sequence[float], weights: Sequence[int], n_runs: int) -> list[int]:
    """Where each of `n_runs` runs of the sorted weighted values starts, for the least sum of squares."""
    n = len(values)
    centre, unit = fmean(values), (values[-1] - values[0]) or 1.0
    w, wx, wxx = [0.0], [0.0], [0.0]  # prefix sums over centred, scaled values, lest differences cancel
    for value, weight in zip(values, weights, strict=True):
        x = (value - centre) / unit
        w.append(w[-1] + weight)
        wx.append(wx[-1] + weight * x)
        wxx.append(wxx[-1] + weight * x * x)

    def squares(a: int, b: int) -> float:
        return wxx[b] - wxx[a] - (wx[b] - wx[a]) ** 2 / (w[b] - w[a])

    # best[k][b]: least sum of squares of the first b values in k+1 runs, and where the last of them starts
    best = [[(squares(0, b), 0) if b else (0.0, 0) for b in range(n + 1)]]
    for k in range(1, n_runs):
        best.append(
            [
                min(((best[k - 1][a][0] + squares(a, b), a) for a in range(k, b)), default=(math.inf, 0))
                for b in range(n + 1)
            ]
        )
    starts, end = [], n
    for k in reversed(range(n_runs)):
        end = best[k][end][1]
        starts.append(end)
    return starts[::-1]

"""The computation graph G: the linear projections that LoRA may adapt, and g(G, Z), what adapting them costs.

A rank-r adapter of a projection adds A (r x in) and B (out x r), so it has r x (in + out) parameters;
in + out is therefore called the projection's `cost`: LoRA parameters per rank.

Symbols of the paper: G computation graph, N_l number of layers, Z rank schedule, g(G, Z) parameters of Z.
"""

import difflib
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, TypeVar

from hydra_vlm.errors import ConfigError

Number = TypeVar("Number", int, float)

PAPER_SYMBOLS: Mapping[str, str] = {
    "q_proj": "Q",
    "k_proj": "K",
    "v_proj": "V",
    "o_proj": "O",
    "gate_proj": "Gate",
    "up_proj": "Up",
    "down_proj": "Down",
}
"""The paper's symbols (Section III) of a LLaMA layer's components, for display only."""

PRESETS: Mapping[str, tuple[int, int, int]] = {
    "mobilellama-1.4b": (24, 2048, 5632),
    "mobilellama-2.7b": (32, 2560, 6912),
}
"""The paper's two language models: name -> (layers, hidden size, feed-forward size)."""

DECODER = "decoder"
"""The part that the paper adapts, and the only one of most graphs."""


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear module of one layer.

    `layer` counts from 0; `component` is the module's own name, such as "q_proj" or "qkv_proj", with the part before it
    outside of the decoder, as in "tower.q_proj".
    """

    layer: int
    component: str
    in_features: int
    out_features: int

    @property
    def cost(self) -> int:
        """LoRA parameters per rank: in_features + out_features."""
        return self.in_features + self.out_features


@dataclass(frozen=True, repr=False)
class ComputationGraph:
    """The adaptable projections of a decoder, layer by layer, and of other parts where they are adapted too.

    Layers may differ in shape and in the components they have; every layer has at least one. The projections
    are put in order of layer, then of each component's first appearance, so graphs with the same content are
    equal. `parts` names the parts with their numbers of layers; layers are counted through all of them, so that with
    (("decoder", 24), ("tower", 23)) the tower's first layer is layer 24. Left out, all layers are the decoder's.
    `notes` say in a line each what of these layers is not adapted; they tell no graphs apart.

    Raises ConfigError when a projection is repeated, a layer is empty, a size is not positive, or the parts do not add
    up to the layers.
    """

    name: str
    projections: tuple[Projection, ...]
    parts: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        by_layer = sorted(self.projections, key=lambda p: p.layer)
        order = {component: i for i, component in enumerate(dict.fromkeys(p.component for p in by_layer))}
        by_layer.sort(key=lambda p: (p.layer, order[p.component]))
        object.__setattr__(self, "projections", tuple(by_layer))
        if by_layer and not self.parts:
            object.__setattr__(self, "parts", ((DECODER, self.n_layers),))
        self._check()

    def _check(self) -> None:
        if not self.projections:
            raise ConfigError(f"graph {self.name!r} has no projections: a decoder needs at least one linear layer.")
        layers = {p.layer for p in self.projections}
        missing = sorted(set(range(max(layers) + 1)) - layers)
        if min(layers) < 0 or missing:
            where = f"layer {missing[0] + 1} has none" if missing else f"layer index {min(layers)} is negative"
            raise ConfigError(f"graph {self.name!r}: every layer needs a projection, but {where}.")
        if len(self._positions) < len(self.projections):
            raise ConfigError(f"graph {self.name!r} lists a (layer, component) twice.")
        if sum(n for _, n in self.parts) != self.n_layers or len(dict(self.parts)) < len(self.parts):
            raise ConfigError(f"graph {self.name!r}: parts {self.parts} do not add up to {self.n_layers} layers.")
        for p in self.projections:
            if p.in_features < 1 or p.out_features < 1:
                raise ConfigError(
                    f"graph {self.name!r}, layer {p.layer + 1}, {p.component}: sizes must be positive, "
                    f"got in_features={p.in_features}, out_features={p.out_features}."
                )

    @cached_property
    def n_layers(self) -> int:
        """N_l."""
        return self.projections[-1].layer + 1

    @cached_property
    def components(self) -> tuple[str, ...]:
        """Names of all components, in order of first appearance."""
        return tuple(dict.fromkeys(p.component for p in self.projections))

    @cached_property
    def costs(self) -> tuple[int, ...]:
        """LoRA parameters per rank of each projection."""
        return tuple(p.cost for p in self.projections)

    @cached_property
    def cost(self) -> int:
        """Parameters of rank-1 LoRA on the whole graph; uniform LoRA of rank R has R times as many."""
        return sum(self.costs)

    @cached_property
    def _layers(self) -> tuple[tuple[Projection, ...], ...]:
        layers: list[list[Projection]] = [[] for _ in range(self.n_layers)]
        for p in self.projections:
            layers[p.layer].append(p)
        return tuple(tuple(layer) for layer in layers)

    @cached_property
    def layer_costs(self) -> tuple[int, ...]:
        """LoRA parameters per rank of each layer."""
        return tuple(sum(p.cost for p in layer) for layer in self._layers)

    @cached_property
    def _positions(self) -> dict[tuple[int, str], int]:
        return {(p.layer, p.component): i for i, p in enumerate(self.projections)}

    @cached_property
    def part_layers(self) -> dict[str, range]:
        """Which layers are each part's."""
        ranges, start = {}, 0
        for part, n in self.parts:
            ranges[part] = range(start, start + n)
            start += n
        return ranges

    def place(self, layer: int) -> tuple[str, int]:
        """The part of a layer (0-based) and its number within it (0-based)."""
        return next((part, layer - r.start) for part, r in self.part_layers.items() if layer in r)

    def depth(self, layer: int) -> float:
        """How deep a layer lies in its part, from 0 (first) to 1 (last)."""
        part, number = self.place(layer)
        return number / max(1, len(self.part_layers[part]) - 1)

    def label(self, layer: int) -> str:
        """A layer's name for people, counted from 1: "3" in the decoder, "tower 3" elsewhere."""
        part, number = self.place(layer)
        return str(number + 1) if part == DECODER else f"{part} {number + 1}"

    def difference(self, other: "ComputationGraph") -> str | None:
        """The first difference to another graph in words, this one's side first; None when only the names differ."""
        if self.projections == other.projections and self.parts == other.parts:
            return None
        if self.parts != other.parts:
            ours, theirs = (" and ".join(f"{n} {part} layers" for part, n in g.parts) for g in (self, other))
            return f"{ours} where the other has {theirs}"
        if set(self.components) != set(other.components):
            return f"components {', '.join(self.components)} where the other has {', '.join(other.components)}"
        layer = next(i for i in range(self.n_layers) if self.layer(i) != other.layer(i))
        ours, theirs = (
            ", ".join(f"{p.component} {p.in_features}x{p.out_features}" for p in g.layer(layer)) for g in (self, other)
        )
        return f"layer {self.label(layer)} with {ours} where the other has {theirs}"

    def layer(self, layer: int) -> tuple[Projection, ...]:
        """The projections of a layer (0-based)."""
        return self._layers[layer]

    def layer_cost(self, layer: int) -> int:
        """LoRA parameters per rank of a layer (0-based)."""
        return self.layer_costs[layer]

    def index(self, layer: int, component: str) -> int:
        """Position in `projections`; raises KeyError when the layer has no such component."""
        return self._positions[layer, component]

    def parameters(self, ranks: Sequence[int]) -> int:
        """g(G, Z): trainable LoRA parameters of one rank for each projection (0 = not adapted)."""
        return sum(rank * cost for rank, cost in zip(ranks, self.costs, strict=True))

    def fingerprint(self) -> str:
        """Twelve hex digits that depend on layers, components and shapes, but not on the name."""
        lines = (f"{p.layer} {p.component} {p.in_features} {p.out_features}" for p in self.projections)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; `layers` is a list over layers of component -> [in_features, out_features]."""
        return {
            "name": self.name,
            "parts": dict(self.parts),
            "components": list(self.components),
            "layers": [{p.component: [p.in_features, p.out_features] for p in layer} for layer in self._layers],
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ComputationGraph":
        """The inverse of `to_json`; raises ConfigError on anything else."""
        try:
            components = list(data["components"])
            projections = [
                Projection(layer, component, whole(shape[0]), whole(shape[1]))
                for layer, shapes in enumerate(data["layers"])
                for component, shape in sorted(shapes.items(), key=lambda item: components.index(item[0]))
            ]
            parts = tuple((str(part), whole(n)) for part, n in data.get("parts", {}).items())
            return cls(str(data["name"]), tuple(projections), parts, tuple(map(str, data.get("notes", ()))))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise ConfigError(f"not a computation graph: {type(error).__name__} {error}.") from error

    def __repr__(self) -> str:
        return (
            f"ComputationGraph({self.name!r}, {self.n_layers} layers, {len(self.projections)} projections "
            f"({', '.join(self.components)}), {self.cost:,} parameters per rank, {self.fingerprint()})"
        )


def whole(value: Any) -> int:
    """A whole number as JSON has it; raises ValueError for anything else, such as true, 2.5, "8" or 10^30."""
    if type(value) is not int or abs(value) >= 2**63:
        raise ValueError(f"{str(value)[:40]!r} is no whole number in range")
    return value


def finite(value: Any) -> float:
    """A finite number as JSON has it; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{str(value)[:40]!r} is no finite number")
    return float(value)


def at_least(least: int, value: Number) -> Number:
    """The value; raises ValueError where it is less than `least`."""
    if value < least:
        raise ValueError(f"{value} is below {least}")
    return value


def none_for_nan(value: float) -> float | None:
    """A number for JSON, which knows no nan and no infinity."""
    return value if math.isfinite(value) else None


def nan_for_none(value: Any) -> float:
    """The inverse of `none_for_nan`; raises ValueError for what is neither null nor a finite number."""
    return math.nan if value is None else finite(value)


def llama_graph(
    name: str, n_layers: int, hidden: int, feed_forward: int, kv_features: int | None = None
) -> ComputationGraph:
    """The graph of a LLaMA-like decoder: Q, K, V, O, Gate, Up, Down in every layer.

    `kv_features` is the output width of K and V under grouped-query attention; the default is `hidden`.
    """
    kv = hidden if kv_features is None else kv_features
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, feed_forward),
        "up_proj": (hidden, feed_forward),
        "down_proj": (feed_forward, hidden),
    }
    return ComputationGraph(
        name,
        tuple(Projection(layer, c, *shape) for layer in range(n_layers) for c, shape in shapes.items()),
    )


@cache
def preset(name: str) -> ComputationGraph:
    """The graph of one of the paper's language models, by name; raises ConfigError that names the nearest."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)
        raise ConfigError(f"no graph preset is called {name!r}: did you mean {near[0]!r}? Known: {', '.join(PRESETS)}.")
    return llama_graph(name, *PRESETS[name])

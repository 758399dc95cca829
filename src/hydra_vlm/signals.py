"""A measured signal: one number for each projection, and of which kind it is.

Each kind is measured by the file of its name in `training/signals/`; a file from elsewhere may hold any other kind, for
an allocator that follows a signal asks only for a number per projection.
"""

import difflib
import math
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra_vlm.errors import ConfigError, GraphMismatchError
from hydra_vlm.graph import ComputationGraph, finite, whole

GRADIENT_NORM = "gradient_norm"
"""The paper's own kind (Eq. 1); stages are made from it alone."""

RECORDERS = Path(__file__).parent / "training" / "signals"

_KIND = re.compile(r"[a-z][a-z0-9_]{0,39}")


def kinds() -> tuple[str, ...]:
    """The kinds that can be measured here: the files of `training/signals/`, by name."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules([str(RECORDERS)])))


def require_kind(kind: str) -> str:
    """The kind as it is spelled here; raises ConfigError, naming the nearest, where it cannot be measured."""
    known, asked = kinds(), kind.lower().replace("-", "_").replace(" ", "_")
    if asked in known:
        return asked
    close = difflib.get_close_matches(asked, known, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
    raise ConfigError(f"no signal is called {kind[:60]!r}: {meant}")


@dataclass(frozen=True, repr=False)
class Signal:
    """A number for each projection of a graph, in its order: the larger, the more rank it asks for.

    `kind` is a short name in lower case, `steps` how many optimizer steps (or forward passes) it was measured over, and
    `about` a sentence that says what the numbers are.

    Raises GraphMismatchError when there is not one value per projection, ConfigError when one is negative or not
    finite, the kind is no such name, or there were no steps.
    """

    graph: ComputationGraph
    kind: str
    values: tuple[float, ...]
    steps: int
    about: str = ""

    def __post_init__(self) -> None:
        if not _KIND.fullmatch(self.kind):
            raise ConfigError(
                f"a signal's kind is a short name in lower case, such as {GRADIENT_NORM}: found {self.kind[:60]!r}"
            )
        if self.steps < 1:
            raise ConfigError(f"a signal is measured over one step or more, got {self.steps}: measure it anew")
        if len(self.values) != len(self.graph.projections):
            raise GraphMismatchError(
                f"signal {self.kind} has {len(self.values)} values, graph {self.graph.name!r} has "
                f"{len(self.graph.projections)} projections."
            )
        for value, p in zip(self.values, self.graph.projections, strict=True):
            if not (math.isfinite(value) and value >= 0):
                raise ConfigError(
                    f"signal {self.kind} of layer {p.layer + 1}, {p.component} is {value}: it must be finite and not "
                    "negative; lower the learning rate or check the data."
                )

    @property
    def title(self) -> str:
        """The kind in words: "gradient norm"."""
        return self.kind.replace("_", " ")

    def by_layer(self) -> list[dict[str, float]]:
        """Component -> value, for each layer."""
        layers: list[dict[str, float]] = [{} for _ in range(self.graph.n_layers)]
        for value, p in zip(self.values, self.graph.projections, strict=True):
            layers[p.layer][p.component] = value
        return layers

    def table(self) -> str:
        """Plain text: each layer's mean with a bar, and each component's mean over layers."""
        layers = [fmean(values.values()) for values in self.by_layer()]
        top = max(layers) or 1.0
        labels = [self.graph.label(layer) for layer in range(self.graph.n_layers)]
        width = max(5, *map(len, labels))
        lines = [f"{self.title} over {self.steps} steps", *([self.about] if self.about else []), ""]
        lines.append(f"{'layer':>{width}}  {'mean':>10}")
        lines += [
            f"{label:>{width}}  {mean:10.5g}  {'█' * round(30 * mean / top)}"
            for label, mean in zip(labels, layers, strict=True)
        ]
        width = max(12, *map(len, self.graph.components))
        lines += ["", f"{'component':{width}} {'mean':>10}"]
        for component in self.graph.components:
            found = [values[component] for values in self.by_layer() if component in values]
            lines.append(f"{component:{width}} {fmean(found):10.5g}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; `values` is a list over layers of component -> value."""
        return {
            "kind": self.kind,
            "about": self.about,
            "steps": self.steps,
            "graph": self.graph.to_json(),
            "values": self.by_layer(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Signal":
        """The inverse of `to_json`; raises ConfigError on anything else."""
        try:
            graph = ComputationGraph.from_json(data["graph"])
            values = tuple(finite(data["values"][p.layer][p.component]) for p in graph.projections)
            kind, about = data["kind"], data.get("about", "")
            if not (isinstance(kind, str) and isinstance(about, str)):
                raise TypeError("kind and about are texts")
            return cls(graph, kind, values, whole(data["steps"]), about)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(f"not a measured signal: {type(error).__name__} {error}.") from error

    def __repr__(self) -> str:
        return (
            f"Signal({self.kind!r} of {self.graph.name!r}, {self.steps} steps, "
            f"{min(self.values):.3g}-{max(self.values):.3g})"
        )

"""What there is to know of the table before using it: how it was made, what it holds, what it cost, how noisy it is."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from hydra_vlm.errors import DataError
from hydra_vlm.rankbench.spread import LOSS, effects, paired, quantities
from hydra_vlm.rankbench.table import RankBench
from hydra_vlm.rankbench.text import markdown, number


def datasheet(bench: RankBench) -> str:
    """Facts as Markdown."""
    facts = [
        ("model", f"{bench.graph.name}: {bench.graph.n_layers} layers, {len(bench.graph.projections)} projections"),
        ("budget", f"{bench.budget.parameters:,} LoRA parameters, uniform rank {bench.budget.rank}"),
        ("scores", f"{', '.join(bench.benchmarks)}, in per cent; validation loss; training losses"),
        ("schedules", f"{len(bench.finished)} of {len(bench.entries)} planned, {_by_space(bench)}"),
        ("runs", f"{len(bench.rows)}; {_by_seeds(bench)}"),
        ("profile", f"{bench.profile.steps} steps after {bench.profile.skipped} skipped"),
        ("cost", _cost(bench)),
        *((name, str(value)) for name, value in _flat(bench.meta).items()),
    ]
    parts = [markdown([["fact", "value"], *map(list, facts)]), "", markdown(_origins(bench)), "", _noise(bench)]
    return "\n".join(parts)


def _by_space(bench: RankBench) -> str:
    counts = Counter(entry.space for entry in bench.finished)
    return f"{counts['closed']} in the paper's space, {counts['open']} only in the open one"


def _by_seeds(bench: RankBench) -> str:
    counts = Counter(len(rows) for rows in bench.runs.values())
    return ", ".join(f"{n} schedules with {k} seed{'s' * (k > 1)}" for k, n in sorted(counts.items()))


def _cost(bench: RankBench) -> str:
    seconds = [row.seconds for row in bench.rows]
    each = sorted(seconds)[len(seconds) // 2]
    return f"{sum(seconds) / 3600:.1f} hours of training and evaluation in all, {each:.0f} s a run (median)"


def _flat(meta: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in meta.items():
        inner = _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
        found.update(inner)
    return found


def _origins(bench: RankBench) -> list[list[str]]:
    rows = [["origin", "schedules", "mean objective", "least", "most"]]
    worth = {name: bench.objective(bench.scores(rows)).mean() for name, rows in bench.runs.items()}
    for origin in dict.fromkeys(entry.origin for entry in bench.finished):
        values = [float(worth[entry.id]) for entry in bench.finished if entry.origin == origin]
        numbers = (sum(values) / len(values), min(values), max(values))
        rows.append([origin, str(len(values)), *map(number, numbers)])
    return rows


def _noise(bench: RankBench) -> str:
    """Standard deviations of a run between schedules and between seeds."""
    rows = [["", "between schedules", "between seeds, paired"]]
    try:
        even = paired(bench)
        for what in quantities(even, even.rows):
            spreads = (variance**0.5 for variance in effects(even, what).variances)
            rows.append([what, *(number(spread, 4 if what == LOSS else 2) for spread in spreads)])
    except DataError:
        return "Noise between seeds: not known yet, no schedule has two seeds."
    return markdown(rows)

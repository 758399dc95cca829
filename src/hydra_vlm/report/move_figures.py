"""Figures of ranks that moved: the ranks at each time, the spectra that a decision cut, the schedules it probed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import plotly.graph_objects as go

from hydra_vlm.graph import ComputationGraph
from hydra_vlm.moving.plan import Move
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.figures import BLUE, GRID, INK, MUTED, VERMILION, blank, escaped, symbol
from hydra_vlm.schedule import RankSchedule

FLOOR = 1e-6
"""A singular value below this share of the largest is drawn here: a logarithmic axis has no zero."""

Line = tuple[list[float | None], list[float | None]]
"""Places and heights of a line; None is a gap in it."""


def frames(trial: TrialRecord) -> list[RankSchedule]:
    """The ranks at the start and after each move, all under the budget that the run ended with; none without moves."""
    first, last = trial.first_schedule, trial.schedule
    if first is None or last is None or not trial.moves:
        return []
    names = ["Start", *(f"After step {move.step:,}" for move in trial.moves)]
    shown = [first, *(move.after for move in trial.moves)]
    return [replace(one, budget=last.budget, name=name) for name, one in zip(names, shown, strict=True)]


def spectrum_figure(move: Move) -> go.Figure:
    """Every projection's singular values as dashes over one another, coloured by what the decision did with them, and a
    line between what it kept and what it cut.

    Projections stand side by side, by component and then by layer, so that any number of them fits.
    """
    graph = move.after.graph
    order = sorted(range(len(graph.projections)), key=lambda i: _by_component(graph, i))
    top = max((value for found in move.spectra for value in found), default=0.0) or 1.0
    floor = FLOOR * top
    kept: Line = ([], [])
    cut: Line = ([], [])
    edge: Line = ([], [])
    told: list[str | None] = []
    for place, index in enumerate(order):
        values = [max(value, floor) for value in move.spectra[index]]
        rank = min(move.after.ranks[index], len(values))
        for line, part in ((kept, values[:rank]), (cut, values[rank:])):
            for value in part:
                _append(line, place, 0.38, value)
        if values:
            _append(edge, place, 0.5, _between(values, rank))
            told += [_told(graph, index, values, rank)] * 2 + [None]
    figure = blank(height=340)
    for (x, y), name, colour in ((kept, "kept", BLUE), (cut, "cut", VERMILION)):
        figure.add_scatter(x=x, y=y, mode="lines", line={"color": colour, "width": 2}, name=name, hoverinfo="skip")
    figure.add_scatter(
        x=edge[0],
        y=edge[1],
        mode="lines",
        line={"color": INK, "width": 1.5},
        name="where it is cut",
        customdata=told,
        hovertemplate="%{customdata}<extra></extra>",
    )
    _component_axis(figure, graph, order)
    heights = [height for line in (kept, cut, edge) for height in line[1] if height is not None]
    figure.update_yaxes(title_text="singular value", type="log", **_ticks(heights))
    return figure


def _by_component(graph: ComputationGraph, index: int) -> tuple[int, int]:
    projection = graph.projections[index]
    return graph.components.index(projection.component), projection.layer


def _append(line: Line, place: int, half: float, height: float) -> None:
    """A dash of twice this half width, and a gap after it."""
    line[0].extend((place - half, place + half, None))
    line[1].extend((height, height, None))


def _between(values: Sequence[float], rank: int) -> float:
    """A height between the last value kept and the first one cut; just beyond the values where one of them lacks."""
    above = values[rank - 1] if rank else values[0] * 1.5
    below = values[rank] if rank < len(values) else values[-1] / 1.5
    return math.sqrt(above * below)


def _told(graph: ComputationGraph, index: int, values: Sequence[float], rank: int) -> str:
    projection = graph.projections[index]
    parts = [f"layer {graph.label(projection.layer)}, {symbol(projection.component)}: {rank} of {len(values)} kept"]
    if rank:
        parts.append(f"last kept {values[rank - 1]:.3g}")
    if rank < len(values):
        parts.append(f"first cut {values[rank]:.3g}")
    return escaped(", ".join(parts))


def _ticks(heights: Sequence[float]) -> dict[str, list[Any]]:
    """A tick for each power of ten around these heights; for twice and five times as much too where they lie close."""
    low, high = min(heights), max(heights)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in ((1, 2, 5) if high < 100 * low else (1,))]
    return {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _component_axis(figure: go.Figure, graph: ComputationGraph, order: Sequence[int]) -> None:
    """Names each component under the middle of its projections, with a line between components."""
    places: dict[str, list[int]] = {}
    for place, index in enumerate(order):
        places.setdefault(graph.projections[index].component, []).append(place)
    for found in list(places.values())[1:]:
        figure.add_vline(x=found[0] - 0.5, line={"color": GRID, "width": 1}, layer="below")
    figure.update_xaxes(
        tickvals=[(found[0] + found[-1]) / 2 for found in places.values()],
        ticktext=[escaped(symbol(component)) for component in places],
        range=[-0.7, len(order) - 0.3],
        showgrid=False,
        ticks="",
    )


def probes_figure(move: Move) -> go.Figure:
    """The loss of every probed schedule in the order of probing, the lowest so far, a ring around the chosen one."""
    finite = [(n, ranks, loss) for n, (ranks, loss) in enumerate(move.probed, start=1) if math.isfinite(loss)]
    chosen = [(n, loss) for n, ranks, loss in finite if ranks == move.after.ranks][:1]
    losses = [loss for _, _, loss in finite]
    figure = blank(height=300)
    figure.add_scatter(
        x=[n for n, _, _ in finite],
        y=[min(losses[: i + 1]) for i in range(len(losses))],
        mode="lines",
        line={"color": MUTED, "width": 1.5, "shape": "hv"},
        name="lowest so far",
        hoverinfo="skip",
    )
    figure.add_scatter(
        x=[n for n, _, _ in finite],
        y=losses,
        mode="markers",
        marker={"color": BLUE, "size": 8},
        name="probed",
        customdata=[f"ranks {min(ranks)}–{max(ranks)}" for _, ranks, _ in finite],
        hovertemplate="probe %{x}, %{customdata}: %{y:.4f}<extra></extra>",
    )
    figure.add_scatter(
        x=[n for n, _ in chosen],
        y=[loss for _, loss in chosen],
        mode="markers",
        marker={"color": VERMILION, "size": 15, "symbol": "circle-open", "line": {"width": 2}},
        name="chosen",
        hovertemplate="probe %{x}, chosen: %{y:.4f}<extra></extra>",
    )
    figure.update_xaxes(title_text="probe", tick0=1, dtick=max(1, len(move.probed) // 12))
    figure.update_yaxes(title_text="validation loss, cut to it")
    return figure

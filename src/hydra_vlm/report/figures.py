"""The report's figures, Plotly figures made of records; colours stay apart for the colour-blind.

Layers count from 1 here, as in the paper; components carry the paper's symbols. Text from outside is escaped,
since Plotly reads its labels as markup.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from hydra_vlm.graph import PAPER_SYMBOLS, ComputationGraph
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.comparison import Measure
from hydra_vlm.report.statistics import Interval
from hydra_vlm.schedule import RankSchedule, Stages, format_stages
from hydra_vlm.signals import Signal

INK, GRID, MUTED = "#1f2933", "#e4e7eb", "#7b8794"
ORANGE, BLUE, VERMILION = "#e69f00", "#0072b2", "#d55e00"
TRIAL_COLOURS = {
    "zero-shot": "#9aa5b1",
    "uniform": "#3e4c59",
    "coarse": ORANGE,
    "fine": BLUE,
    "full": "#9aa5b1",
}
OTHER_COLOURS = ("#009e73", "#cc79a7", VERMILION, "#56b4e9", "#8c6d1f", "#5d4a9c")
"""After Okabe and Ito, who chose colours that all kinds of colour vision tell apart."""

MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "x")
RANK_SCALE = ((0.0, "#e08214"), (0.5, "#f0f2f5"), (1.0, "#4393c3"))
BAND = "rgba(123,135,148,0.18)"


def layer_curve(profile: GradientNormProfile, stages: Stages | None) -> go.Figure:
    """Gradient norm of each layer with its spread over steps, coloured by stage (the paper's Fig. 3)."""
    norms, spread = profile.layer_norms(), profile.layer_spread()
    x = list(range(1, len(norms) + 1))
    upper = [n + s for n, s in zip(norms, spread, strict=True)]
    lower = [max(0.0, n - s) for n, s in zip(norms, spread, strict=True)]
    figure = blank(height=380)
    figure.add_scatter(
        x=x + x[::-1],
        y=upper + lower[::-1],
        fill="toself",
        fillcolor=BAND,
        mode="none",
        name="± 1 s.d. over steps",
        hoverinfo="skip",
    )
    figure.add_scatter(x=x, y=norms, mode="lines", line_color=MUTED, line_width=1.5, showlegend=False, hoverinfo="skip")
    for i, (stage, colour) in enumerate(_stage_colours(stages or (tuple(range(len(norms))),))):
        figure.add_scatter(
            x=[layer + 1 for layer in stage],
            y=[norms[layer] for layer in stage],
            mode="markers",
            marker={
                "size": 10,
                "color": colour,
                "symbol": MARKERS[i % len(MARKERS)],
                "line": {"color": "white", "width": 1},
            },
            name=f"stage {i + 1}: layers {format_stages((stage,))}" if stages else "layer",
            hovertemplate="layer %{x}: %{y:.4g}<extra></extra>",
        )
    step = _layer_step(len(norms))
    ticks = [layer for layer in range(len(norms)) if (profile.graph.place(layer)[1] + 1) % step == 0]
    figure.update_xaxes(
        title_text=_layer_title(profile.graph),
        tickvals=[layer + 1 for layer in ticks],
        ticktext=[escaped(profile.graph.label(layer)) for layer in ticks],
        range=[0.4, len(norms) + 0.6],
    )
    figure.update_yaxes(title_text="gradient norm (L2)", rangemode="tozero")
    return figure


def component_bars(profile: GradientNormProfile) -> go.Figure:
    """Gradient norm of each component, mean over layers, for A, B and both together (the paper's Table I)."""
    parts = component_parts(profile)
    names = [escaped(symbol(component)) for component in parts]
    figure = blank(height=360)
    for part, label, colour in ((0, "A", "#56b4e9"), (1, "B", ORANGE)):
        figure.add_bar(
            x=names,
            y=[values[part] for values in parts.values()],
            name=label,
            marker_color=colour,
            hovertemplate=f"%{{x}}, {label}: %{{y:.4g}}<extra></extra>",
        )
    figure.add_scatter(
        x=names,
        y=[fmean(values) for values in parts.values()],
        mode="markers",
        marker={"symbol": "diamond", "size": 10, "color": INK, "line": {"color": "white", "width": 1}},
        name="mean of A and B",
        hovertemplate="%{x}, mean: %{y:.4g}<extra></extra>",
    )
    figure.update_layout(barmode="group", bargap=0.3)
    figure.update_xaxes(showgrid=False)
    figure.update_yaxes(title_text="gradient norm (L2)", rangemode="tozero")
    return figure


def component_parts(profile: GradientNormProfile) -> dict[str, tuple[float, float]]:
    """For each component, the mean over layers of A's norm and of B's."""
    pairs: dict[str, list[tuple[float, float]]] = {component: [] for component in profile.graph.components}
    for pair, projection in zip(profile.mean, profile.graph.projections, strict=True):
        pairs[projection.component].append(pair)
    return {c: (fmean(a for a, _ in values), fmean(b for _, b in values)) for c, values in pairs.items()}


def rank_map(schedule: RankSchedule, reach: float) -> go.Figure:
    """Ranks as a layers × components map with the number in each cell, and raised beside it the step size where it is
    not uniform LoRA's.

    Grey is the rank of uniform LoRA on the same budget, blue is above it and orange below; `reach` is the
    distance from it (in ranks) with full colour, common to maps that are to be compared.
    """
    middle, layers = schedule.budget / schedule.graph.cost, schedule.by_layer()
    ranks = [[layer.get(component) for component in schedule.graph.components] for layer in layers]
    raised, told = _step_texts(schedule)
    return _map(
        schedule.graph,
        layers,
        zmin=middle - reach,
        zmax=middle + reach,
        colorscale=[list(stop) for stop in RANK_SCALE],
        text=[["" if rank is None else f"{rank}{raised.get(rank, '')}" for rank in row] for row in ranks],
        customdata=[["" if rank is None else told.get(rank, "") for rank in row] for row in ranks],
        texttemplate="%{text}",
        hovertemplate="layer %{y}, %{x}: rank %{z}%{customdata}<extra></extra>",
    )


def _step_texts(schedule: RankSchedule) -> tuple[dict[int, str], dict[int, str]]:
    """Rank -> its step size for a cell, where that is not uniform LoRA's, and its scale and step size in words."""
    steps = schedule.steps()
    raised = {rank: f"<sup>{step:.2f}</sup>" for rank, (_, step) in steps.items() if f"{step:.2f}" != "1.00"}
    return raised, {rank: f", scale {scale:.4g}, step {step:.2f}" for rank, (scale, step) in steps.items()}


def signal_map(signal: Signal) -> go.Figure:
    """A signal as a layers × components map with the number in each cell; blue is the largest, white is zero."""
    return _map(
        signal.graph,
        signal.by_layer(),
        zmin=0,
        zmax=max(signal.values) or 1,
        colorscale=[[0, "#ffffff"], [1, RANK_SCALE[-1][1]]],
        texttemplate="%{z:.3~g}",
        hovertemplate=f"layer %{{y}}, %{{x}}: {escaped(signal.title)} %{{z:.4~g}}<extra></extra>",
    )


def _map(graph: ComputationGraph, cells: Sequence[Mapping[str, float]], **heat: Any) -> go.Figure:
    """A number for each layer and component (`cells` is component -> number by layer) as a heat map."""
    figure = blank(height=96 + 23 * graph.n_layers)
    figure.add_heatmap(
        z=[[layer.get(component) for component in graph.components] for layer in cells],
        x=[escaped(symbol(component)) for component in graph.components],
        y=[escaped(graph.label(layer)) for layer in range(graph.n_layers)],
        showscale=False,
        xgap=2,
        ygap=2,
        textfont={"size": 12, "color": INK},
        hoverongaps=False,
        **heat,
    )
    figure.update_xaxes(side="top", showgrid=False, ticks="", tickfont_size=12, tickangle=0)
    figure.update_yaxes(
        title_text=_layer_title(graph),
        type="category",
        autorange="reversed",
        dtick=1,
        showgrid=False,
        ticks="",
        tickfont_size=11,
    )
    figure.update_layout(margin={"t": 34, "b": 8, "l": 44 if len(graph.parts) == 1 else 84, "r": 8})
    return figure


def rank_reach(schedules: Sequence[RankSchedule]) -> float:
    """The largest distance of a rank from uniform LoRA's on the same budget, at least 1."""
    return max(
        [1.0] + [abs(rank - schedule.budget / schedule.graph.cost) for schedule in schedules for rank in schedule.ranks]
    )


def budget_bars(schedules: Sequence[RankSchedule]) -> go.Figure:
    """LoRA parameters of each schedule as a bar, with its budget as a line across it."""
    shown = list(schedules)[::-1]  # Plotly draws the first bar lowest
    names = [escaped(schedule.name) for schedule in shown]
    figure = blank(height=110 + 34 * len(shown))
    figure.add_bar(
        y=names,
        x=[schedule.parameters for schedule in shown],
        orientation="h",
        marker={
            "color": [VERMILION if schedule.over_budget else BLUE for schedule in shown],
            "pattern_shape": ["/" if schedule.over_budget else "" for schedule in shown],
        },
        width=0.6,
        text=[_usage(schedule) for schedule in shown],
        textposition="inside",
        insidetextanchor="start",
        textfont_color="white",
        name="LoRA parameters",
        hovertemplate="%{y}: %{x:,} parameters<extra></extra>",
    )
    figure.add_scatter(
        x=[schedule.budget for schedule in shown],
        y=names,
        mode="markers",
        marker={"symbol": "line-ns", "size": 26, "line": {"color": INK, "width": 3}},
        name="budget",
        hovertemplate="%{y}: budget %{x:,}<extra></extra>",
    )
    top = max(max(schedule.parameters, schedule.budget) for schedule in shown)
    figure.update_xaxes(title_text="trainable LoRA parameters", range=[0, top * 1.04], nticks=6)
    figure.update_yaxes(showgrid=False)
    return figure


def _validation_marks(figure: go.Figure, trial: TrialRecord, colour: str) -> None:
    losses = [(step, loss) for step, loss in trial.validation_losses if math.isfinite(loss)]
    if len(losses) < 2:
        return
    what = f"{escaped(trial.name)}, seed {trial.seed}, validation"
    figure.add_scatter(
        x=[step for step, _ in losses],
        y=[loss for _, loss in losses],
        mode="markers",
        marker={
            "color": colour,
            "size": [11 if step == trial.kept_step else 6 for step, _ in losses],
            "symbol": ["circle-open" if step == trial.kept_step else "x-thin-open" for step, _ in losses],
        },
        name=what,
        showlegend=False,
        hovertemplate=f"{what}, step %{{x}}: %{{y:.4f}}<extra></extra>",
    )


def _move_marks(figure: go.Figure, trial: TrialRecord, colour: str) -> None:
    for move in trial.moves:
        if math.isfinite(move.loss_before) and math.isfinite(move.loss_after):
            what = f"{escaped(trial.name)}, seed {trial.seed}, ranks moved after step {move.step}: validation loss"
            figure.add_scatter(
                x=[move.step, move.step],
                y=[move.loss_before, move.loss_after],
                mode="lines+markers",
                line={"color": colour, "width": 1},
                marker={"color": colour, "size": 8, "symbol": ["triangle-up-open", "triangle-up"]},
                customdata=["before", "after"],
                name=what,
                showlegend=False,
                hovertemplate=f"{what} %{{customdata}} %{{y:.4f}}<extra></extra>",
            )


def loss_curves(trials: Sequence[TrialRecord]) -> go.Figure:
    """Losses over optimizer steps, by trial name: training's, mean over seeds, smoothed; validation's where there are
    several, a mark for each that was taken, and a ring at the step whose weights were kept; a pair of triangles where
    ranks moved."""
    figure = blank(height=380)
    by_name: dict[str, list[TrialRecord]] = {}
    for trial in trials:
        if trial.train_losses:
            by_name.setdefault(trial.name, []).append(trial)
    colours = trial_colours(list(by_name))
    for name, group in by_name.items():
        at: dict[int, list[float]] = {}
        for trial in group:
            for step, loss in trial.train_losses:
                at.setdefault(step, []).append(loss)
        steps = sorted(step for step, losses in at.items() if len(losses) == len(group))
        figure.add_scatter(
            x=steps,
            y=_smooth([fmean(at[step]) for step in steps]),
            mode="lines",
            line={"color": colours[name], "width": 2, "dash": "dot" if name == "full" else "solid"},
            name=escaped(name),
            hovertemplate=f"{escaped(name)}, step %{{x}}: %{{y:.4f}}<extra></extra>",
        )
        for trial in group:
            _validation_marks(figure, trial, colours[name])
            _move_marks(figure, trial, colours[name])
    figure.update_xaxes(title_text="optimizer step", rangemode="tozero")
    # a logarithmic axis, since schedules differ in what is left of the loss at the end
    ticks = [digit * 10.0**power for power in range(-6, 7) for digit in (1, 2, 5)]
    figure.update_yaxes(
        title_text="training loss (nats a token)",
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    return figure


def budget_curve(lines: Mapping[str, Sequence[tuple[int, float]]], whole: float, cost: int) -> go.Figure:
    """Loss over parameters by name; `whole` is the uncut adapter's loss, `cost` the parameters of one rank."""
    figure = blank(height=420)
    colours = trial_colours(list(lines))
    for (name, points), marker in zip(lines.items(), MARKERS, strict=False):
        figure.add_scatter(
            x=[parameters / cost for parameters, _ in points],
            y=[loss if math.isfinite(loss) else None for _, loss in points],
            customdata=[parameters for parameters, _ in points],
            mode="lines+markers",
            line={"color": colours[name], "width": 2},
            marker={"size": 9, "symbol": marker},
            name=escaped(name),
            hovertemplate=f"{escaped(name)}, %{{customdata:,}} parameters: %{{y:.4f}}<extra></extra>",
        )
    if math.isfinite(whole):
        figure.add_hline(y=whole, line={"color": MUTED, "width": 1.5, "dash": "dash"})
    ticks = [digit * 2**power for power in range(12) for digit in (1, 1.5)][:-1]
    figure.update_xaxes(
        title_text="rank of uniform LoRA of as many parameters",
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:g}" for tick in ticks],
    )
    figure.update_yaxes(title_text="validation loss (nats a token)")
    return figure


def value_dots(measures: Mapping[str, Measure], title: str) -> go.Figure:
    """A row for each trial: a ring for each seed, the mean with its interval; `title` names the axis."""
    figure = _interval_dots({name: measure.value for name, measure in measures.items()}, title)
    colours = trial_colours(list(measures))
    for name, measure in measures.items():
        if len(measure.by_seed) == 1:
            continue  # the ring would lie under the dot
        figure.add_scatter(
            x=list(measure.by_seed.values()),
            y=[escaped(name)] * len(measure.by_seed),
            mode="markers",
            marker={"color": colours[name], "size": 9, "symbol": "circle-open", "opacity": 0.55},
            customdata=list(measure.by_seed),
            hovertemplate=f"{escaped(name)}, seed %{{customdata}}: %{{x:.4~f}}<extra></extra>",
        )
    return figure


def difference_dots(measures: Mapping[str, Measure], title: str) -> go.Figure:
    """A row for each trial: its paired difference to the baseline with its interval, and a line at zero."""
    intervals = {name: measure.difference for name, measure in measures.items() if measure.difference}
    figure = _interval_dots(intervals, title)
    figure.add_vline(x=0, line={"color": INK, "width": 1.5}, layer="below")
    return figure


def _interval_dots(intervals: Mapping[str, Interval], title: str) -> go.Figure:
    figure = blank(height=90 + 40 * len(intervals))
    colours = trial_colours(list(intervals))
    for name, interval in intervals.items():
        known = interval.low is not None and interval.high is not None
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [(interval.high or 0.0) - interval.mean],
            "arrayminus": [interval.mean - (interval.low or 0.0)],
            "thickness": 2.5,
            "width": 7,
        }
        figure.add_scatter(
            x=[interval.mean if math.isfinite(interval.mean) else None],
            y=[escaped(name)],
            mode="markers",
            marker={"color": colours[name], "size": 11},
            error_x=bars if known else None,
            name=escaped(name),
            hovertemplate=f"{escaped(name)}: %{{x:.4~f}}<br>{escaped(interval.method)}<extra></extra>",
        )
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title_text=escaped(title), nticks=7)
    order = [escaped(name) for name in intervals]
    figure.update_yaxes(showgrid=False, type="category", categoryorder="array", categoryarray=order[::-1])
    figure.update_yaxes(range=[-0.6, len(order) - 0.4])
    return figure


def trial_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each trial name: fixed ones for those that every run has, the others in turn."""
    others = [name for name in names if name not in TRIAL_COLOURS]
    rest = {name: OTHER_COLOURS[i % len(OTHER_COLOURS)] for i, name in enumerate(others)}
    return {name: TRIAL_COLOURS.get(name) or rest[name] for name in names}


def symbol(component: str) -> str:
    """The paper's symbol of a component, else its own name."""
    return PAPER_SYMBOLS.get(component, component)


def escaped(text: str) -> str:
    """Text as Plotly takes it: markup and templates' %{…} escaped, quotes not, since it would show their entities."""
    return escape(text, quote=False).replace("%{", "&#37;{")


def _stage_colours(stages: Stages) -> list[tuple[tuple[int, ...], str]]:
    # stages are ordered by gradient norm, so are their colours; the scale's pale end is left out
    places = [0.85 * i / max(1, len(stages) - 1) for i in range(len(stages))]
    return list(zip(stages, sample_colorscale("Viridis", places), strict=True))


def _layer_title(graph: ComputationGraph) -> str:
    return "decoder layer" if len(graph.parts) == 1 else "layer"


def _layer_step(n_layers: int) -> int:
    return 1 if n_layers <= 12 else 2 if n_layers <= 24 else 4


def _usage(schedule: RankSchedule) -> str:
    over = " OVER BUDGET" if schedule.over_budget else ""
    return f"{schedule.parameters:,} ({100 * schedule.parameters / schedule.budget:.2f} % of budget){over}"


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred running mean over a twentieth of the curve."""
    reach = len(values) // 40
    return [fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]


def blank(height: int) -> go.Figure:
    """A figure of this height in pixels, without traces, in the page's style."""
    figure = go.Figure()
    axis: dict[str, Any] = {
        "gridcolor": GRID,
        "linecolor": GRID,
        "zeroline": False,
        "automargin": True,
        "title_font_size": 13,
        "title_standoff": 8,
    }
    figure.update_layout(
        template="none",
        height=height,
        autosize=True,
        margin={"t": 12, "r": 12, "b": 40, "l": 52},
        font={
            "family": "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif",
            "size": 13,
            "color": INK,
        },
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        hoverlabel={"bgcolor": "white", "font_color": INK},
        xaxis=axis,
        yaxis=axis,
    )
    return figure

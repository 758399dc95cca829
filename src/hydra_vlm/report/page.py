"""A run folder as one self-contained page: report.html, which needs no network and no other file."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from hydra_vlm.errors import FileError
from hydra_vlm.files import write_text
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.report import figures
from hydra_vlm.report.comparison import Comparison, Row, compare
from hydra_vlm.report.markup import SCRIPT, STYLE, WATCH, fold, grid, missing, plot, table
from hydra_vlm.report.moves import moves_section
from hydra_vlm.report.pilots import pilots_section
from hydra_vlm.report.rates import RATES_DIFFER
from hydra_vlm.report.run import RunData, load_run
from hydra_vlm.schedule import RankSchedule, Stages, format_stages
from hydra_vlm.strict import parse_yaml

MAX_MAPS = 6
"""Rank maps shown; further schedules are in the table only."""

MAX_STEPS = 8
"""Ranks of a schedule whose scales and steps are listed; of more, the lowest and the highest are."""

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
"""The browser itself refuses whatever the page would fetch."""


def write_report(folder: Path, baseline: str = "uniform") -> Path:
    """Write `folder`/report.html from whatever records the run folder holds, and return its path.

    Raises RunFolderError when the folder is no run or a record does not read.
    """
    run = load_run(folder)
    path = folder / "report.html"
    write_text(path, render(run, compare(run, baseline)))
    return path


def render(run: RunData, comparison: Comparison) -> str:
    """The page as HTML."""
    sections = {
        "What was run": _what_was_run(run, comparison),
        "Result": _result(run, comparison),
        "Where the gradients are": _gradients(run),
        "Where the rank goes": _ranks(run),
        "How ranks moved": moves_section(run.trials),
        "What the pilot tried": pilots_section(run.trials),
        "Training": _training(run, comparison),
        "Configuration": _configuration(run),
    }
    return document(f"Rank schedules for {_model(run)}", comparison.findings(), sections)


def document(title: str, headlines: Sequence[str], sections: Mapping[str, str]) -> str:
    """A page as HTML: title and headlines as text, sections by title as markup; an empty one is left out."""
    body = "\n".join(
        f"<section>\n<h2>{name}</h2>\n{content}\n</section>" for name, content in sections.items() if content
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
<script>{WATCH}</script>
<script>{get_plotlyjs()}</script>
</head>
<body>
<header>
<p class="kicker">hydra-vlm report</p>
<h1>{escape(title)}</h1>
<div class="headline">{"".join(f"<p>{_unbroken(line)}</p>" for line in headlines)}</div>
<noscript>{missing("A script inside this page draws its figures: allow scripts to see them.")}</noscript>
</header>
<main>
{body}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _what_was_run(run: RunData, comparison: Comparison) -> str:
    config = _config(run)
    schedules = run.ended_schedules()
    graph = run.profile.graph if run.profile else schedules[0].graph if schedules else None
    budgets = dict.fromkeys((schedule.budget, schedule.graph.cost) for schedule in schedules)
    questions = dict.fromkeys((score.benchmark, score.n) for trial in run.trials for score in trial.scores)
    seeds = sorted({seed for row in comparison.rows if not row.seedless for seed in row.seeds})
    components = ", ".join(figures.symbol(c) for c in graph.components) if graph else ""
    facts = {
        "Model": _brief(config.get("model")),
        "Adapted": graph
        and f"{graph.name}: {' and '.join(f'{n} {part}' for part, n in graph.parts)} layers of {components}; "
        f"{graph.cost:,} LoRA parameters per rank",
        "Budget": "; ".join(f"{c:,} LoRA parameters: uniform LoRA at rank {c / g:.4g}" for c, g in budgets),
        "Data": _brief(_part(config, "data", ("train", "validation", "test"))),
        "Training": _brief(_part(config, "training", ("steps", "learning_rate", "batch_size"))),
        "Benchmarks": ", ".join(f"{name} ({n:,} questions)" for name, n in questions),
        "Seeds": f"{len(seeds)} ({', '.join(map(str, seeds))})" if seeds else "",
        "Trials": f"{len(run.trials)}, {_duration(sum(t.seconds for t in run.trials))} in all" if run.trials else "",
        "Device": _brief(run.environment.get("device")),
        "Command": _brief(run.environment.get("command")),
    }
    return "<dl>" + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v) + "</dl>"


def _result(run: RunData, comparison: Comparison) -> str:
    waiting = f" Unfinished: {', '.join(run.unfinished)}." if run.unfinished else ""
    if not comparison.rows:
        return missing(f"No trial has finished in this folder, so there is nothing to compare.{waiting}")
    parts = [missing(f"The run is not complete.{waiting}")] if run.unfinished else []
    overview, rates = comparison.overview(), comparison.learning_rates()
    parts.append(table(overview, numeric=range(1, overview[0].index("validation loss"))))
    if rates:
        parts.append(f"<h3>{RATES_DIFFER}</h3>{table(rates, numeric=())}")
    if comparison.baseline is None:
        parts.append(missing("No trial of the baseline has finished, so there are no differences."))
    elif len(comparison.rows) > 1:
        parts.append(f"<h3>Difference to {escape(comparison.baseline)}, paired</h3>")
        parts.append(table(_difference_cells(comparison), numeric=()))
    parts.append(_interval_notes(comparison))
    trained = [row for row in comparison.rows if not row.seedless]
    scheduled = [row for row in trained if row.budget is not None]
    for benchmark in comparison.benchmarks:
        parts.append(_score_figures(comparison, benchmark, trained, scheduled))
    return "\n".join([*parts, _sub_scores(comparison), *_unanswered(run)])


def _difference_cells(comparison: Comparison) -> list[list[str]]:
    """A line for each trained trial, a column for each measure; the verdict is the second line of a cell."""
    losses = any(row.loss.difference for row in comparison.rows)
    cells = [["schedule", *comparison.benchmarks, *(["validation loss"] if losses else [])]]
    for row in comparison.rows:
        measures = [*(row.scores.get(b) for b in comparison.benchmarks), *([row.loss] if losses else [])]
        shown = [f"{m.show_difference()}\n{m.verdict}" if m and m.difference else "–" for m in measures]
        if not row.seedless and row.name != comparison.baseline:
            cells.append([row.name, *shown])
    return cells


def _interval_notes(comparison: Comparison) -> str:
    notes = [f"{method}." for method in comparison.methods]
    compared = len(comparison.differences()) - 1
    if compared > 1:
        notes.append(
            f"Each interval stands for itself: of {compared} differences, {0.05 * compared:.1f} can be "
            "expected to look larger than the noise by chance alone."
        )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<p class="note">What the intervals are:</p><ul class="note">{items}</ul>' if items else ""


def _score_figures(comparison: Comparison, benchmark: str, trained: Sequence[Row], scheduled: Sequence[Row]) -> str:
    values = {row.name: row.scores[benchmark] for row in trained if benchmark in row.scores}
    gains = {
        row.name: row.scores[benchmark]
        for row in scheduled
        if benchmark in row.scores and row.scores[benchmark].difference
    }
    unit = next((f" ({measure.unit})" for measure in values.values() if measure.unit), "")
    plots = []
    if values:
        caption = "Score of every trained trial with its interval; rings, where there are any, are single seeds."
        plots.append(plot(figures.value_dots(values, f"{benchmark}{unit}"), caption, benchmark))
    if gains:
        against = str(comparison.baseline)
        caption = (
            f"Difference to {against}, paired, of the schedules under a budget; an interval that crosses the "
            "line at zero cannot be told from no difference."
        )
        title = f"difference to {against}{' (points)' if unit else ''}"
        plots.append(plot(figures.difference_dots(gains, title), caption, f"{benchmark}: against {against}"))
    return grid(plots)


def _sub_scores(comparison: Comparison) -> str:
    tables = []
    for benchmark in comparison.benchmarks:
        rows = [row for row in comparison.rows if row.groups.get(benchmark)]
        groups = dict.fromkeys(group for row in rows for group in row.groups[benchmark])
        cells = [["group", *(row.name for row in rows)]]
        for group in groups:
            measures = [row.groups[benchmark].get(group) for row in rows]
            cells.append([group, *(measure.show() if measure else "–" for measure in measures)])
        if groups:
            tables.append(f"<h3>{escape(benchmark)}</h3>{table(cells, numeric=())}")
    return fold("Scores by group of questions", "".join(tables)) if tables else ""


def _unanswered(run: RunData) -> list[str]:
    counts = [(trial.key, score) for trial in run.trials for score in trial.scores if score.unanswered]
    return [
        missing(f"{key} left {score.unanswered:,} of {score.n:,} {score.benchmark} questions unanswered: no credit.")
        for key, score in counts
    ]


def _gradients(run: RunData) -> str:
    profile = run.profile
    if profile is None:
        return missing("The folder has no profile.json: gradient norms were not measured in this run.") + _maps(run)
    stages = _stages(run)
    coloured = " Colours are the stages, lowest norm first." if stages else ""
    curve = plot(
        figures.layer_curve(profile, stages),
        f"Mean L2 norm of the gradients of a layer's LoRA tensors over {profile.steps} optimizer steps "
        f"after the first {profile.skipped}; the band is their mean standard deviation over steps.{coloured}",
        "Gradient norm by layer",
    )
    bars = plot(
        figures.component_bars(profile),
        "The same norms by component, mean over layers: for A, for B, and for both. B starts at zero, which "
        "keeps A's gradients small at first. The ratio is to the mean of all components.",
        "Gradient norm by component",
    )
    return curve + grid([bars, _component_table(profile)]) + _maps(run)


def _maps(run: RunData) -> str:
    """Every measured signal by layer and component, under the name of its kind."""
    signals = [*([run.profile.signal()] if run.profile else []), *run.signals]
    maps = [plot(figures.signal_map(s), f"{s.about} {s.steps} steps.".strip(), s.title.capitalize()) for s in signals]
    return grid(maps, "maps")


def _component_table(profile: GradientNormProfile) -> str:
    parts, norms = figures.component_parts(profile), profile.component_norms()
    middle = sum(norms.values()) / len(norms) or 1.0
    cells = [["component", "A", "B", "mean", "ratio"]]
    digits = max(0, 3 - math.floor(math.log10(middle)))
    for c, (a, b) in parts.items():
        values = [f"{value:.{digits}f}" for value in (a, b, norms[c])]
        cells.append([figures.symbol(c), *values, f"× {norms[c] / middle:.2f}"])
    return table(cells, numeric={1, 2, 3, 4})


def _ranks(run: RunData) -> str:
    schedules = run.ended_schedules()
    if not schedules:
        return missing("The folder has no schedules yet.")
    shown, reach = schedules[:MAX_MAPS], figures.rank_reach(schedules)
    maps = [plot(figures.rank_map(schedule, reach), "", schedule.name) for schedule in shown]
    left_out = f" The first {MAX_MAPS} of {len(schedules)} schedules are shown." if len(schedules) > MAX_MAPS else ""
    caption = (
        "Rank of every projection. Grey is uniform LoRA's rank on the same budget, blue more, orange less. A module's "
        "step size is scale · √rank, relative to uniform LoRA's; raised beside the rank where it is not 1."
    )
    bars = plot(
        figures.budget_bars(schedules),
        "Trainable LoRA parameters, exactly; the upright line is the budget.",
        "Parameters against budget",
    )
    return f'{grid(maps, "maps")}<p class="note">{caption}{left_out}</p>{bars}{_schedule_table(schedules)}'


def _schedule_table(schedules: Sequence[RankSchedule]) -> str:
    head = ["schedule", "parameters", "budget", "used", "ranks", "stages, lowest norm first", "Δd", "scaling"]
    cells = [[*head, "scale (step) by rank"]]
    for s in schedules:
        over = " OVER" if s.over_budget else ""
        low, high = min(s.ranks), max(s.ranks)
        cells.append(
            [
                s.name,
                f"{s.parameters:,}",
                f"{s.budget:,}",
                f"{100 * s.parameters / s.budget:.2f} %{over}",
                f"{low}" if low == high else f"{low}–{high}",
                format_stages(s.stages).replace(",", ", ") if s.stages else "–",
                "–" if s.delta is None else str(s.delta),
                str(s.scaling),
                _steps(s),
            ]
        )
    return table(cells, numeric={1, 2, 3, 4, 6})


def _steps(schedule: RankSchedule) -> str:
    """Scale and step size of each rank; of the lowest and the highest where there are many."""
    told = [f"{rank}: {scale:.4g} ({step:.2f})" for rank, (scale, step) in schedule.steps().items()]
    return ", ".join(told) if len(told) <= MAX_STEPS else f"{told[0]} … {told[-1]}"


def _training(run: RunData, comparison: Comparison) -> str:
    plots = []
    if any(trial.train_losses for trial in run.trials):
        caption = (
            "Training loss, the mean over a global batch's supervised tokens: mean over seeds, then a running mean "
            "over a twentieth of the curve."
        )
        if any(len(trial.validation_losses) > 1 for trial in run.trials):
            caption += " Crosses are validation losses on the way; a ring is at the step whose weights were kept."
        if any(trial.moves for trial in run.trials):
            caption += " Two triangles are the validation loss before and after ranks moved: hollow, then full."
        plots.append(plot(figures.loss_curves(run.trials), caption, "Training loss"))
    measured = [row for row in comparison.rows if row.loss.measured]
    losses = {row.name: row.loss for row in measured if not row.seedless}
    if losses:
        untrained = "; ".join(f"{row.name} has {row.loss.show()}" for row in measured if row.seedless)
        when = "with the weights that were kept" if any(t.kept_step for t in run.trials) else "after the last step"
        caption = f"Loss on the validation records {when}, with its interval; rings are single seeds."
        caption += f" Without training, {untrained}." if untrained else ""
        figure = figures.value_dots(losses, "validation loss (nats a token)")
        plots.append(plot(figure, caption, "Validation loss"))
    return grid(plots) if plots else missing("No trial has finished, so there are no losses.")


def _configuration(run: RunData) -> str:
    parts = []
    for name, text in (
        ("config.yaml", run.config),
        ("environment.json", json.dumps(run.environment, indent=2) if run.environment else ""),
    ):
        if text:
            parts.append(fold(name, f"<pre>{escape(text)}</pre>"))
        else:
            parts.append(missing(f"The folder has no {name}."))
    return "".join(parts)


def _stages(run: RunData) -> Stages | None:
    """The stages that the profile's layers were put in: those of the first schedule that has any."""
    return next(
        (
            s.stages
            for s in run.schedules
            if s.stages and run.profile and s.graph.n_layers == run.profile.graph.n_layers
        ),
        None,
    )


def _config(run: RunData) -> dict[str, Any]:
    try:
        config = parse_yaml(run.config, "config.yaml")
    except FileError:  # the text is shown as it is; only the summary goes without
        return {}
    return config if isinstance(config, dict) else {}


def _part(config: dict[str, Any], section: str, keys: Sequence[str]) -> dict[str, Any]:
    values = config.get(section)
    return {key: values[key] for key in keys if key in values} if isinstance(values, dict) else {}


def _model(run: RunData) -> str:
    model = _config(run).get("model")
    return str(model) if model else run.profile.graph.name if run.profile else run.folder.name


def _brief(value: Any) -> str:
    """A configuration value in a line: mappings as "key value", nothing as nothing."""
    if value is None:
        return ""
    if isinstance(value, dict):
        texts = {key: _brief(item) for key, item in value.items()}
        return ", ".join(f"{key.replace('_', ' ')} {text}" for key, text in texts.items() if text)
    return ", ".join(map(_brief, value)) if isinstance(value, list) else str(value)


def _unbroken(text: str) -> str:
    """Escaped text in which lines break neither before a unit nor around "±"."""
    return escape(text).replace(" %", "\u00a0%").replace(" ± ", "\u00a0±\u00a0")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"

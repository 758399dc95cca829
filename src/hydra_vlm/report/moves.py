"""How ranks moved while training, as a section of the page: every decision, a film of the ranks, what was cut."""

import math
from collections.abc import Sequence
from html import escape
from statistics import fmean

from hydra_vlm.moving.plan import Move
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.figures import rank_map, rank_reach, symbol
from hydra_vlm.report.markup import film, fold, missing, plot, table
from hydra_vlm.report.move_figures import frames, probes_figure, spectrum_figure
from hydra_vlm.report.run import best_moved

MAX_FILMS = 3
"""Trial names whose ranks are shown moving; those of further names are in the table only."""


def moves_section(trials: Sequence[TrialRecord]) -> str:
    """Decisions of all trials in a table, then the best trial of each name in pictures; empty where no rank moved."""
    moved = [trial for trial in trials if trial.moves]
    if not moved:
        return ""
    note = (
        "Training began wider than the budget, and each decision gave every projection a new rank. Both validation "
        "losses are of the same weights, as they were and cut to the new ranks, before any further step."
    )
    shown = best_moved(moved)[:MAX_FILMS]
    choice = "Shown below, of each name, is the trial with the lowest validation loss." if len(moved) > 1 else ""
    pictures = "".join(_pictures(trial) for trial in shown)
    return (
        f'{table(_decisions(moved), numeric={1, *range(5, 10)})}<p class="note">{escape(note)} {choice}</p>{pictures}'
    )


def _decisions(trials: Sequence[TrialRecord]) -> list[list[str]]:
    head = ["trial", "after step", "decided by", "ranks", "LoRA parameters"]
    cells = [[*head, "loss before", "loss after", "change", "probed", "seconds"]]
    for trial in trials:
        for move in trial.moves:
            cells.append(
                [
                    f"{trial.name}, seed {trial.seed}",
                    f"{move.step:,}",
                    move.decider,
                    f"{_reach(move.before)} → {_reach(move.after.ranks)}",
                    f"{move.after.graph.parameters(move.before):,} → {move.after.parameters:,}",
                    _loss(move.loss_before),
                    _loss(move.loss_after),
                    _change(move),
                    str(len(move.probed)) if move.probed else "–",
                    f"{move.seconds:.1f}",
                ]
            )
    return cells


def _pictures(trial: TrialRecord) -> str:
    strip = frames(trial)
    reach = rank_reach(strip)
    caption = (
        "The rank of every projection at the start and after each decision. Grey is uniform LoRA's rank on the budget "
        "that the training ended with, blue more, orange less; raised is the step size where it is not uniform LoRA's."
    )
    parts = [
        f"<h3>{escape(trial.name)}, seed {trial.seed}</h3>",
        film([plot(rank_map(frame, reach), f"{frame.parameters:,} LoRA parameters", frame.name) for frame in strip]),
        f'<p class="note">{caption}</p>',
    ]
    cut = (
        "Singular values of each projection's update, weighted by the inputs that its layer reads: blue ones were "
        "kept, red ones cut. Projections stand by component, within it from the first layer to the last."
    )
    for number, move in enumerate(trial.moves):
        parts += [_spectrum(move, cut if number == 0 else ""), _probes(move)]
    return "".join(parts)


def _spectrum(move: Move, caption: str) -> str:
    title = f"What {move.decider} cut after step {move.step:,}"
    if not any(value > 0 for found in move.spectra for value in found):
        return missing(f"{title}: no update had grown above zero by then.")
    return plot(spectrum_figure(move), caption, title)


def _probes(move: Move) -> str:
    if not move.probed:
        return ""
    graph = move.after.graph
    caption = (
        f"Validation loss of {len(move.probed)} schedules by forward passes alone, the wide adapter cut to each, "
        f"on a sample of the validation records where there are many; {move.passes:,} records went forward "
        "for this decision."
    )
    cells = [["probe", "validation loss", "LoRA parameters", "ranks", *(f"mean {symbol(c)}" for c in graph.components)]]
    chosen = [n for n, (ranks, _) in enumerate(move.probed) if ranks == move.after.ranks][:1]
    for number, (ranks, loss) in enumerate(move.probed, start=1):
        means = (
            fmean(rank for rank, p in zip(ranks, graph.projections, strict=True) if p.component == component)
            for component in graph.components
        )
        counted = f"{graph.parameters(ranks):,}"
        cells.append([str(number), _loss(loss), counted, _reach(ranks), *(f"{mean:.1f}" for mean in means)])
    numbers = table(cells, numeric={0, 1, 2, *range(4, len(cells[0]))}, marked=chosen)
    figure = plot(probes_figure(move), caption, f"What was probed after step {move.step:,}")
    return figure + fold("Every probe, the chosen one in bold", numbers)


def _reach(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}–{high}"


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "–"


def _change(move: Move) -> str:
    if not (math.isfinite(move.loss_before) and math.isfinite(move.loss_after) and move.loss_before > 0):
        return "–"
    return f"{100 * (move.loss_after / move.loss_before - 1):+.1f} %".replace("-", "−")

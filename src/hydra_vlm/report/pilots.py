"""What each trial's pilot tried, and which rates won, as a section of the page."""

import math
from collections.abc import Sequence
from html import escape

from hydra_vlm.pilot.candidates import TIE, Pilot, Tried
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.markup import fold, table

MAX_OPEN = 4
"""Of more tables than these, each is folded into one line."""


def pilots_section(trials: Sequence[TrialRecord]) -> str:
    """A table for each trial with a pilot; empty without one."""
    piloted = [(trial, trial.pilot) for trial in trials if trial.pilot]
    if not piloted:
        return ""
    note = (
        "Each candidate is the beginning of the whole run, cooled on a copy that is thrown away and measured there. "
        f"Losses within {100 * TIE:.0f} % of the lowest count as equal, and of those the lowest rates win; the run "
        "goes on from the winner's own steps."
    )
    open_ = len(piloted) <= MAX_OPEN
    tables = (fold(_headline(trial, pilot), _table(pilot), open_) for trial, pilot in piloted)
    return f'<p class="note">{escape(note)}</p>' + "".join(tables)


def _headline(trial: TrialRecord, pilot: Pilot) -> str:
    steps = trial.train_losses[-1][0] if trial.train_losses else 0
    share = f" beside the run's {steps:,}" if steps else ""
    return (
        f"{trial.name}, seed {trial.seed}: {pilot.chosen.text}, the best of {len(pilot.tried)}; "
        f"{pilot.thrown_away:,} steps thrown away{share}"
    )


def _table(pilot: Pilot) -> str:
    cells = [["rate of A", "B's ratio", "rate of the projector", "validation loss", "steps", "outcome"]]
    won = [number for number, one in enumerate(pilot.tried) if one.rates == pilot.chosen][:1]
    lowest = pilot.tried[won[0]].loss if won else math.nan
    for number, one in enumerate(pilot.tried):
        rates = (one.rates.learning_rate, one.rates.b_ratio, one.rates.projector_learning_rate)
        loss = f"{one.loss:.4f}" if math.isfinite(one.loss) else "–"
        outcome = "won" if number in won else _outcome(one, lowest)
        cells.append([*("–" if rate is None else f"{rate:g}" for rate in rates), loss, str(one.steps), outcome])
    return table(cells, numeric={0, 1, 2, 3, 4}, marked=won)


def _outcome(one: Tried, won: float) -> str:
    if not math.isfinite(one.loss):
        return "ended early: its loss doubled or was no number"
    return "tied, at higher rates" if one.loss <= won else ""

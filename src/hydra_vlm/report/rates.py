"""Learning rates by part: which of them a trial used, and in which of them trials differ."""

from collections.abc import Collection, Mapping, Sequence

from hydra_vlm.records import TrialRecord

RATES_DIFFER = "Peak learning rates, where trials differ in them"
"""Stands over a table of `differing_rates`."""

NAMES = {"a": "A", "b": "B", "projector": "projector", "tower_a": "tower's A", "tower_b": "tower's B"}


def own_rates(trial: TrialRecord) -> dict[str, float]:
    """The learning rates of what the trial trained: not every one trains a projector, or LoRA in the tower."""
    trained = {*trial.trained, *(dict(trial.schedule.graph.parts) if trial.schedule else ())}
    needs = {"projector": "projector", "tower_a": "tower", "tower_b": "tower"}
    return {part: rate for part, rate in trial.learning_rates.items() if part not in needs or needs[part] in trained}


def differing_rates(by_name: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    """Header and rows: trial name, its rate for each part in which any two trials differ; empty where none do.

    `by_name` holds the rates by part of each trial of a name.
    """
    found = {
        part: {name: {rates[part] for rates in trials if part in rates} for name, trials in by_name.items()}
        for part in dict.fromkeys(part for trials in by_name.values() for rates in trials for part in rates)
    }
    differing = [part for part, rates in found.items() if len(set().union(*rates.values())) > 1]
    rows = [[name, *(_span(found[part][name]) for part in differing)] for name in by_name]
    return [["schedule", *(NAMES.get(part, part) for part in differing)], *rows] if differing else []


def _span(rates: Collection[float]) -> str:
    """One rate, or the lowest and the highest of several."""
    ends = dict.fromkeys(f"{rate:.3g}" for rate in ((min(rates), max(rates)) if rates else ()))
    return " to ".join(ends) or "–"

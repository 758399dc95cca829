"""Every trial of a run against a baseline, each number with its interval, in words, as a table, as JSON.

Differences are paired by seed, with a t interval from three common seeds on; below that they are paired by
question (bootstrap over the verdicts). A trial that trained nothing meets the baseline at every seed.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from hydra_vlm.errors import RunFolderError
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.rates import RATES_DIFFER, differing_rates, own_rates
from hydra_vlm.report.run import RunData
from hydra_vlm.report.series import Series, group_scores, losses, scores, with_average
from hydra_vlm.report.statistics import Interval

_QUESTIONS = re.compile(r"over ([\d,]+) questions")


@dataclass(frozen=True)
class Measure:
    """One number of one trial: its mean over seeds, and its paired difference to the baseline, if any.

    `by_seed` holds what the mean is over; `unit` is "%" or empty.
    """

    value: Interval
    difference: Interval | None
    by_seed: Mapping[int, float]
    unit: str = ""
    lower_is_better: bool = False

    @property
    def measured(self) -> bool:
        """Whether there is a number at all: no validation file, no loss."""
        return math.isfinite(self.value.mean)

    @property
    def verdict(self) -> str:
        """What the difference to the baseline amounts to, in words; empty without one."""
        if self.difference is None:
            return ""
        apart = self.difference.excludes_zero
        if apart is None:
            return "no interval, so noise unknown"
        if not apart:
            return "not distinguishable from zero"
        better = (self.difference.mean > 0) != self.lower_is_better
        noise = "" if self.difference.over == "seeds" else " over questions, seed noise unknown"
        return f"{'better' if better else 'worse'}, larger than the noise{noise}"

    def show(self) -> str:
        """The value with its interval, such as "91.24 ± 0.41 %" or "91.24 % [90.83, 91.65]"."""
        return self.value.show(self.decimals, self.unit)

    def show_difference(self) -> str:
        """The difference with its bounds, such as "+0.83 [-0.10, +1.76]"; empty without one."""
        return "" if self.difference is None else self.difference.show(self.decimals, signed=True)

    @property
    def decimals(self) -> int:
        """Losses are shown to four decimals, scores to two."""
        return 4 if self.lower_is_better else 2

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value.to_json(),
            "difference": self.difference.to_json() if self.difference else None,
            "verdict": self.verdict,
            "unit": self.unit,
            "by_seed": {str(s): v if math.isfinite(v) else None for s, v in self.by_seed.items()},
        }


@dataclass(frozen=True)
class Row:
    """All trials of one name.

    `parameters` counts the LoRA parameters of the adapter, `most_trainable` the most that were trained at a time; of
    both, the largest over seeds, which may differ where ranks moved. `budget` is C (None without a schedule),
    `trained` counts trained parameters by part; `groups` is benchmark → group → measure; `seconds` is the mean over
    trials; `rates` are learning rates by part, for each seed that has them.
    """

    name: str
    seeds: tuple[int, ...]
    parameters: int
    most_trainable: int
    budget: int | None
    trained: Mapping[str, int]
    loss: Measure
    scores: Mapping[str, Measure]
    groups: Mapping[str, Mapping[str, Measure]]
    seconds: float
    rates: Mapping[int, Mapping[str, float]]

    @property
    def used(self) -> float | None:
        """Per cent of the budget that is used; None without a budget."""
        return None if self.budget is None else 100 * self.parameters / self.budget

    @property
    def seedless(self) -> bool:
        """Whether nothing was trained, so that a seed changes nothing."""
        return not any(self.trained.values())

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seeds": list(self.seeds),
            "lora_parameters": self.parameters,
            "most_trainable": self.most_trainable,
            "budget": self.budget,
            "budget_used_percent": self.used,
            "trained": dict(self.trained),
            "validation_loss": self.loss.to_json(),
            "scores": {name: measure.to_json() for name, measure in self.scores.items()},
            "groups": {
                name: {group: measure.to_json() for group, measure in groups.items()}
                for name, groups in self.groups.items()
            },
            "seconds": self.seconds,
            "learning_rates": {str(seed): dict(rates) for seed, rates in self.rates.items()},
        }


@dataclass(frozen=True)
class Comparison:
    """One row for each trial name, held against the row `baseline` (None when the run has no such trial)."""

    baseline: str | None
    benchmarks: tuple[str, ...]
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row:
        """The row of that name; KeyError when there is none."""
        return {row.name: row for row in self.rows}[name]

    @property
    def methods(self) -> tuple[str, ...]:
        """Every interval's label, once."""
        measures = [m for row in self.rows for m in (row.loss, *row.scores.values())]
        intervals = [m.value for m in measures] + [m.difference for m in measures if m.difference]
        return _merged(dict.fromkeys(i.method for i in intervals if i.low is not None))

    def headline(self) -> str:
        """The first finding."""
        return self.findings()[0]

    def findings(self) -> tuple[str, ...]:
        """A sentence for each benchmark, one for the validation loss: of fine, else coarse, else a rival.

        Which schedule speaks is fixed beforehand; picking the best one afterwards would favour luck.
        """
        rivals = [row for row in self.rows if row.budget is not None and row.name != self.baseline]
        if self.baseline is None or not rivals:
            return ("There is nothing to compare yet: that takes a baseline and another schedule.",)
        row = next((r for name in ("fine", "coarse") for r in rivals if r.name == name), rivals[0])
        base = self.row(self.baseline)
        shared = [b for b in self.benchmarks if b in row.scores and b in base.scores]
        pairs = [(f"{b} ", row.scores[b], base.scores[b]) for b in shared]
        if row.loss.measured and base.loss.measured:
            pairs.append(("Validation loss ", row.loss, base.loss))
        seeds = "one seed" if len(row.seeds) == 1 else f"{len(row.seeds)} seeds"
        most = f", {row.most_trainable:,} in training" if row.most_trainable > row.parameters else ""
        start = f"{row.name} at {row.parameters:,} LoRA parameters{most} ({seeds}): "
        if not pairs:
            return (f"{start}neither scores nor a validation loss to hold against {base.name}'s.",)
        return tuple(
            f"{start if i == 0 else ''}{name}{ours.show()} against {base.name}'s {theirs.show()}, "
            f"difference {ours.show_difference() or 'unknown'} — {ours.verdict or 'no common seed'}."
            for i, (name, ours, theirs) in enumerate(pairs)
        )

    def table(self) -> str:
        """Plain text for a terminal: the trials, the differences to the baseline, what the intervals are."""
        rates = self.learning_rates()
        blocks = [aligned(self.overview()), *([f"{RATES_DIFFER}\n{aligned(rates)}"] if rates else [])]
        differences = self.differences() if self.baseline is not None else []
        if len(differences) > 1:
            blocks.append(f"Difference to {self.baseline}, paired\n{aligned(differences)}")
        return "\n\n".join([*blocks, "\n".join(f"Intervals: {method}." for method in self.methods)]).rstrip()

    def overview(self) -> list[list[str]]:
        """Header and rows: trial, seeds, LoRA parameters, the most in training where that is more, budget used,
        validation loss, scores."""
        wide = any(row.most_trainable > row.parameters for row in self.rows)
        most = ["most trainable"] if wide else []
        cells = [["schedule", "seeds", "LoRA parameters", *most, "budget used", "validation loss", *self.benchmarks]]
        for row in self.rows:
            used = "–" if row.used is None else f"{row.used:.2f} %{' OVER' if row.used > 100 else ''}"
            scores = [row.scores[b].show() if b in row.scores else "–" for b in self.benchmarks]
            seeds = "–" if row.seedless else str(len(row.seeds))
            counts = [f"{n:,}" if n else "–" for n in (row.parameters, row.most_trainable)[: 2 if wide else 1]]
            cells.append([row.name, seeds, *counts, used, row.loss.show(), *scores])
        return cells

    def learning_rates(self) -> list[list[str]]:
        """Header and rows: trial, its peak learning rates where trials differ in them; empty where none do."""
        return differing_rates({row.name: tuple(row.rates.values()) for row in self.rows if row.rates})

    def differences(self) -> list[list[str]]:
        """Header and rows: trained trial, what is measured, its difference to the baseline, the verdict."""
        cells = [["schedule", "measure", "difference", "verdict"]]
        for row in self.rows:
            if row.seedless:  # that training helps is not in question
                continue
            measures = {**row.scores, "validation loss": row.loss}
            for name, measure in measures.items():
                if measure.difference is not None:
                    cells.append([row.name, name, measure.show_difference(), measure.verdict])
        return cells

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object."""
        return {
            "baseline": self.baseline,
            "benchmarks": list(self.benchmarks),
            "findings": list(self.findings()),
            "rows": [row.to_json() for row in self.rows],
        }


def compare(run: RunData, baseline: str = "uniform") -> Comparison:
    """Hold every trial name of `run` against the trials called `baseline`.

    Raises RunFolderError when a trial trained another number of LoRA parameters than its schedule has.
    """
    by_name: dict[str, list[TrialRecord]] = {}
    for trial in map(with_average, run.trials):
        by_name.setdefault(trial.name, []).append(trial)
    everything = [trial for trials in by_name.values() for trial in trials]
    benchmarks = tuple(dict.fromkeys(score.benchmark for trial in everything for score in trial.scores))
    rows = tuple(_row(run, trials, by_name.get(baseline, ())) for trials in by_name.values())
    return Comparison(baseline if baseline in by_name else None, benchmarks, rows)


def _row(run: RunData, trials: Sequence[TrialRecord], base: Sequence[TrialRecord]) -> Row:
    first = trials[0]
    against = base if base and base[0].name != first.name else ()
    groups = {score.benchmark: score.groups for trial in trials for score in trial.scores}
    return Row(
        name=first.name,
        seeds=tuple(trial.seed for trial in trials),
        parameters=_lora_parameters(trials),
        most_trainable=max(trial.most_trainable for trial in trials),
        budget=first.schedule.budget if first.schedule else None,
        trained=first.trained,
        loss=_measure(losses(trials), losses(against), lower_is_better=True),
        scores={b: _measure(scores(run, trials, b), scores(run, against, b)) for b in groups},
        groups={
            b: {
                group: _measure(group_scores(run, trials, b, group), group_scores(run, against, b, group))
                for group in names
            }
            for b, names in groups.items()
        },
        seconds=fmean(trial.seconds for trial in trials),
        rates={trial.seed: own_rates(trial) for trial in trials if trial.learning_rates},
    )


def _measure(ours: Series, theirs: Series, lower_is_better: bool = False) -> Measure:
    difference = ours.minus(theirs)
    if difference and not math.isfinite(difference.mean):  # a loss that was not measured, or diverged
        difference = None
    return Measure(ours.interval(), difference, ours.values, ours.unit, lower_is_better)


def _lora_parameters(trials: Sequence[TrialRecord]) -> int:
    counts = {trial.trained.get("lora", 0) for trial in trials}
    planned = {trial.schedule.parameters for trial in trials if trial.schedule}
    apart = any(trial.schedule and trial.schedule.parameters != trial.trained.get("lora", 0) for trial in trials)
    moved = any(trial.moves for trial in trials)  # then each seed has decided for itself
    if apart or (len(counts | planned) > 1 and not moved):
        raise RunFolderError(
            f"the trials called {trials[0].name!r} disagree on LoRA parameters, trained or scheduled: "
            f"{', '.join(f'{count:,}' for count in sorted(counts | planned))}. "
            "One name is one schedule: train them again."
        )
    return max(counts)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """A header, a rule, and rows of text in columns."""
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    rule = ["─" * width for width in widths]
    return "\n".join("  ".join(line).rstrip() for line in [lines[0], rule, *lines[1:]])


def _merged(methods: Iterable[str]) -> tuple[str, ...]:
    """Methods that differ only in the number of questions as one: "over 283 to 350 questions"."""
    alike: dict[str, list[int]] = {}
    for method in methods:
        found = _QUESTIONS.search(method)
        count = int(found[1].replace(",", "")) if found else 0
        alike.setdefault(_QUESTIONS.sub("over {} questions", method), []).append(count)
    spans = {form: f"{min(counts):,} to {max(counts):,}" for form, counts in alike.items() if len(counts) > 1}
    return tuple(form.replace("{}", spans.get(form, f"{counts[0]:,}")) for form, counts in alike.items())

"""What a search found: its best trial, the paired comparison with uniform LoRA, and what all of it cost. No torch."""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hydra_vlm.config import Config
from hydra_vlm.errors import RunFolderError
from hydra_vlm.files import read_value, whole_folder, write_json, write_text
from hydra_vlm.reading import read_json, read_text
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.comparison import Comparison, Measure, compare
from hydra_vlm.report.run import load_run
from hydra_vlm.report.statistics import paired_seed_interval, seed_interval
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.space import Candidate
from hydra_vlm.search.study import (
    BASELINE,
    candidate_of,
    close_storage,
    finished,
    is_baseline,
    load_study,
    open_storage,
    outcome_of,
    summary,
)


@dataclass(frozen=True)
class Best:
    """The best trial of a finished study, and the candidate that it is measured against.

    `name` is what the final runs are called: the trial's number, or uniform where that is the best.
    """

    number: int
    candidate: Candidate
    baseline: Candidate

    @property
    def is_baseline(self) -> bool:
        """Whether nothing that was tried is better than uniform LoRA."""
        return self.candidate.key == self.baseline.key

    @property
    def name(self) -> str:
        return BASELINE if self.is_baseline else f"trial-{self.number}"


def best_of(study: optuna.Study) -> Best:
    """The trial of the greatest value, the first of equal ones.

    Of a Pareto front, the trial whose scores are the best on average, relative to uniform LoRA's.
    Raises RunFolderError when no trial is finished.
    """
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.COMPLETE]
    base = next((trial for trial in done if is_baseline(trial)), None)
    if base is None:
        raise RunFolderError("this search has not finished its uniform-LoRA trial yet: start the same command again")
    if len(study.directions) > 1:
        front = {trial.number for trial in study.best_trials}
        done = [trial for trial in done if trial.number in front]

    def worth(trial: FrozenTrial) -> tuple[float, int]:
        if len(study.directions) == 1:
            return trial.values[0], -trial.number
        kept = outcome_of(trial)
        return Objective().values(kept.scores, outcome_of(base).scores, kept.validation_loss)[0], -trial.number

    best = max(done, key=worth)
    found, against = candidate_of(best), candidate_of(base)
    assert found is not None  # finished trials have one
    assert against is not None
    return Best(best.number, found, against)


@dataclass(frozen=True)
class Findings:
    """The end of a search.

    `objective` holds the final runs' objective, one value for each, with its paired difference to uniform LoRA's; empty
    where uniform LoRA is the best or there are no final runs. Costs are in seconds of one worker.
    """

    best: Best
    trials: tuple[Mapping[str, Any], ...]
    objective: Mapping[str, Measure]
    comparison: Comparison | None
    seconds: Mapping[str, float]
    uniform_seconds: float

    def runs(self, *parts: str) -> float:
        """What these parts of the search cost, in runs of uniform LoRA."""
        return sum(self.seconds[part] for part in parts) / self.uniform_seconds if self.uniform_seconds else math.nan

    def cost(self) -> str:
        """The whole cost in words."""
        done = sum(trial["state"] in ("COMPLETE", "PRUNED") for trial in self.trials)
        return (
            f"The search cost as much as {self.runs('profile', 'trials'):.1f} runs of uniform LoRA (the profile and "
            f"{done} trials), the final comparison {self.runs('final'):.1f} more."
        )

    def verdicts(self) -> tuple[str, ...]:
        """Whether the best schedule differs from uniform LoRA by more than the noise, in words."""
        if self.best.is_baseline:
            return ("No schedule that was tried is better than uniform LoRA in the trials: best/ holds uniform LoRA.",)
        if not self.objective:
            return (f"Trial {self.best.number} is the best of the trials; no final seeds, so noise is unknown.",)
        found = []
        for name, measure in self.objective.items():
            seeds = "one seed" if len(measure.by_seed) == 1 else f"{len(measure.by_seed)} paired seeds"
            found.append(
                f"Trial {self.best.number}, the best of the trials, against uniform LoRA with {seeds}: {name} "
                f"{measure.show_difference() or 'unknown'} — {measure.verdict or 'no difference known'}."
            )
        return tuple(found)

    def table(self) -> str:
        """Plain text for a terminal."""
        lines = [self.comparison.table(), ""] if self.comparison is not None else []
        return "\n".join([*lines, *self.verdicts(), self.cost()])

    def to_json(self) -> dict[str, Any]:
        return {
            "best": {"number": self.best.number, "name": self.best.name, "candidate": self.best.candidate.to_json()},
            "verdicts": list(self.verdicts()),
            "objective": {name: measure.to_json() for name, measure in self.objective.items()},
            "comparison": None if self.comparison is None else self.comparison.to_json(),
            "seconds": dict(self.seconds),
            "uniform_runs": {
                "search": round(self.runs("profile", "trials"), 2),
                "final": round(self.runs("final"), 2),
            },
            "trials": [dict(trial) for trial in self.trials],
        }


def conclude(config: Config, run: Path, storage: str | None = None) -> Findings:
    """Compare the final runs, and write `search.json` and `best/`: the schedule and, of its final runs, an adapter.

    The adapter is that of the final seed of least validation loss (not of the best score, which would choose by the
    test questions), the first seed where there is no validation loss.

    Raises:
        RunFolderError: the search is not done.
    """
    opened = open_storage(run, storage or config.search.storage)
    try:
        study = load_study(run, opened)
        done = len(finished(study.get_trials(deepcopy=False)))
        if done < config.search.trials:
            raise RunFolderError(
                f"the search in {run} has {done} of {config.search.trials} trials finished: start the same command "
                "again to go on"
            )
        best = best_of(study)
        finals = _final_records(run, best, config.search.final_seeds)
        found = _findings(config, run, study, best, finals)
    finally:
        close_storage(opened)
    write_json(run / "search.json", found.to_json())
    _keep_best(run, best, finals.get(best.name, {}))
    return found


Records = Mapping[str, Mapping[int, TrialRecord]]


def _final_records(run: Path, best: Best, seeds: tuple[int, ...]) -> Records:
    """The final runs by name and seed."""
    found: dict[str, dict[int, TrialRecord]] = {}
    for name in dict.fromkeys((BASELINE, best.name)):
        for seed in seeds:
            path = run / "final" / "trials" / f"{name}-seed{seed}" / "record.json"
            if not path.is_file():
                raise RunFolderError(f"{path} is missing, so the search is not done: start the same command again")
            remedy = "remove it and start the same command again, which trains and scores this run anew"
            found.setdefault(name, {})[seed] = read_value(
                path, partial(TrialRecord.from_json, key=path.parent.name), remedy
            )
    return found


def _findings(config: Config, run: Path, study: optuna.Study, best: Best, finals: Records) -> Findings:
    trials = study.get_trials(deepcopy=False)
    base = next(trial for trial in finished(trials) if is_baseline(trial))
    comparison = None
    if finals:
        # A folder of its own, which the trials that chose the schedule do not enter: they were chosen by their luck.
        write_text(run / "final" / "config.yaml", read_text(run / "config.yaml"))
        write_json(run / "final" / "environment.json", read_json(run / "environment.json"))
        kept = {record.key for records in finals.values() for record in records.values()}
        data = load_run(run / "final")
        comparison = compare(replace(data, trials=tuple(trial for trial in data.trials if trial.key in kept)))
    return Findings(
        best=best,
        trials=tuple(summary(trials)),
        objective={} if best.is_baseline or not finals else _objective(config, finals, best.name),
        comparison=comparison,
        seconds={
            "profile": float(study.user_attrs.get("profile_seconds", 0.0)),
            "trials": sum(trial.user_attrs.get("seconds", 0.0) for trial in trials),
            "final": sum(record.seconds for records in finals.values() for record in records.values()),
        },
        uniform_seconds=float(base.user_attrs["seconds"]),
    )


def _objective(config: Config, finals: Records, name: str) -> dict[str, Measure]:
    """The objective of the final runs, with uniform LoRA's mean scores over the final seeds as the baseline."""
    objective = Objective.parse(config.search.objective)
    uniform = finals[BASELINE]
    names = [score.benchmark for score in next(iter(uniform.values())).scores]
    scores = {key: {seed: _scores(record) for seed, record in records.items()} for key, records in finals.items()}
    mean = {benchmark: fmean(found[benchmark] for found in scores[BASELINE].values()) for benchmark in names}

    def series(which: str, position: int) -> dict[int, float]:
        return {
            seed: objective.values(scores[which][seed], mean, record.validation_loss)[position]
            for seed, record in finals[which].items()
        }

    measured = {}
    for position, what in enumerate(objective.names):
        ours, theirs = series(name, position), series(BASELINE, position)
        measured[what] = Measure(seed_interval(list(ours.values())), paired_seed_interval(ours, theirs), ours)
    return measured


def _scores(record: TrialRecord) -> dict[str, float]:
    return {score.benchmark: score.value for score in record.scores}


def _keep_best(run: Path, best: Best, records: Mapping[int, TrialRecord]) -> None:
    shutil.rmtree(run / "best", ignore_errors=True)
    with whole_folder(run / "best") as folder:
        write_json(folder / "schedule.json", replace(best.candidate.schedule, name=best.name).to_json())
        if records:
            measured = {s: r.validation_loss for s, r in records.items() if math.isfinite(r.validation_loss)}
            seed = min(measured, key=lambda s: measured[s]) if measured else min(records)
            source = run / "final" / "trials" / f"{best.name}-seed{seed}" / "adapter"
            shutil.copytree(source, folder / "adapter")

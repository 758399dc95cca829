"""The search in a row: profile, starters, proposals, trials, then the best schedule against uniform LoRA.

Every step leaves a file in the run folder or an attribute in the study, and is skipped when it is there. Any number of
processes may run `work_in` on one folder; each step that must be made once is claimed by one of them. Killed at any
moment and started again with the same command, a search goes on.
"""

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna

from hydra_vlm.config import Config, load_config
from hydra_vlm.errors import ConfigError, StageError
from hydra_vlm.findings import Best, best_of
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.liveness import Watch, claimed, waiting_for
from hydra_vlm.measuring import measure_profile
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.run_folder import RunFolder
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import PhiSettings, starters
from hydra_vlm.search.samplers import Sight, schedule_sampler
from hydra_vlm.search.space import Candidate, Space, Tuning
from hydra_vlm.search.study import (
    BASELINE,
    PREPARED,
    Outcome,
    Progress,
    answering,
    close_storage,
    create_study,
    journal,
    open_storage,
    require_study,
)
from hydra_vlm.search.worker import Plan, work
from hydra_vlm.search_request import check_search, without_password
from hydra_vlm.trials import (
    Say,
    Study,
    prepare_study,
    resolve_budget,
    run_trial,
    scaling_of,
)


def search(config: Config, out: Path, storage: str | None = None, say: Say = print) -> None:
    """Run the whole search in this process, beside whatever workers there are.

    `storage` replaces the configuration's; its password is kept nowhere.
    """
    check_search(config, storage or config.search.storage)
    work_in(config, out, storage, say)


def join(run: Path, storage: str | None = None, say: Say = print) -> None:
    """Work in the search of a run folder until it is done.

    Raises:
        RunFolderError: there is no search in this folder.
    """
    require_study(run)
    work_in(load_config(run / "config.yaml"), run, storage, say)


def work_in(config: Config, out: Path, storage: str | None = None, say: Say = print) -> None:
    """Prepare, run trials until there are enough, then take part in the final runs."""
    url = storage or config.search.storage
    config = without_password(config, url)
    kept = config.search
    with answering(url), ExitStack() as opened:
        storage_here = None
        if url or journal(out).exists():  # first: whether it answers and is sound is known without a model
            storage_here = open_storage(out, url, say)
            opened.callback(close_storage, storage_here)
        study = _prepared(config, out, say)
        objective = Objective.parse(kept.objective)
        objective.check([task.name for task in study.tasks])
        if study.data.validation is None and (kept.pruner != "none" or kept.objective == "loss"):
            raise ConfigError("search.pruner and objective loss read the validation loss: give data.validation")
        storage_here = storage_here or open_storage(out, say=say)
        trials = create_study(out, storage_here, url, objective.n_values, say, pruner=_pruner(kept.pruner))
        trials.set_user_attr(PREPARED, True)
        plan = _plan(study, trials, objective, say)
        settings = PhiSettings(model=kept.model, n_startup=kept.startup)
        trials.sampler = schedule_sampler(kept.sampler, plan.space, kept.seed, objective, settings, kept.parallel)
        work(trials, plan, _Runner(study, say), say)
        run_finals(study, best_of(trials), say)


# What can be wrong


def _check_space(config: Config, graph: ComputationGraph) -> None:
    """Raise what the closed space would raise, before the profile is measured: norms that rise stand in for it."""
    most = max(n for _, n in graph.parts)
    if config.search.n_stages is not None and config.search.n_stages[1] > most:
        raise StageError(
            f"search.n_stages {list(config.search.n_stages)} exceeds the {most} layers that can be told apart",
            nearest=f"Lower it to {most} or less.",
        )
    rising = tuple((p.layer + 1.0, p.layer + 1.0) for p in graph.projections)
    still = tuple((0.0, 0.0) for _ in graph.projections)
    space_of(config, graph, GradientNormProfile(graph, rising, still, steps=2, skipped=1))


# Steps that are made once


def _prepared(config: Config, out: Path, say: Say) -> Study:
    """The model, the data and the run folder, one process after another, since each may write what is missing."""
    if not (out / "config.yaml").is_file():
        study = prepare_study(config, out, say)
    else:
        with waiting_for(out / "claims" / "prepare", Watch(config.search.grace_seconds)):
            study = prepare_study(config, out, say)
    _check_space(config, study.graph)
    return study


def _plan(study: Study, trials: optuna.Study, objective: Objective, say: Say) -> Plan:
    wish, out = study.config.search, study.folder.path
    with waiting_for(out / "claims" / "profile", Watch(wish.grace_seconds)):
        started = time.monotonic()
        is_new = not study.folder.profile.is_file()
        profile = measure_profile(study, say)
        if is_new:
            trials.set_user_attr("profile_seconds", round(time.monotonic() - started, 3))
    space = space_of(study.config, study.graph, profile)
    return Plan(
        run=out,
        space=space,
        objective=objective,
        starters=tuple(starters(space)),
        trials=wish.trials,
        seed=wish.trial_seed,
        grace=wish.grace_seconds,
        prunes=wish.pruner != "none",
        sight=Sight.of(wish.sampler, wish.startup, wish.parallel),
    )


def space_of(config: Config, graph: ComputationGraph, profile: GradientNormProfile) -> Space:
    """The solution space that the configuration asks for."""
    wish, budget = config.search, resolve_budget(graph, config)
    scaling = scaling_of(config).under(graph, budget.parameters)
    around = Tuning.around(config.training.learning_rate, scaling.scale(max(1, budget.rank)))
    return Space(
        graph,
        budget,
        profile,
        open=wish.open,
        tuned=around if wish.tuned else None,
        n_stages=wish.n_stages,
        deltas=wish.deltas,
        scaling=scaling,
    )


def _pruner(name: str) -> optuna.pruners.BasePruner:
    return {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }[name]()


# Runs


class _Runner:
    """Trials of one process, which share its loaded model."""

    def __init__(self, study: Study, say: Say) -> None:
        self.study, self.say = study, say

    def __call__(self, candidate: Candidate, seed: int, folder: Path, progress: Progress) -> Outcome:
        name = folder.name.removesuffix(f"-seed{seed}")
        schedule = replace(candidate.schedule, name=name)
        watch: Any = progress if self.study.config.search.pruner != "none" else None
        try:
            done = run_trial(self.study, name, schedule, seed, self.say, candidate.learning_rate, watch)
        except optuna.TrialPruned:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return Outcome({score.benchmark: score.value for score in done.scores}, done.validation_loss, done.seconds)


def run_finals(study: Study, best: Best, say: Say) -> None:
    """Train the best schedule and uniform LoRA with every final seed, shared with whoever else works here."""
    wish, out = study.config.search, study.folder.path
    final = replace(study, folder=RunFolder(out / "final"))
    pairs = {BASELINE: best.baseline, best.name: best.candidate}
    runs = [(name, candidate, seed) for seed in wish.final_seeds for name, candidate in pairs.items()]
    watch = Watch(wish.grace_seconds)
    while True:
        left = [run for run in runs if not (final.folder.trial(f"{run[0]}-seed{run[2]}") / "record.json").is_file()]
        if not left:
            return
        ran = False
        for name, candidate, seed in left:
            with claimed(out / "claims" / f"{name}-seed{seed}", watch) as mine:
                if mine:
                    schedule = replace(candidate.schedule, name=name)
                    run_trial(final, name, schedule, seed, say, candidate.learning_rate)
                    ran = True
        if not ran:
            time.sleep(min(1.0, watch.interval))

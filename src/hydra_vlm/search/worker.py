"""What a worker does: settle, take up what the dead left, ask for a candidate, run it, store what came of it.

Any number of processes on any number of machines may do so at once, and any of them may be killed at any moment:

- one at a time stands at the desk, where trials are told, taken up and asked for, so that each asks in full sight of
  what the others run;
- a trial belongs to the worker whose heartbeat it carries; when that stops, another one takes the trial over, under the
  same number, and goes on in the same folder;
- a trial that is done is known by its record in that folder, so it is never trained twice.

What a trial tries follows from its number and from the scores of trials before it that are known to it by their
numbers (`samplers.Sight`): a worker waits for those. So the finished trials are those of an undisturbed search of the
same configuration, whoever is killed, however many workers there are and in whichever order they finish. Two things
are outside this promise: a pruner compares a trial with whatever the others have reported by then, and a trial that
fails by an error of its own (which a full disk or a kill is not) is given up for the next number.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hydra_vlm.errors import ConfigError, DataError, DiskFullError, HydraError, RunFolderError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.liveness import Watch, beating, heartbeat, own_id, waiting_for
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.samplers import Sight
from hydra_vlm.search.space import Candidate, Parameter, Space, parameters
from hydra_vlm.search.study import (
    BASELINE,
    Runner,
    baseline_scores,
    candidate_of,
    digest,
    finished,
    is_baseline,
    is_evaluated,
    outcome_of,
    record,
    standing,
)

NOT_ITS_FAULT = (DiskFullError, RunFolderError)
"""What ends a worker and is no fault of the candidate that it runs: no room, a damaged file in its folder."""

PATIENCE = 3
"""So many failures of a worker in a row end it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What all workers of a study agree on.

    `starters` are tried first, and the first of them is the baseline; `trials` is how many are to be finished;
    `seed` is that of every trial's training; `grace` is in seconds; `prunes` lets the study's pruner end trials;
    `sight` is that of the study's sampler.
    """

    run: Path
    space: Space
    objective: Objective
    starters: tuple[Candidate, ...]
    trials: int
    seed: int = 0
    grace: float = 60.0
    prunes: bool = False
    sight: Sight = field(default_factory=Sight)

    def name(self, candidate: Candidate) -> str:
        """What a candidate's trials are called."""
        return BASELINE if candidate.key == self.starters[0].key else digest(candidate)

    def folder(self, candidate: Candidate) -> Path:
        """Where a candidate is trained: the same for whoever does it."""
        return self.run / "trials" / f"{self.name(candidate)}-seed{self.seed}"


class TakenAway(Exception):
    """This worker was silent for too long, and another one has taken its trial up."""


def work(study: optuna.Study, plan: Plan, runner: Runner, say: Say = print) -> None:
    """Run trials until the study has as many finished ones as planned; waits for those of others at the end.

    Raises:
        HydraError: the runner's own, when three trials in a row failed with one.
    """
    watch = Watch(plan.grace)
    failures = 0
    told = False
    while True:
        with ExitStack() as held:
            with waiting_for(plan.run / "claims" / "desk", watch):
                settle(study, plan, say)
                if len(finished(_trials(study))) >= plan.trials:
                    return
                trial = _taken_over(study, plan, watch, say) or _ask(study, plan)
                if trial is not None:
                    trial.set_user_attr("worker", heartbeat())
                    lost = held.enter_context(beating(watch.interval, _beat_of(trial)))
                    candidate = _settled_candidate(study, plan, trial)
            if trial is None:
                told = told or _told_to_wait(study, plan, say)
                time.sleep(min(1.0, watch.interval))
            elif candidate is not None:
                try:
                    _run(study, plan, trial, candidate, runner, lost, say)
                    failures = 0
                except HydraError as problem:
                    failures += 1
                    if failures == PATIENCE or isinstance(problem, NOT_ITS_FAULT):
                        raise


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


def _owner(trial: FrozenTrial) -> str | None:
    shown = trial.user_attrs.get("worker")
    return str(shown.get("id")) if isinstance(shown, dict) else None


def _beat_of(trial: optuna.Trial) -> Callable[[dict[str, Any]], bool]:
    def beat(new: dict[str, Any]) -> bool:
        if _owner(trial.storage.get_trial(trial._trial_id)) != new["id"]:
            return False
        try:
            trial.storage.set_trial_user_attr(trial._trial_id, "worker", new)
        except UpdateFinishedTrialError:
            return False
        return True

    return beat


def _told_to_wait(study: optuna.Study, plan: Plan, say: Say) -> bool:
    """Say that there are more workers than this search's proposals leave room for, if it is so."""
    trials = _trials(study)
    at_once = plan.sight.parallel
    running = sum(trial.state == TrialState.RUNNING for trial in trials)
    too_many = running >= at_once and len(standing(trials)) < plan.trials
    if too_many:
        say(
            f"this worker waits: search.parallel lets {at_once} trials run at once, so that the same ones are proposed "
            "whoever works; start the search with search.parallel=N for N workers"
        )
    return too_many


# At the desk


def settle(study: optuna.Study, plan: Plan, say: Say = print) -> None:
    """Tell every evaluated trial its values, once the baseline's scores are known."""
    trials = _trials(study)
    base = baseline_scores(trials)
    if base is None:
        return
    for trial in trials:
        if trial.state != TrialState.RUNNING or not is_evaluated(trial):
            continue
        outcome = outcome_of(trial)
        try:
            values = plan.objective.values(outcome.scores, base, outcome.validation_loss)
        except DataError as problem:  # the training diverged
            if is_baseline(trial):
                raise
            _fail(study, trial, str(problem))
            say(f"trial {trial.number} failed: {problem}")
            continue
        _tell(study, trial, values)
        shown = ", ".join(f"{value:.4f}" for value in values)
        say(f"trial {trial.number}: objective {shown}, {outcome.seconds:.0f} s")


def _taken_over(study: optuna.Study, plan: Plan, watch: Watch, say: Say) -> optuna.Trial | None:
    """The first trial that nobody runs any more: its worker is dead, gave it back, or died at the desk."""
    for trial in _trials(study):
        if trial.state != TrialState.RUNNING or is_evaluated(trial):
            continue
        asked = candidate_of(trial) is not None
        # Whoever stands at the desk runs nothing, and whoever is chosen a candidate for stands there.
        free = not asked or _owner(trial) in (None, own_id())
        if watch.is_dead(("trial", trial.number), trial.user_attrs.get("worker")) or free:
            if not asked and not _may_propose(plan, _trials(study), trial.number):
                return None
            if asked:
                say(f"trial {trial.number}: its worker is gone, taken up again")
            return optuna.Trial(study, trial._trial_id)
    return None


def _ask(study: optuna.Study, plan: Plan) -> optuna.Trial | None:
    """The next trial: one that waits, or a new one where there is room for it; None until it may be proposed."""
    trials = _trials(study)
    waiting = next((trial for trial in trials if trial.state == TrialState.WAITING), None)
    if waiting is None and len(standing(trials)) >= plan.trials:
        return None
    given = waiting is not None and candidate_of(waiting) is not None
    number = len(trials) if waiting is None else waiting.number
    return study.ask() if given or _may_propose(plan, trials, number) else None


def _may_propose(plan: Plan, trials: Sequence[FrozenTrial], number: int) -> bool:
    """Whether all is known that the trial of this number is chosen by."""
    if _starter(plan, trials, number) is not None:
        return True
    return all(trial.state.is_finished() for trial in trials[: plan.sight.known(number)])


def _starter(plan: Plan, trials: Sequence[FrozenTrial], number: int) -> Candidate | None:
    """What must be tried and was not before this trial: the baseline until it stands, every other starter once."""
    before = trials[:number]
    baseline, *others = plan.starters
    if digest(baseline) not in {_key(trial) for trial in standing(before)}:
        return baseline
    tried = {_key(trial) for trial in before}
    return next((starter for starter in others if digest(starter) not in tried), None)


def _settled_candidate(study: optuna.Study, plan: Plan, trial: optuna.Trial) -> Candidate | None:
    """What a trial is to try, named and stored; None when the trial is one too many and was failed."""
    trials = _trials(study)
    if candidate_of(trials[trial.number]) is None:
        starter = _starter(plan, trials, trial.number)
        if starter is not None:
            trial.set_user_attr("candidate", starter.to_json())
        else:  # the sampler stores what it proposes
            view = study.sampler.infer_relative_search_space(study, trials[trial.number])
            study.sampler.sample_relative(study, trials[trial.number], view)
    settled = optuna.Trial(study, trial._trial_id)  # which knows the candidate
    for parameter in parameters(plan.space):
        _suggest(settled, parameter)
    trials = _trials(study)
    candidate = candidate_of(trials[trial.number])
    if candidate is None:
        raise ConfigError(f"trial {trial.number} has no candidate: the study's sampler is not one of this package's")
    key = digest(candidate)
    # At the desk neither happens; a shared disk's locks may not work.
    others = [other for other in standing(trials) if other.number != trial.number]
    surplus = sum(other.number < trial.number for other in others) >= plan.trials and key != digest(plan.starters[0])
    if surplus or any(_key(other) == key for other in others):
        _fail(study, trial, "surplus" if surplus else "duplicate")
        return None
    trial.set_user_attr("key", key)
    if key == digest(plan.starters[0]):
        trial.set_user_attr("baseline", True)
    return candidate


def _suggest(trial: optuna.Trial, parameter: Parameter) -> None:
    name, low, high = parameter.name, parameter.low, parameter.high
    if parameter.kind == "categorical":
        trial.suggest_categorical(name, parameter.options)
    elif parameter.kind == "int":
        trial.suggest_int(name, int(low), int(high), log=parameter.log)
    else:
        trial.suggest_float(name, low, high, log=parameter.log)


def _key(trial: FrozenTrial) -> str | None:
    """The digest of a trial's candidate; None before it has one."""
    kept = trial.user_attrs.get("key")
    if kept is not None:
        return str(kept)
    candidate = candidate_of(trial)
    return None if candidate is None else digest(candidate)


def _tell(study: optuna.Study, trial: FrozenTrial, values: Sequence[float]) -> None:
    with suppress(UpdateFinishedTrialError):  # another process told the same at the same time
        study.tell(trial.number, values, state=TrialState.COMPLETE, skip_if_finished=True)


def _fail(study: optuna.Study, trial: FrozenTrial | optuna.Trial, reason: str) -> bool:
    """Fail a trial and say why; False when it is finished already."""
    storage = study._storage
    try:
        storage.set_trial_user_attr(trial._trial_id, "reason", reason)
        return storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    except UpdateFinishedTrialError:
        return False


# Away from the desk


def _run(
    study: optuna.Study,
    plan: Plan,
    trial: optuna.Trial,
    candidate: Candidate,
    runner: Runner,
    lost: Event,
    say: Say,
) -> None:
    """Run one trial and store its outcome, or that it was pruned, or why it failed."""
    is_base = candidate.key == plan.starters[0].key
    reported = set(_trials(study)[trial.number].intermediate_values)  # by a worker that had this trial before

    def progress(step: int, validation_loss: float) -> None:
        if lost.is_set():
            raise TakenAway
        if plan.prunes and math.isfinite(validation_loss):
            if step not in reported:
                trial.report(-validation_loss, step)
            if not is_base and trial.should_prune():
                raise optuna.TrialPruned

    folder = plan.folder(candidate)
    started = time.monotonic()
    try:
        try:
            outcome = runner(candidate, plan.seed, folder, progress)
        except Exception:
            if lost.is_set():  # two in one folder disturb each other: what went wrong is no fault of the candidate
                raise TakenAway from None
            raise
        record(trial, outcome, str(folder.relative_to(plan.run)))
    except optuna.TrialPruned:
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        say(f"trial {trial.number}: pruned")
    except (TakenAway, UpdateFinishedTrialError):
        say(f"trial {trial.number}: taken up by another worker, as this one was silent for too long")
    except (Interrupted, *NOT_ITS_FAULT):  # whoever comes next goes on with it
        trial.set_user_attr("worker", None)
        raise
    except Exception as problem:
        _fail(study, trial, str(problem) or type(problem).__name__)
        say(f"trial {trial.number} failed: {problem}")
        raise

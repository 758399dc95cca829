"""What a worker does: settle, take up what the dead left, ask for a candidate, run it, store what came of it.

Any number of processes on any number of machines may do so at once, and any of them may be killed at any moment:

- one at a time stands at the desk, where trials are told, taken up and asked for, so that each asks in full sight of
  what the others run;
- a trial belongs to the worker whose heartbeat it carries; when that stops, the trial is failed and its candidate put
  back, and whoever takes it goes on in the same folder;
- a trial that is done is known by its record in that folder, so a candidate put back is never trained twice.
"""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hydra_vlm.errors import ConfigError, DataError, DiskFullError, HydraError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.liveness import Watch, beating, heartbeat, own_id, waiting_for
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.samplers import distributions, within
from hydra_vlm.search.space import Candidate, Parameter, Space, parameters
from hydra_vlm.search.study import (
    BASELINE,
    LOST,
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

PATIENCE = 3
"""So many failures of a worker in a row end it."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """What all workers of a study agree on.

    `starters` are tried first, and the first of them is the baseline; `trials` is how many are to be finished;
    `seed` is that of every trial's training; `grace` is in seconds; `prunes` lets the study's pruner end trials.
    """

    run: Path
    space: Space
    objective: Objective
    starters: tuple[Candidate, ...]
    trials: int
    seed: int = 0
    grace: float = 60.0
    prunes: bool = False

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
    while True:
        with ExitStack() as held:
            with waiting_for(plan.run / "claims" / "desk", watch):
                settle(study, plan, say)
                reclaim(study, watch, say)
                refill(study, plan)
                if len(finished(_trials(study))) >= plan.trials:
                    return
                trial = _ask(study, plan)
                if trial is not None:
                    trial.set_user_attr("worker", heartbeat())
                    lost = held.enter_context(beating(watch.interval, _beat_of(trial)))
                    candidate = _settled_candidate(study, plan, trial)
            if trial is None:
                time.sleep(min(1.0, watch.interval))
            elif candidate is not None:
                try:
                    _run(study, plan, trial, candidate, runner, lost, say)
                    failures = 0
                except HydraError as problem:
                    failures += 1
                    if failures == PATIENCE or isinstance(problem, DiskFullError):
                        raise


def _trials(study: optuna.Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False)


def _beat_of(trial: optuna.Trial) -> Callable[[dict[str, Any]], bool]:
    def beat(new: dict[str, Any]) -> bool:
        try:
            trial.storage.set_trial_user_attr(trial._trial_id, "worker", new)
        except UpdateFinishedTrialError:
            return False
        return True

    return beat


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


def reclaim(study: optuna.Study, watch: Watch, say: Say = print) -> None:
    """Fail the running trials whose worker is dead, and put their candidates back."""
    for trial in _trials(study):
        if trial.state != TrialState.RUNNING or is_evaluated(trial):
            continue
        shown = trial.user_attrs.get("worker")
        # Whoever stands at the desk runs nothing, so a trial of its own is one that it was interrupted in.
        own = isinstance(shown, dict) and shown.get("id") == own_id()
        if not (own or watch.is_dead(("trial", trial.number), shown)):
            continue
        if _fail(study, trial, LOST):
            say(f"trial {trial.number}: its worker is gone, taken up again")
            _put_back(study, trial)


def refill(study: optuna.Study, plan: Plan) -> None:
    """Put in the queue what must be tried and is not in the study: the baseline, starters, what a killed worker left.

    Whoever is killed between failing a trial and putting its candidate back leaves that to the next.
    """
    trials = _trials(study)
    present = {_key(trial) for trial in standing(trials)}
    room = plan.trials - len(standing(trials))
    baseline, *others = plan.starters
    if digest(baseline) not in present:
        _enqueue(study, plan, baseline, baseline=True)
        present.add(digest(baseline))
        room -= 1
    continued = {trial.user_attrs.get("retry_of") for trial in trials}
    for trial in trials:
        left = trial.state == TrialState.FAIL and trial.user_attrs.get("reason") == LOST
        if left and room > 0 and trial.number not in continued and _key(trial) not in {None, *present}:
            _put_back(study, trial)
            present.add(_key(trial))
            room -= 1
    tried = {_key(trial) for trial in trials} | present
    for starter in others:
        if room > 0 and digest(starter) not in tried:
            _enqueue(study, plan, starter)
            room -= 1


def _ask(study: optuna.Study, plan: Plan) -> optuna.Trial | None:
    """The next trial: one that waits, or a new one where there is room for it."""
    counted = standing(_trials(study))
    if len(counted) < plan.trials or any(trial.state == TrialState.WAITING for trial in counted):
        return study.ask()
    return None


def _settled_candidate(study: optuna.Study, plan: Plan, trial: optuna.Trial) -> Candidate | None:
    """What a trial is to try, named and stored; None when the trial is one too many and was failed."""
    for parameter in parameters(plan.space):
        _suggest(trial, parameter)  # the sampler proposes at the first of them, and stores what it proposes
    trials = {t.number: t for t in _trials(study)}
    candidate = candidate_of(trials[trial.number])
    if candidate is None:
        raise ConfigError(f"trial {trial.number} has no candidate: the study's sampler is not one of this package's")
    key = digest(candidate)
    trial.set_user_attr("key", key)
    before = [t for number, t in trials.items() if number < trial.number and t.state != TrialState.FAIL]
    # At the desk neither happens; where a shared disk's locks do not work, the lower number wins.
    if any(_key(t) == key for t in before):
        _fail(study, trial, "duplicate")
        return None
    if len(before) >= plan.trials and not is_baseline(trials[trial.number]):
        _fail(study, trial, "surplus")
        return None
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


def _enqueue(study: optuna.Study, plan: Plan, candidate: Candidate, baseline: bool = False) -> None:
    attributes: dict[str, Any] = {"candidate": candidate.to_json(), "key": digest(candidate)}
    if baseline:
        attributes["baseline"] = True
    study.enqueue_trial(within(distributions(plan.space), candidate.values), user_attrs=attributes)


def _put_back(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue the candidate of a lost trial; one that had none yet is simply asked for anew."""
    if trial.user_attrs.get("candidate") is None:
        return
    kept: dict[str, Any] = {k: v for k, v in trial.user_attrs.items() if k in ("candidate", "key", "baseline")}
    params = trial.system_attrs.get("fixed_params") or trial.params
    study.enqueue_trial(dict(params), user_attrs={**kept, "retry_of": trial.number})


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

    def progress(step: int, validation_loss: float) -> None:
        if lost.is_set():
            raise TakenAway
        if plan.prunes and math.isfinite(validation_loss):
            trial.report(-validation_loss, step)
            if not is_base and trial.should_prune():
                raise optuna.TrialPruned

    folder = plan.folder(candidate)
    started = time.monotonic()
    try:
        outcome = runner(candidate, plan.seed, folder, progress)
        record(trial, outcome, str(folder.relative_to(plan.run)))
    except optuna.TrialPruned:
        trial.set_user_attr("seconds", round(time.monotonic() - started, 3))
        study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
        say(f"trial {trial.number}: pruned")
    except (TakenAway, UpdateFinishedTrialError):
        say(f"trial {trial.number}: taken up by another worker, as this one was silent for too long")
    except (Interrupted, DiskFullError):  # no fault of the candidate: whoever comes next goes on with it
        _fail(study, trial, LOST)
        raise
    except Exception as problem:
        _fail(study, trial, str(problem) or type(problem).__name__)
        say(f"trial {trial.number} failed: {problem}")
        raise

"""Optuna samplers over a solution space: Φ, and its rivals TPE, Gaussian process, random and evolution (NSGA-II).

One sampler class serves all. Whatever names the values, the trial's candidate is inside the space, is none that another
trial of the study has, and stands as it is in the trial's user attribute `candidate`, which is what is to be run; the
trial's parameters are the candidate's own choices. Every draw follows from the seed and the trial's number, and what is
known of other trials from their numbers (`Sight`), so that the same trials are proposed whichever workers ask, however
fast they are and whichever of them are killed.
"""

import copy
import difflib
import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hydra_vlm.errors import ConfigError, GraphMismatchError
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import DEFAULT, Key, Observation, PhiSettings, propose, starters, unseen
from hydra_vlm.search.proposals import sample
from hydra_vlm.search.space import Candidate, Parameter, Space, Value, candidate, parameters
from hydra_vlm.search.study import baseline_scores, candidate_of, is_evaluated

SAMPLERS = ("phi", "tpe", "gp", "random", "evolution")

TRIES = 10
"""How often a rival is asked when it names candidates that are taken; a Gaussian process, which takes long, COSTLY."""

COSTLY = 2

POPULATION = 8
"""Of NSGA-II: Optuna's 50 would be random search for as many trials as most searches have."""


@dataclass(frozen=True)
class Sight:
    """Whose scores a proposal knows, by trial numbers alone, never by who happens to have finished.

    Trials before `startup` are proposed without any (None: all trials). A later one knows the scores of all trials
    before it but the last `parallel` - 1, which may run beside it, and waits for them.
    """

    startup: int | None = 0
    parallel: int = 1

    @classmethod
    def of(cls, sampler: str, startup: int, parallel: int = 1) -> "Sight":
        """A sampler's, by its name in SAMPLERS."""
        return cls({"random": None, "evolution": POPULATION}.get(sampler, startup), parallel)

    def known(self, number: int) -> int:
        """Of how many trials, from the first, this one knows the scores."""
        return 0 if self.startup is None or number < self.startup else max(0, number + 1 - self.parallel)


@dataclass(frozen=True)
class Known:
    """The trials before one, as far as they count: scores, what may run beside it, and what is taken."""

    finished: tuple[Observation, ...]
    running: tuple[Candidate, ...]
    taken: frozenset[Key]
    baseline: Mapping[str, float] | None


View = dict[str, BaseDistribution]

Proposer = Callable[[Study, FrozenTrial, Known, int], Candidate]
"""The study as this trial sees it, the trial, what is known, and a seed -> a candidate, best one that is new."""


class ScheduleSampler(BaseSampler):
    """Proposes candidates of a space that no other trial of the study has, whatever `proposer` names them.

    A trial that comes with its `candidate` (an enqueued one) keeps it. A proposer that names a taken candidate is asked
    up to `tries` times, with other seeds, before small steps lead away from what it named.
    """

    def __init__(self, space: Space, proposer: Proposer, sight: Sight, seed: int, tries: int = TRIES) -> None:
        self.space = space
        self.proposer = proposer
        self.sight = sight
        self.seed = seed
        self.tries = tries
        self.view = distributions(space)
        self._uniform = starters(space)[0].key
        self._read: dict[int, Candidate] = {}
        self._study: tuple[object, int] | None = None

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """A trial that comes with its candidate is of a generation as others are, where there are generations."""
        if isinstance(self.proposer, _Rival) and candidate_of(trial) is not None:
            self.proposer.join(study, trial)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> View:
        """All parameters of the space."""
        return dict(self.view)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: View) -> dict[str, Any]:
        """The values of a new candidate, which is stored in the trial.

        Raises ConfigError when the space holds no candidate that is not taken.
        """
        found = candidate_of(trial)
        if found is None:
            found = self._new(study, trial)
            study._storage.set_trial_user_attr(trial._trial_id, "candidate", found.to_json())
        return within(self.view, found.values)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Raises ConfigError: every parameter of the space is sampled with the others."""
        raise ConfigError(
            f"{param_name!r} with {param_distribution} is no parameter of this search's space: ask for its trials with "
            "the distributions of the space."
        )

    def _new(self, study: Study, trial: FrozenTrial) -> Candidate:
        known = self._known(study, trial)
        for attempt in range(self.tries):
            found = self.proposer(study, trial, known, derived(self.seed, trial.number, attempt))
            if found.key not in known.taken:
                return found
        return unseen(self.space, found, known.taken, random.Random(derived(self.seed, trial.number, self.tries)))

    def _known(self, study: Study, trial: FrozenTrial) -> Known:
        if self._study != (study._storage, study._study_id):
            self._read, self._study = {}, (study._storage, study._study_id)
        n_known = self.sight.known(trial.number)
        told: list[FrozenTrial] = []
        finished, running, taken = [], [], set()
        for one in _before(study, trial):
            found = self._candidate(one)
            if found is None:
                continue
            taken.add(found.key)
            if one.number >= n_known or one.state in (TrialState.RUNNING, TrialState.WAITING):
                running.append(found)  # even one that has failed by now: another time it may do so later
            elif one.state != TrialState.FAIL and is_evaluated(one):
                told.append(one)
                finished.append(_observation(one, found))
        baseline = baseline_scores(told) or next((one.scores for one in finished if self._is_uniform(one)), None)
        return Known(tuple(finished), tuple(running), frozenset(taken), baseline)

    def _is_uniform(self, one: Observation) -> bool:
        return one.candidate.key == self._uniform

    def _candidate(self, trial: FrozenTrial) -> Candidate | None:
        """What a trial tries; read once, since it never changes."""
        if trial.number not in self._read:
            found = candidate_of(trial)
            if found is None:
                return None
            difference = found.schedule.graph.difference(self.space.graph)
            if difference is not None:
                raise GraphMismatchError(
                    f"trial {trial.number} of the study is of another model: {difference}. One study serves one model."
                )
            # One graph for all of them, so that they are known to be of one without a look at it.
            schedule = replace(found.schedule, graph=self.space.graph)
            self._read[trial.number] = replace(found, schedule=schedule)
        return self._read[trial.number]


def _observation(trial: FrozenTrial, found: Candidate) -> Observation:
    loss = trial.user_attrs.get("loss")
    return Observation(found, trial.user_attrs["scores"], float("nan") if loss is None else float(loss))


def _before(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """The trials of lower numbers, those included that a pruner would leave out."""
    trials = study._storage.get_all_trials(study._study_id, deepcopy=False)
    return sorted((one for one in trials if one.number < trial.number), key=lambda one: one.number)


def schedule_sampler(
    name: str,
    space: Space,
    seed: int,
    objective: Objective,
    settings: PhiSettings = DEFAULT,
    parallel: int = 1,
) -> ScheduleSampler:
    """A sampler of SAMPLERS by name; `objective` and `settings` are read by Φ, `n_startup` by TPE and the GP as well.

    `parallel`: see `Sight`.

    Raises ConfigError for an unknown name, naming the nearest.
    """
    rivals: dict[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=settings.n_startup),
        "gp": lambda seed: GPSampler(seed=seed, n_startup_trials=settings.n_startup, warn_independent_sampling=False),
        "evolution": lambda seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    }
    sight = Sight.of(name, settings.n_startup, parallel)
    if name in rivals:
        rival = _Rival(space, rivals[name], sight)
        return ScheduleSampler(space, rival, sight, seed, COSTLY if name == "gp" else TRIES)
    if name == "random":
        return ScheduleSampler(space, lambda _, __, ___, seed: sample(space, random.Random(seed)), sight, seed)
    if name == "phi":
        return ScheduleSampler(space, _Phi(space, objective, settings), sight, seed)
    near = difflib.get_close_matches(name, SAMPLERS, 1, 0.0)[0]
    raise ConfigError(f"no sampler is called {name!r}: use one of {', '.join(SAMPLERS)}. Did you mean {near!r}?")


@dataclass(frozen=True)
class _Phi:
    """Φ names a new candidate by itself."""

    space: Space
    objective: Objective
    settings: PhiSettings

    def __call__(self, study: Study, trial: FrozenTrial, known: Known, seed: int) -> Candidate:
        return propose(
            self.space, known.finished, known.running, self.objective, known.baseline, self.settings, seed, known.taken
        )


@dataclass(frozen=True)
class _Rival:
    """A sampler of Optuna's over the named parameters, made anew with each seed so that it keeps no state."""

    space: Space
    made: Callable[[int], BaseSampler]
    sight: Sight

    def __call__(self, study: Study, trial: FrozenTrial, known: Known, seed: int) -> Candidate:
        whole = distributions(self.space)
        view = {name: distribution for name, distribution in whole.items() if not distribution.single()}
        inner = self.made(seed)
        past, here = self._past(study, trial)
        values = inner.sample_relative(past, here, view) if view else {}
        for name, distribution in view.items():  # what the sampler leaves to chance: its start, and mutations
            if name not in values:
                values[name] = inner.sample_independent(past, here, name, distribution)
        values.update({name: _only(distribution) for name, distribution in whole.items() if distribution.single()})
        _keep_generation(study, trial, past)
        return candidate(self.space, values)

    def join(self, study: Study, trial: FrozenTrial) -> None:
        """Give a trial that was not proposed here its place in a generation."""
        inner = self.made(0)
        if isinstance(inner, NSGAIISampler):
            past, here = self._past(study, trial)
            inner.get_trial_generation(past, here)
            _keep_generation(study, trial, past)

    def _past(self, study: Study, trial: FrozenTrial) -> tuple[Study, FrozenTrial]:
        """A study in memory of the trials before this one, and itself; what it may not know runs in it."""
        storage = InMemoryStorage()
        past = Study(storage.get_study_name_from_id(storage.create_new_study(study.directions)), storage)
        n_known = self.sight.known(trial.number)
        for one in [*_before(study, trial), trial]:
            seen = copy.copy(one)
            seen.user_attrs = {}  # the candidate is large, and none of Optuna's samplers reads it
            if one.number >= n_known:
                seen.state, seen.values, seen.datetime_complete, seen.intermediate_values = (
                    TrialState.RUNNING,
                    None,
                    None,
                    {},
                )
            storage.create_new_trial(past._study_id, template_trial=seen)
        return past, past.get_trials(deepcopy=False)[-1]


def _keep_generation(study: Study, trial: FrozenTrial, past: Study) -> None:
    """Store what a sampler has noted about a trial of the study in memory."""
    for key, value in past.get_trials(deepcopy=False)[-1].system_attrs.items():
        if trial.system_attrs.get(key) != value:
            study._storage.set_trial_system_attr(trial._trial_id, key, value)
            trial.system_attrs[key] = value


def derived(*of: int) -> int:
    """A seed of 31 bits that follows from integers."""
    digest = hashlib.sha256(",".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % 2**31


# The flat view in Optuna's terms


def distributions(space: Space) -> View:
    """The parameters of a space as Optuna's distributions, to ask for trials with."""
    return {parameter.name: _distribution(parameter) for parameter in parameters(space)}


def _distribution(parameter: Parameter) -> BaseDistribution:
    match parameter.kind:
        case "categorical":
            return CategoricalDistribution(parameter.options)
        case "int":
            return IntDistribution(int(parameter.low), int(parameter.high))
        case "float":
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _only(distribution: BaseDistribution) -> Value:
    if isinstance(distribution, IntDistribution | FloatDistribution):
        return distribution.low
    assert isinstance(distribution, CategoricalDistribution)
    return str(distribution.choices[0])


def within(view: View, values: Mapping[str, Value]) -> dict[str, Value]:
    """A candidate's values as Optuna takes them: ranks of an open space may lie above the range that is asked for."""
    found: dict[str, Value] = {}
    for name, distribution in view.items():
        value = values[name]
        if isinstance(distribution, IntDistribution):
            found[name] = min(max(int(value), distribution.low), distribution.high)
        elif isinstance(distribution, FloatDistribution):
            found[name] = min(max(float(value), distribution.low), distribution.high)
        else:
            found[name] = value
    return found

"""Searchers on the table, each a generator: it yields the place of a candidate and is sent the run that was seen.

All start with uniform LoRA. Φ goes on with those of HyDRA's own schedules that the table holds, as every search with
it does, then chooses by `search.phi.choose`; random takes the schedules as they come. Optuna's samplers are asked
over the named parameters of the space and are told the schedule that they got in its place: TPE and evolution the
unseen one nearest to what they name, the Gaussian process the unseen one of largest expected improvement by its own
model (its search over all schedules would take many seconds a proposal). Where they draw at random, at the start and
in evolution's first generation, any unseen schedule is as likely: the nearest to a random point of many dimensions
nearly always is one of the few central ones.
"""

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial

from hydra_vlm.rankbench.ground import TableGround
from hydra_vlm.rankbench.table import FloatArray
from hydra_vlm.search.phi import Observation, PhiSettings, choose, starters
from hydra_vlm.search.samplers import POPULATION, View, derived, distributions, within
from hydra_vlm.search.space import Candidate, candidate

if TYPE_CHECKING:
    from optuna._gp.acqf import BaseAcquisitionFunc  # loads torch

Search = Generator[int, Observation, None]


def begin(name: str, ground: TableGround, seed: int, settings: PhiSettings) -> Search:
    """The searcher of SAMPLERS by name; `n_startup` of the settings is read by TPE and the Gaussian process, too."""
    if name == "random":
        return _random(ground, seed)
    if name == "phi":
        return _phi(ground, seed, settings)
    made: Mapping[str, Callable[[int], BaseSampler]] = {
        "tpe": lambda seed: TPESampler(seed=seed, multivariate=True, n_startup_trials=settings.n_startup),
        "gp": lambda seed: _PoolGP(seed, settings.n_startup),
        "evolution": lambda seed: NSGAIISampler(seed=seed, population_size=POPULATION),
    }
    return _optuna(ground, _PoolSampler(ground, made[name], seed))


def _random(ground: TableGround, seed: int) -> Search:
    left = list(range(1, len(ground.candidates)))
    random.Random(seed).shuffle(left)
    left.append(0)
    while left:
        yield left.pop()


def _phi(ground: TableGround, seed: int, settings: PhiSettings) -> Search:
    left = list(range(1, len(ground.candidates)))
    finished = [(yield 0)]
    places = {one.schedule.ranks: at for at, one in enumerate(ground.candidates)}
    for at in (places.get(one.schedule.ranks) for one in starters(ground.space)):
        if at in left:
            left.remove(at)
            finished.append((yield at))
    while left:
        pool = [ground.candidates[at] for at in left]
        step = derived(seed, len(finished))
        profile = ground.space.profile
        found = choose(pool, finished, (), ground.objective, finished[0].scores, settings, step, profile)
        finished.append((yield left.pop(found)))


def _optuna(ground: TableGround, sampler: "_PoolSampler") -> Search:
    study = optuna.create_study(direction="maximize", sampler=sampler)
    baseline: Mapping[str, float] | None = None
    while sampler.left:
        trial = study.ask(sampler.view)
        seen = yield sampler.chosen
        baseline = seen.scores if baseline is None else baseline
        study.tell(trial, ground.objective.values(seen.scores, baseline, seen.loss)[0])


class _PoolSampler(BaseSampler):
    """Gives a trial an unseen candidate of the table, whatever the sampler that `made` makes names."""

    def __init__(self, ground: TableGround, made: Callable[[int], BaseSampler], seed: int) -> None:
        self.ground, self.made, self.seed = ground, made, seed
        view = distributions(ground.space)
        self.view: View = {name: one for name, one in view.items() if not one.single()}
        self.values = [within(self.view, one.values) for one in ground.candidates]
        self.shares = _shares(ground.candidates)
        self.left = list(range(len(ground.candidates)))
        self.chosen = 0

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> View:
        return dict(self.view)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: View) -> dict[str, Any]:
        seed = derived(self.seed, trial.number)
        inner = self.made(seed)
        if isinstance(inner, _PoolGP):
            inner.pool = [self.values[at] for at in self.left]
        values = inner.sample_relative(study, trial, search_space)
        self.chosen = self._pick(inner, values, study, trial, seed) if trial.number else 0
        self.left.remove(self.chosen)
        return dict(self.values[self.chosen])

    def _pick(self, inner: BaseSampler, values: dict[str, Any], study: Study, trial: FrozenTrial, seed: int) -> int:
        if not values:
            return random.Random(seed).choice(self.left)
        if isinstance(inner, _PoolGP):
            return self.left[inner.chosen]
        for name, distribution in self.view.items():  # evolution leaves out what is to mutate
            if name not in values:
                values[name] = inner.sample_independent(study, trial, name, distribution)
        named = candidate(self.ground.space, {**self.ground.candidates[0].values, **values})
        apart = np.abs(self.shares[self.left] - _shares([named])).sum(axis=1)
        return self.left[int(apart.argmin())]

    def sample_independent(self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: Any) -> Any:
        raise AssertionError(f"{param_name} is sampled with the others")


class _PoolGP(GPSampler):
    """Optuna's Gaussian process, its acquisition maximised over the pool that is left."""

    def __init__(self, seed: int, n_startup: int) -> None:
        super().__init__(seed=seed, n_startup_trials=n_startup, warn_independent_sampling=False)
        self.pool: Sequence[Mapping[str, Any]] = ()
        self.chosen = 0

    def _sample_relative_impl(
        self, study: Study, completed: list[FrozenTrial], running: list[FrozenTrial], search_space: View
    ) -> dict[str, Any]:
        from optuna._gp.search_space import SearchSpace  # loads torch

        self._inside = SearchSpace(search_space)
        return super()._sample_relative_impl(study, completed, running, search_space)

    def _optimize_acqf(self, acqf: "BaseAcquisitionFunc", best_params: Any) -> Any:
        places = self._inside.get_normalized_params([None] * len(self.pool), [dict(one) for one in self.pool])  # type: ignore[list-item]
        self.chosen = int(np.argmax(acqf.eval_acqf_no_grad(places)))
        return places[self.chosen]


def _shares(candidates: Sequence[Candidate]) -> FloatArray:
    """[n, P]: half the sum of absolute differences is `distance`."""
    costs = np.array(candidates[0].schedule.graph.costs, dtype=np.float64)
    return np.array([one.schedule.ranks for one in candidates]) * costs / candidates[0].schedule.budget

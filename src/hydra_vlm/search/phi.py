"""The search around Φ (Fig. 5): from finished trials to the schedule to try next. Pure; the caller seeds.

The start fills the space: uniform LoRA, the coarse schedule and the fine ones, then candidates of high contrast that
are far from all others. After that Φ is fitted to the finished trials, and of a pool of mutated incumbents and fresh
samples the candidate of the largest expected improvement is tried. `propose` makes its pool itself; `choose` is given
one, and is the same otherwise.
"""

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hydra_vlm.allocation import AllocationRequest, FineRule, coarse, fine, uniform
from hydra_vlm.errors import BudgetError, ConfigError, StageError
from hydra_vlm.performance_model.encoding import FloatArray, distinct
from hydra_vlm.performance_model.protocol import MIN_SCHEDULES, PerformanceModel, performance_model
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule, Scaling
from hydra_vlm.search.acquisition import Belief, Best, Goal, believe
from hydra_vlm.search.membership import adopt
from hydra_vlm.search.objective import LOSS, Affine, Objective
from hydra_vlm.search.proposals import listed, mutate, repair, sample, scatter
from hydra_vlm.search.space import Candidate, Space

Key = tuple[tuple[int, ...], Scaling, float | None]
"""`Candidate.key`."""

WALK = 64
"""Steps, then samples, after which a space is taken to hold nothing new."""


@dataclass(frozen=True)
class Observation:
    """A finished trial: what was tried, its scores by benchmark, and its validation loss."""

    candidate: Candidate
    scores: Mapping[str, float]
    loss: float


@dataclass(frozen=True)
class PhiSettings:
    """How Φ searches.

    `model` is one of PERFORMANCE_MODELS or a model itself; `norms` shows it the gradient-norm profile beside the ranks.
    It learns the `targets`: the scores that the objective reads, the validation loss beside them (less noisy than
    scores are), or the objective's values alone. `n_startup` is the number of distinct candidates that fill the space
    first, each the farthest of `scattered` draws (1: any). The `pool` is made in `rounds`: in the first, a share of
    `mutants` is one to `steps` steps away from one of the `incumbents` (the best trials by Φ) and the others are fresh
    samples; in each further one all are mutants of the best candidates of the pool so far. `best` and `jitter`: see
    `believe`.

    Raises ConfigError for a number out of range.
    """

    model: str | PerformanceModel = "gaussian-process"
    norms: bool = False
    targets: Literal["scores", "scores+loss", "objective"] = "scores"
    n_startup: int = 8
    scattered: int = 1
    pool: int = 128
    rounds: int = 2
    mutants: float = 0.6
    steps: int = 3
    incumbents: int = 4
    best: Best = "predicted"
    jitter: float = 0.01

    def __post_init__(self) -> None:
        counts = (self.scattered, self.rounds, self.steps, self.incumbents)
        if min(counts) < 1 or self.n_startup < 0 or self.pool < self.rounds:
            raise ConfigError(f"{self}: numbers must be positive, and the pool at least one a round.")
        if not 0 <= self.mutants <= 1 or not 0 <= self.jitter < np.inf:
            raise ConfigError(f"{self}: mutants must be a share from 0 to 1, and jitter 0 or more.")


DEFAULT = PhiSettings()


def propose(
    space: Space,
    finished: Sequence[Observation],
    running: Sequence[Candidate],
    objective: Objective,
    baseline: Mapping[str, float] | None,
    settings: PhiSettings = DEFAULT,
    seed: int = 0,
    taken: Collection[Key] = (),
) -> Candidate:
    """The candidate to try next: inside the space, and none of those finished, running or `taken`.

    `baseline` are uniform LoRA's scores, None as long as they are not known. The result depends on nothing but the
    arguments. Raises ConfigError when the space holds nothing new, or scores lack a benchmark of the objective.
    """
    seen = [*(one.candidate for one in finished), *running]
    known = {one.key for one in seen} | set(taken)
    belief = _belief(finished, running, objective, baseline, settings, seed, space.profile if settings.norms else None)
    draw = random.Random(seed)
    if belief is not None:
        pool = _pool(space, belief, known, settings, draw)
        return pool[_largest(belief.improvement(pool), draw)] if pool else unseen(space, seen[0], known, draw)
    start = next((one for one in starters(space) if one.key not in known), None)
    if start is not None:
        return start
    found = _new([scatter(space, draw) for _ in range(settings.scattered)], known)
    return found[_farthest(found, seen, settings, draw)] if found else unseen(space, sample(space, draw), known, draw)


def choose(
    pool: Sequence[Candidate],
    finished: Sequence[Observation],
    running: Sequence[Candidate],
    objective: Objective,
    baseline: Mapping[str, float] | None,
    settings: PhiSettings = DEFAULT,
    seed: int = 0,
    profile: GradientNormProfile | None = None,
) -> int:
    """The position of the candidate to try next in a pool of candidates not tried yet, as `propose` chooses.

    The start takes the farthest of `scattered` drawn ones; `profile` is read where `settings.norms` asks for it.
    Raises ConfigError when the pool is empty, or scores lack a benchmark of the objective.
    """
    if not pool:
        raise ConfigError("there is nothing to choose from: the pool of candidates is empty.")
    draw = random.Random(seed)
    belief = _belief(finished, running, objective, baseline, settings, seed, profile if settings.norms else None)
    if belief is None:
        return _farthest(pool, [*(one.candidate for one in finished), *running], settings, draw)
    return _largest(belief.improvement(pool), draw)


# What Φ makes of finished trials


def _belief(
    finished: Sequence[Observation],
    running: Sequence[Candidate],
    objective: Objective,
    baseline: Mapping[str, float] | None,
    settings: PhiSettings,
    seed: int,
    profile: GradientNormProfile | None,
) -> Belief | None:
    """Φ, fitted; None while the space is to be filled, or too little is known to fit it."""
    n_seen = len({one.key for one in (*(one.candidate for one in finished), *running)})
    if n_seen < settings.n_startup or (baseline is None and objective.needs_baseline):
        return None
    affines = objective.affine(baseline or {})
    outputs, rows = _measured(finished, objective, affines, settings)
    usable = np.flatnonzero(np.isfinite(rows).all(axis=1))  # a trial that diverged teaches nothing
    known = [finished[i].candidate for i in usable.tolist()]
    if not known or len(set(distinct([one.schedule for one in known]).tolist())) < MIN_SCHEDULES:
        return None
    if settings.targets == "objective":
        outputs = [str(i) for i in range(len(affines))]
        affines = tuple(Affine(0.0, ((name, 1.0),)) for name in outputs)
    goal = Goal.of(affines, outputs, rows[usable], _shares(len(affines), random.Random(seed)))
    model = performance_model(settings.model, profile) if isinstance(settings.model, str) else settings.model
    return believe(model, known, rows[usable], running, goal, seed % 2**31, settings.best, settings.jitter)


def _measured(
    finished: Sequence[Observation], objective: Objective, affines: Sequence[Affine], settings: PhiSettings
) -> tuple[list[str], FloatArray]:
    """Names of what trials measured, and a row of it for each; with targets "objective" the rows are its values."""
    outputs = list(dict.fromkeys(name for affine in affines for name, _ in affine.weights))
    if settings.targets == "scores+loss":
        outputs = list(dict.fromkeys([*outputs, LOSS]))
    rows = np.array([objective.measured(outputs, one.scores, one.loss) for one in finished], dtype=np.float64)
    rows = rows.reshape(len(finished), len(outputs))
    if settings.targets == "objective":
        weights = np.array([[dict(affine.weights).get(name, 0.0) for name in outputs] for affine in affines])
        rows = rows @ weights.T + np.array([affine.constant for affine in affines])
    return outputs, rows


def _shares(n: int, draw: random.Random) -> list[float]:
    """Weights of n values, drawn evenly from all that sum to 1."""
    drawn = [draw.expovariate(1.0) for _ in range(n)]
    return [value / sum(drawn) for value in drawn]


def _pool(
    space: Space,
    belief: Belief,
    known: Collection[Key],
    settings: PhiSettings,
    draw: random.Random,
) -> list[Candidate]:
    """Candidates not known yet, each once."""
    each = settings.pool // settings.rounds
    parents = _top(belief.tried, belief.values, settings.incumbents)
    mutants = round(settings.mutants * each)
    made = [_step(space, parents[i % len(parents)], settings, draw) for i in range(mutants)]
    made += [(sample, scatter)[i % 2](space, draw) for i in range(each - mutants)]
    pool = _new(made, known)
    for _ in range(settings.rounds - 1):
        parents = _top(pool, belief.improvement(pool), settings.incumbents) if pool else parents
        made = [_step(space, parents[i % len(parents)], settings, draw) for i in range(each)]
        pool = _new([*pool, *made], known)
    return pool


def _step(space: Space, parent: Candidate, settings: PhiSettings, draw: random.Random) -> Candidate:
    for _ in range(draw.randint(1, settings.steps)):
        parent = mutate(space, parent, draw)
    return parent


def _new(candidates: Sequence[Candidate], known: Collection[Key]) -> list[Candidate]:
    return list({one.key: one for one in candidates if one.key not in known}.values())


def _top(candidates: Sequence[Candidate], values: FloatArray, n: int) -> list[Candidate]:
    return [candidates[i] for i in np.argsort(-values, kind="stable")[:n]]


def _largest(values: FloatArray, draw: random.Random) -> int:
    """The position of the largest value, a drawn one of several."""
    return int(draw.choice(np.flatnonzero(values == values.max())))


# The start


def starters(space: Space) -> list[Candidate]:
    """What every search tries first: uniform LoRA, then HyDRA's coarse schedule and the fine ones by both rules.

    Three stages and Δd = 2 as in the paper, or what is nearest to them in the space; learning rate and scale are the
    middle of their ranges. Those that the space does not hold are repaired into it, except for uniform LoRA in a closed
    space: what all others are compared with is itself. Without a profile, uniform LoRA is alone. Each comes once.
    """
    scaling = space.scaling if space.tuned is None else space.scaled(space.tuned.middle[1])
    found = [_uniform(space, scaling)]
    found += (adopt(space, made) or repair(space, made.ranks) for made in _allocated(space, scaling))
    return list({one.key: one for one in found}.values())


def _uniform(space: Space, scaling: Scaling) -> Candidate:
    if space.open:
        return repair(space, [1] * len(space.graph.projections))
    made = uniform(AllocationRequest(space.graph, space.budget, scaling=scaling))
    return adopt(space, made) or replace(repair(space, made.ranks), schedule=made)


def _allocated(space: Space, scaling: Scaling) -> Iterator[RankSchedule]:
    if space.profile is None:
        return
    request = AllocationRequest(space.graph, space.budget, space.profile, scaling=scaling)
    if not space.open:
        rooms = space.staged.rooms
        n = min(rooms, key=lambda n: (abs(n - request.n_stages), n))
        request = replace(request, n_stages=n, delta=min(rooms[n], key=lambda delta: abs(delta - request.delta)))
    rules: tuple[FineRule, ...] = ("paper", "profile")
    try:
        yield coarse(request)
        for rule in rules:
            yield fine(replace(request, rule=rule))
    except (BudgetError, StageError):  # too small a budget, or too flat a profile, for stages in an open space
        return


def _farthest(pool: Sequence[Candidate], seen: Sequence[Candidate], settings: PhiSettings, draw: random.Random) -> int:
    """The position of the candidate farthest from its nearest neighbour among those seen, of `scattered` drawn ones."""
    drawn = draw.sample(range(len(pool)), min(settings.scattered, len(pool)))
    if not seen:
        return drawn[0]
    places = _places([*seen, *(pool[i] for i in drawn)])
    there, here = places[: len(seen)], places[len(seen) :]
    nearest = np.array([np.abs(there - one).sum(axis=1).min() for one in here])
    return drawn[int(nearest.argmax())]


def _places(candidates: Sequence[Candidate]) -> FloatArray:
    """[n, P + 2]: sums of absolute differences are the share of the budget spent differently (`distance`).

    Where learning rate or scale are tuned, each adds up to one half: its share of the log range among the candidates.
    """
    costs = np.array(candidates[0].schedule.graph.costs, dtype=np.float64)
    shares = np.array([one.schedule.ranks for one in candidates]) * costs / candidates[0].schedule.budget
    tuned = np.log([(one.learning_rate or 1.0, one.schedule.scaling.value) for one in candidates])
    span = np.ptp(tuned, axis=0)
    return np.hstack([shares, tuned / np.where(span > 1e-9, span, np.inf)]) / 2


def unseen(space: Space, near: Candidate, known: Collection[Key], draw: random.Random) -> Candidate:
    """A candidate that is not known: a walk of small steps from a near one, a sample, or the first one of the list.

    Raises ConfigError when the space holds none.
    """
    found = near
    for _ in range(WALK):
        found = mutate(space, found, draw)
        if found.key not in known:
            return found
    for _ in range(WALK):
        found = sample(space, draw)
        if found.key not in known:
            return found
    rest = listed(space) if not space.open and space.tuned is None else iter(())
    found_new = next((one for one in rest if one.key not in known), None)
    if found_new is None:
        raise ConfigError(
            f"the space holds no schedule beside the {len(known)} that were tried: ask for fewer trials, widen "
            "n_stages, deltas or offsets, or open the space."
        )
    return found_new

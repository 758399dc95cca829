"""The ground that searchers are compared on: the table itself, or a surrogate fitted on it.

On the table a searcher picks among the schedules not yet seen, and sees one run of the schedule. What a schedule is
worth is its shrunk mean over all its runs (`spread`): of the scores, in per cent of uniform LoRA's, or of the
validation loss, with a minus sign. On the surrogate any schedule of a space may be tried: a Gaussian process of the
part's runs is the truth, and what is seen is that plus the noise of a run, drawn from the differences that these
runs have to their schedule's mean. Both are of paired runs, less what a seed does to all schedules alike
(`spread.paired`): a search runs all its trials with one seed.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.performance_model.protocol import Fitted, performance_model
from hydra_vlm.rankbench.entry import Entry, closed_space, open_space
from hydra_vlm.rankbench.spread import LOSS, effects, paired
from hydra_vlm.rankbench.table import FloatArray, Part, RankBench
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import Observation
from hydra_vlm.search.proposals import mutate, repair, sample, scatter
from hydra_vlm.search.samplers import derived
from hydra_vlm.search.space import Candidate, Space, open_candidate

SpaceChoice = Literal["all", "closed", "open"]
Goal = Literal["relative", "loss"]
"""What a search on the ground maximises; both are objectives of `search.objective`."""
DRAWS, ROUNDS, PARENTS, MUTANTS = 2000, 30, 8, 16
"""How the best of a surrogate is looked for: draws, then rounds of mutants of the best so far."""


def space_of(bench: RankBench, choice: SpaceChoice) -> Space:
    """The space that a searcher over named parameters moves in; the open one holds all entries' ranks."""
    if choice not in get_args(SpaceChoice):
        raise ConfigError(f"space {choice!r} does not exist: use one of {', '.join(get_args(SpaceChoice))}.")
    made = closed_space if choice == "closed" else open_space
    return made(bench.graph, bench.budget, bench.profile)


@dataclass(frozen=True, eq=False)
class TableGround:
    """Candidates, uniform LoRA first, the runs of each, and what each is worth for the objective: `worth` [n]."""

    objective: Objective
    space: Space
    names: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    runs: tuple[tuple[Observation, ...], ...]
    worth: FloatArray

    def observe(self, at: int, seed: int) -> Observation:
        """One run of a candidate, the same for all searchers of a repetition, which `seed` names."""
        return self.runs[at][derived(seed, at) % len(self.runs[at])]

    def regret(self, at: int) -> float:
        """How much less a candidate is worth than the best one."""
        return float(self.worth.max() - self.worth[at])


def table_ground(
    bench: RankBench, choice: SpaceChoice = "all", part: Part = "all", goal: Goal = "relative", noise: bool = True
) -> TableGround:
    """All finished entries of a part, or those of one space and uniform LoRA; seeds are paired over the whole table.

    Without `noise` a search sees the shrunk means of a schedule's runs, which tells what noise costs it.
    Raises DataError when fewer than three have finished or no schedule has a second seed.
    """
    space, bench = space_of(bench, choice), paired(bench).part(part)
    entries = [e for e in bench.finished if choice in ("all", e.space) or e.origin == "uniform"]
    if len(entries) < 3:
        raise DataError(f"a search needs at least 3 finished schedules, and the {choice} part has {len(entries)}.")
    rows = [row for entry in entries for row in bench.runs[entry.id]]
    candidates = tuple(_candidate(space, bench, entry) for entry in entries)
    worth, _ = effects(bench, LOSS if goal == "loss" else "objective", rows).shrunk
    if noise:
        runs = tuple(
            tuple(_seen(bench, one, row.scores, row.validation_loss) for row in bench.runs[entry.id])
            for entry, one in zip(entries, candidates, strict=True)
        )
    else:
        scores = np.column_stack([effects(bench, name, rows).shrunk[0] for name in bench.benchmarks])
        losses = -effects(bench, LOSS, rows).shrunk[0]
        worth = worth if goal == "loss" else bench.objective(scores)
        known = zip(candidates, scores.tolist(), losses.tolist(), strict=True)
        runs = tuple((_seen(bench, one, of_one, loss),) for one, of_one, loss in known)
    return TableGround(Objective(goal), space, tuple(entry.id for entry in entries), candidates, runs, worth)


def _seen(bench: RankBench, one: Candidate, scores: Sequence[float], loss: float) -> Observation:
    return Observation(one, dict(zip(bench.benchmarks, scores, strict=True)), loss)


def _candidate(space: Space, bench: RankBench, entry: Entry) -> Candidate:
    if space.open:
        return open_candidate(space, entry.ranks, None)
    return entry.candidate(bench.graph, bench.budget)


@dataclass(frozen=True, eq=False)
class SurrogateGround:
    """A model of all scores and the loss, the noise of runs around it [m, outputs], and its best worth in the space."""

    objective: Objective
    space: Space
    bench: RankBench
    fitted: Fitted
    noise: FloatArray
    best: float

    def worth(self, candidates: Sequence[Candidate]) -> FloatArray:
        """[n] what candidates are worth: scores in per cent of uniform LoRA's, or minus the loss."""
        mean = self.fitted.predict([one.schedule for one in candidates]).mean
        return -mean[:, -1] if self.objective.kind == "loss" else self.bench.objective(mean[:, :-1])

    def observe(self, one: Candidate, seed: int) -> Observation:
        """A run: the truth plus the noise of one of the table's runs."""
        values = self.fitted.predict([one.schedule]).mean[0]
        values = values + self.noise[random.Random(seed).randrange(len(self.noise))]
        scores = np.clip(values[:-1], 0.0, 100.0).tolist()
        return Observation(one, dict(zip(self.bench.benchmarks, scores, strict=True)), float(values[-1]))


def surrogate_ground(
    bench: RankBench, choice: SpaceChoice = "closed", seed: int = 0, goal: Goal = "relative", part: Part = "all"
) -> SurrogateGround:
    """Fitted on the runs of a part, over the closed space or the open one ("all" is the open one).

    Its best is looked for with a few thousand draws and steps from the best of them, so it may be missed by a little.
    Raises DataError when no schedule has a second seed: the noise is not known.
    """
    bench = paired(bench).part(part)
    measured = np.hstack([bench.scores(), np.array([[row.validation_loss] for row in bench.rows])])
    schedules = [bench.schedules[row.entry] for row in bench.rows]
    fitted = performance_model("gaussian-process").fit(schedules, measured, seed)
    space = space_of(bench, choice)
    unknown = SurrogateGround(Objective(goal), space, bench, fitted, _noise(bench, measured), 0.0)
    return replace(unknown, best=_highest(unknown, random.Random(seed)))


def _noise(bench: RankBench, measured: FloatArray) -> FloatArray:
    """Differences of runs to their schedule's mean, widened for its own uncertainty, [m, outputs]."""
    places: dict[str, list[int]] = {}
    for at, row in enumerate(bench.rows):
        places.setdefault(row.entry, []).append(at)
    found = [measured[at] for at in places.values() if len(at) > 1]
    if not found:
        raise DataError("no schedule has a second seed, so the noise of a run is not known: run some again.")
    return np.vstack([(runs - runs.mean(axis=0)) * (len(runs) / (len(runs) - 1)) ** 0.5 for runs in found])


def _highest(ground: SurrogateGround, draw: random.Random) -> float:
    space, bench = ground.space, ground.bench
    top = [repair(space, entry.ranks) for entry in bench.finished]
    top += [(sample, scatter)[i % 2](space, draw) for i in range(DRAWS)]
    for _ in range(ROUNDS):
        worth = ground.worth(top)
        top = [top[i] for i in np.argsort(-worth)[:PARENTS]]
        top += [mutate(space, one, draw) for one in top for _ in range(MUTANTS)]
    return float(ground.worth(top).max())

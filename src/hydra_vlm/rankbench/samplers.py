"""How fast searchers find a good schedule: regret after so many trials, over repetitions (on the table or a surrogate).

The regret of a searcher after n trials is that of the schedule it would train in full by then: how much less it is
worth than the best one of the ground, in the unit of the ground's objective. Two choices are reported: the schedule
with the best observed value (what a search does that trusts its measurements), and the best predicted one among those
tried (the same Gaussian process over all trials for every searcher, which averages noise away).
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import optuna

from hydra_vlm.errors import ConfigError
from hydra_vlm.performance_model.cross_validation import Estimate
from hydra_vlm.performance_model.protocol import MIN_SCHEDULES, performance_model
from hydra_vlm.rankbench.ground import SurrogateGround, TableGround
from hydra_vlm.rankbench.searches import begin
from hydra_vlm.rankbench.table import FloatArray
from hydra_vlm.rankbench.text import markdown, number, show, t_interval
from hydra_vlm.search.phi import DEFAULT, Observation, PhiSettings, starters
from hydra_vlm.search.samplers import SAMPLERS, derived, distributions, schedule_sampler, within
from hydra_vlm.search.study import candidate_of

CHECKPOINTS = (8, 16, 32)
Ground = TableGround | SurrogateGround
Chosen = Literal["observed", "predicted"]


@dataclass(frozen=True)
class Contest:
    """What is compared: searchers by name, on how many repetitions of how many trials, uniform LoRA's included.

    Random search goes on for twice as many trials, to tell how many it needs. `settings` are Φ's. Raises ConfigError
    for an unknown searcher or numbers out of range.
    """

    samplers: tuple[str, ...] = SAMPLERS
    repetitions: int = 30
    trials: int = CHECKPOINTS[-1]
    seed: int = 0
    settings: PhiSettings = DEFAULT

    def __post_init__(self) -> None:
        if not self.samplers:
            raise ConfigError(f"name at least one sampler: {', '.join(SAMPLERS)}.")
        unknown = sorted(set(self.samplers) - set(SAMPLERS))
        if unknown:
            raise ConfigError(f"no sampler is called {unknown[0]!r}: use some of {', '.join(SAMPLERS)}.")
        if self.repetitions < 1 or self.trials < 2:
            raise ConfigError(f"{self.repetitions} repetitions of {self.trials} trials: at least 1 of 2 are needed.")

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """The numbers of trials that are reported."""
        return (*(n for n in CHECKPOINTS if n < self.trials), self.trials)


@dataclass(frozen=True)
class Course:
    """One repetition of a searcher.

    `observed` are regrets of the best observed after 1, 2, … trials, `predicted` those of the best predicted at
    checkpoints; `seconds` is what all proposals took.
    """

    sampler: str
    repetition: int
    observed: tuple[float, ...]
    predicted: Mapping[int, float]
    seconds: float


def contest(ground: Ground, asked: Contest, jobs: int = 1) -> list[Course]:
    """All repetitions of all searchers; the same whatever `jobs`, the number of processes.

    Raises ConfigError where the ground holds fewer schedules than there are trials.
    """
    if isinstance(ground, TableGround) and len(ground.candidates) < asked.trials:
        raise ConfigError(
            f"{asked.trials} trials cannot be picked from {len(ground.candidates)} schedules: ask for fewer trials, or "
            "another part."
        )
    tasks = [(ground, asked, name, k) for k in range(asked.repetitions) for name in asked.samplers]
    if jobs == 1:
        return [repetition(*task) for task in tasks]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(repetition, *zip(*tasks, strict=True)))


def repetition(ground: Ground, asked: Contest, name: str, number: int) -> Course:
    """One searcher, once."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if isinstance(ground, TableGround):
        seen, regrets, seconds = _on_table(ground, asked, name, number)
    else:
        seen, regrets, seconds = _on_surrogate(ground, asked, name, number)
    baseline = seen[0].scores
    values = [ground.objective.values(one.scores, baseline, one.loss)[0] for one in seen]
    best = [int(np.argmax(values[: n + 1])) for n in range(len(seen))]
    predicted = {
        n: regrets[_predicted_best(seen[:n], values[:n], asked.seed)] for n in asked.checkpoints if n <= len(seen)
    }
    return Course(name, number, tuple(float(regrets[at]) for at in best), predicted, seconds)


def _predicted_best(seen: Sequence[Observation], values: Sequence[float], seed: int) -> int:
    """The place of the trial whose schedule is best by a Gaussian process of all trials; best observed if few."""
    schedules = [one.candidate.schedule for one in seen]
    if len({schedule.ranks for schedule in schedules}) < MIN_SCHEDULES:
        return int(np.argmax(values))
    fitted = performance_model("gaussian-process").fit(schedules, np.array(values)[:, None], seed)
    return int(fitted.predict(schedules).mean[:, 0].argmax())


Played = tuple[list[Observation], FloatArray, float]
"""What was seen, trial by trial, the regret of each trial's schedule, and the seconds of proposing."""


def _length(asked: Contest, name: str) -> int:
    return 2 * asked.trials if name == "random" else asked.trials


def _on_table(ground: TableGround, asked: Contest, name: str, number: int) -> Played:
    search = begin(name, ground, derived(asked.seed, number), asked.settings)
    seen: list[Observation] = []
    regrets, seconds = [], 0.0
    for step in range(min(_length(asked, name), len(ground.candidates))):
        start = time.perf_counter()
        at = search.send(seen[-1]) if step else next(search)
        seconds += time.perf_counter() - start
        seen.append(ground.observe(at, derived(asked.seed, number, 1)))
        regrets.append(ground.regret(at))
    return seen, np.array(regrets), seconds


def _on_surrogate(ground: SurrogateGround, asked: Contest, name: str, number: int) -> Played:
    """The searchers as they are used: Optuna samplers of a study, which propose any schedule of the space."""
    sampler = schedule_sampler(name, ground.space, derived(asked.seed, number), ground.objective, asked.settings)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    view = distributions(ground.space)
    uniform = starters(ground.space)[0]
    study.enqueue_trial(within(view, uniform.values), user_attrs={"candidate": uniform.to_json()})
    seen: list[Observation] = []
    seconds = 0.0
    for step in range(_length(asked, name)):
        start = time.perf_counter()
        trial = study.ask(view)
        seconds += time.perf_counter() - start
        one = candidate_of(study.get_trials(deepcopy=False)[trial.number])
        assert one is not None  # the sampler stored it
        seen.append(ground.observe(one, derived(asked.seed, number, step)))
        trial.set_user_attr("scores", dict(seen[-1].scores))
        trial.set_user_attr("loss", seen[-1].loss)
        study.tell(trial, ground.objective.values(seen[-1].scores, seen[0].scores, seen[-1].loss)[0])
    return seen, ground.best - ground.worth([one.candidate for one in seen]), seconds


# The report


def report(courses: Sequence[Course], asked: Contest) -> str:
    """Regrets, paired differences to Φ, and how many trials random search needs, as Markdown."""
    names = [name for name in asked.samplers if any(course.sampler == name for course in courses)]
    decimals = 2 if max(course.observed[0] for course in courses) > 1 else 4  # points of scores, or of a loss
    head = [f"after {n}" for n in asked.checkpoints]
    parts = [f"{asked.repetitions} repetitions, mean regret in points of the objective, 95 % t intervals\n"]
    for chosen in ("observed", "predicted"):
        rows = [[f"best {chosen}", *head, "seconds a search"]]
        for name in names:
            cells = [show(_estimate(courses, name, n, chosen), decimals) for n in asked.checkpoints]  # type: ignore[arg-type]
            seconds = np.mean([course.seconds for course in courses if course.sampler == name])
            rows.append([name, *cells, number(float(seconds), 1)])
        parts.append(markdown(rows) + "\n")
    if "phi" in names and len(names) > 1:
        parts.append(markdown(_differences(courses, asked, names, decimals)) + "\n")
    if "random" in names and len(names) > 1:
        parts.append(markdown(_needed(courses, asked, names)) + "\n")
    return "\n".join(parts)


def _values(courses: Sequence[Course], name: str, n: int, chosen: Chosen) -> FloatArray:
    own = sorted((one for one in courses if one.sampler == name), key=lambda one: one.repetition)
    return np.array([one.observed[n - 1] if chosen == "observed" else one.predicted[n] for one in own])


def _estimate(courses: Sequence[Course], name: str, n: int, chosen: Chosen) -> Estimate:
    return t_interval(_values(courses, name, n, chosen).tolist())


def _differences(courses: Sequence[Course], asked: Contest, names: Sequence[str], decimals: int) -> list[list[str]]:
    rows = [["Φ less …, paired (below 0: Φ is better)", *(f"after {n}" for n in asked.checkpoints)]]
    kinds: tuple[Chosen, ...] = ("observed", "predicted")
    for chosen in kinds:
        for name in names:
            if name != "phi":
                pairs = [
                    _values(courses, "phi", n, chosen) - _values(courses, name, n, chosen) for n in asked.checkpoints
                ]
                rows.append([f"{name}, best {chosen}", *(show(t_interval(p.tolist()), decimals, True) for p in pairs)])
    return rows


def _needed(courses: Sequence[Course], asked: Contest, names: Sequence[str]) -> list[list[str]]:
    """How many trials random search needs for the mean regret, best observed, that the others have."""
    mean = np.mean([one.observed for one in courses if one.sampler == "random"], axis=0)
    rows = [["trials of random search for the same mean regret", *(f"after {n}" for n in asked.checkpoints)]]
    for name in names:
        if name != "random":
            regrets = [_values(courses, name, n, "observed").mean() for n in asked.checkpoints]
            reached = [np.flatnonzero(mean <= regret + 1e-9) for regret in regrets]
            rows.append([name, *(str(at[0] + 1) if len(at) else f"> {len(mean)}" for at in reached)])
    return rows


def to_json(courses: Sequence[Course]) -> list[dict[str, Any]]:
    """JSON-ready objects."""
    return [asdict(course) for course in courses]

"""Is there anything to find? Spread between schedules against spread between seeds, and the best gain over uniform.

A seed fixes the start of the adapter and the order of the data, so that part of what it does is the same for every
schedule. Schedules are compared, and searches run, under one seed; this part is therefore estimated from the seeds that
many schedules share and taken off (`paired`). What is left is described by one-way random effects: a run is worth
mean + schedule + noise, with variances "between" and "within" by the moments of an unbalanced analysis of variance
(Searle, Casella and McCulloch 1992, Section 3.6). Reliability is the share of the variance of measured values that is
between schedules.

The schedule with the best mean owes part of it to luck (the winner's curse), so every mean is drawn towards that of all
schedules by its reliability (empirical Bayes); the best of these shrunk means is what its schedule is expected to be
worth. All of it supposes normal effects; where a few schedules are far worse than the others, "between" is mostly
theirs, and the best is shrunk too little.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hydra_vlm.errors import DataError
from hydra_vlm.performance_model.encoding import IntArray
from hydra_vlm.rankbench.table import FloatArray, RankBench, Row
from hydra_vlm.rankbench.text import markdown, number

RESAMPLES = 500
SHARED = 8
"""A seed with fewer schedules tells too little of what it does to all of them."""
SEEDS_AVERAGED = (1, 2, 4)
LOSS = "− loss"


@dataclass(frozen=True, eq=False)
class Effects:
    """One measured quantity: `values` [n] of runs, `groups` [n] their schedules 0 … k-1.

    Raises DataError unless two schedules and one with two runs are there.
    """

    values: FloatArray
    groups: IntArray

    def __post_init__(self) -> None:
        if len(self.counts) < 2 or len(self.values) == len(self.counts):
            raise DataError(
                f"{len(self.values)} runs of {len(self.counts)} schedules do not tell schedules from seeds: run some "
                "schedule with a second seed."
            )

    @cached_property
    def counts(self) -> IntArray:
        """[k] runs of each schedule."""
        return np.bincount(self.groups)

    @cached_property
    def means(self) -> FloatArray:
        """[k] mean of each schedule."""
        return np.bincount(self.groups, self.values) / self.counts

    @cached_property
    def variances(self) -> tuple[float, float]:
        """Between schedules (0 where less than seed noise explains) and within."""
        n, k = len(self.values), len(self.counts)
        within = float(((self.values - self.means[self.groups]) ** 2).sum() / (n - k))
        squares = float((self.counts * (self.means - self.values.mean()) ** 2).sum() / (k - 1))
        typical = (n - float((self.counts**2).sum()) / n) / (k - 1)
        return max(0.0, (squares - within) / typical), within

    def reliability(self, n_seeds: int) -> float:
        """Of a mean over so many seeds."""
        between, within = self.variances
        return between / (between + within / n_seeds) if between else 0.0

    @cached_property
    def overall(self) -> float:
        """The mean over schedules, each weighted with how well it is known."""
        between, within = self.variances
        weights = 1 / (between + within / self.counts) if between + within else np.ones(len(self.counts))
        return float((weights * self.means).sum() / weights.sum())

    @cached_property
    def shrunk(self) -> tuple[FloatArray, FloatArray]:
        """[k] expected worth of each schedule, and its standard deviation."""
        between, within = self.variances
        noise = within / self.counts
        share = between / (between + noise) if between else np.zeros(len(noise))
        return self.overall + share * (self.means - self.overall), np.sqrt(share * noise)


def effects(bench: RankBench, what: str, rows: Sequence[Row] | None = None) -> Effects:
    """A quantity of `quantities` as measured in these rows, by default in all."""
    rows = bench.rows if rows is None else rows
    numbers: dict[str, int] = {}
    groups = np.array([numbers.setdefault(row.entry, len(numbers)) for row in rows], dtype=np.int64)
    return Effects(quantities(bench, rows)[what], groups)


def paired(bench: RankBench) -> RankBench:
    """The runs of seeds that at least SHARED schedules have, less what a seed does to scores and loss of all alike.

    The part of a seed is estimated by least squares beside that of each schedule; over all rows the parts sum to 0.
    Raises DataError where no seed is shared.
    """
    counts = Counter(row.seed for row in bench.rows)
    rows = [row for row in bench.rows if counts[row.seed] >= min(SHARED, max(counts.values()))]
    names = {name: at for at, name in enumerate(dict.fromkeys(row.entry for row in rows))}
    seeds = {seed: at for at, seed in enumerate(sorted({row.seed for row in rows}))}
    design = np.zeros((len(rows), len(names) + len(seeds) - 1))
    column = np.array([seeds[row.seed] for row in rows])
    design[np.arange(len(rows)), [names[row.entry] for row in rows]] = 1.0
    for seed in range(1, len(seeds)):
        design[column == seed, len(names) + seed - 1] = 1.0
    values = np.column_stack([bench.scores(rows), [row.validation_loss for row in rows]])
    fitted = np.linalg.lstsq(design, values, rcond=None)[0]
    parts = np.vstack([np.zeros(values.shape[1]), fitted[len(names) :]])[column]
    values = values - parts + parts.mean(axis=0)
    changed = (
        replace(row, scores=tuple(one[:-1].tolist()), validation_loss=float(one[-1]))
        for row, one in zip(rows, values, strict=True)
    )
    return replace(bench, rows=tuple(changed))


def quantities(bench: RankBench, rows: Sequence[Row]) -> dict[str, FloatArray]:
    """What is measured of each run: every score, their mean, the objective, minus the validation loss."""
    scores = bench.scores(rows)
    found = {name: scores[:, i] for i, name in enumerate(bench.benchmarks)}
    found["mean score"] = scores.mean(axis=1)
    found["objective"] = bench.objective(scores)
    found[LOSS] = -np.array([row.validation_loss for row in rows])
    return found


def spaces(bench: RankBench) -> Mapping[str, tuple[Row, ...]]:
    """The rows of all entries, of the closed space's and of the others; uniform is in each."""
    uniform = bench.entries[0].id
    space = {entry.id: entry.space for entry in bench.entries}
    found = {"all": bench.rows}
    for name in ("closed", "open"):
        found[name] = tuple(row for row in bench.rows if space[row.entry] == name or row.entry == uniform)
    return found


# The best there is


@dataclass(frozen=True)
class Gain:
    """The best schedule against uniform at equal parameters, in the quantity's unit.

    `naive` is the difference of means, luck included. `expected` is that of shrunk means for the schedule whose shrunk
    mean is best, with a bootstrap interval over schedules; `probability` that it is above 0 for this schedule. `there`
    is the expected gain of the truly best schedule, whichever that is: what no search can exceed.
    """

    entry: str
    naive: float
    expected: float
    interval: tuple[float, float]
    probability: float
    there: float


def gain(bench: RankBench, what: str, rows: Sequence[Row], seed: int = 0) -> Gain:
    """The best gain over uniform that these rows, of a paired table, show."""
    found = effects(bench, what, rows)
    names = list(dict.fromkeys(row.entry for row in rows))
    uniform = names.index(bench.entries[0].id)
    expected, deviation = found.shrunk
    best = int(expected.argmax())
    draw = np.random.default_rng(seed)
    drawn = expected + deviation * draw.standard_normal((4000, len(expected)))
    places = np.split(np.argsort(found.groups, kind="stable"), np.cumsum(found.counts)[:-1])
    resampled = [_resampled_gain(found, places, uniform, draw) for _ in range(RESAMPLES)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Gain(
        entry=names[best],
        naive=float(found.means.max() - found.means[uniform]),
        expected=float(expected[best] - expected[uniform]),
        interval=(float(low), float(high)),
        probability=float((drawn[:, best] > drawn[:, uniform]).mean()),
        there=float((drawn.max(axis=1) - drawn[:, uniform]).mean()),
    )


def _resampled_gain(found: Effects, places: Sequence[IntArray], uniform: int, draw: np.random.Generator) -> float:
    """Of as many schedules drawn with replacement, uniform always among them; `places` are the rows of each."""
    k = len(places)
    chosen = [places[at] for at in (*draw.integers(0, k, k - 1), uniform)]
    rows = np.concatenate(chosen)
    if len(rows) == k:  # by chance no schedule with two seeds
        return 0.0
    expected, _ = Effects(found.values[rows], np.repeat(np.arange(k), [len(place) for place in chosen])).shrunk
    return float(expected.max() - expected[-1])


# Tables


def report(bench: RankBench) -> str:
    """The spreads and the gains, by space, as Markdown; raises DataError as long as no schedule has two seeds."""
    even, parts = paired(bench), []
    raw = spaces(bench)
    for space, rows in spaces(even).items():
        n, repeated = _counts(rows)
        if not repeated:
            continue
        parts.append(f"**{space}**: {n} schedules, {len(rows)} runs, {repeated} schedules with 2 or more seeds\n")
        parts.append(markdown(_spreads(bench, raw[space], even, rows)) + "\n")
        parts.append(markdown(_gains(even, rows)) + "\n")
    if not parts:
        raise DataError("no schedule has two seeds yet: spread between schedules and seeds cannot be told apart.")
    return "\n".join([*parts, NOTES])


def _counts(rows: Sequence[Row]) -> tuple[int, int]:
    counts = Counter(row.entry for row in rows)
    return len(counts), sum(n > 1 for n in counts.values())


def _spreads(bench: RankBench, raw: Sequence[Row], even: RankBench, rows: Sequence[Row]) -> list[list[str]]:
    head = ["", "mean", "between seeds, as measured", "between seeds, paired", "between schedules", "ratio"]
    table = [head + [f"reliability, {k} seed{'s' * (k > 1)}" for k in SEEDS_AVERAGED]]
    for what in quantities(even, rows):
        found = effects(even, what, rows)
        between, within = (variance**0.5 for variance in found.variances)
        measured = effects(bench, what, raw).variances[1] ** 0.5
        decimals = 4 if what == LOSS else 2
        cells = [number(value, decimals) for value in (found.overall, measured, within, between)]
        ratio = number(between / within) if within else "–"
        table.append([what, *cells, ratio, *(number(found.reliability(k)) for k in SEEDS_AVERAGED)])
    return table


def _gains(even: RankBench, rows: Sequence[Row]) -> list[list[str]]:
    names = {entry.id: f"{entry.id} ({entry.origin}: {entry.name})" for entry in even.entries}
    names[even.entries[0].id] = "uniform itself"
    table = [["best against uniform", "naive", "expected", "95 %", "P(> 0)", "best there is", "schedule"]]
    for what in ("objective", "mean score", LOSS):
        found = gain(even, what, rows)
        decimals = 4 if what == LOSS else 2
        low, high = (number(value, decimals, True) for value in found.interval)
        cells = [number(value, decimals, True) for value in (found.naive, found.expected)]
        there = number(found.there, decimals, True)
        table.append([what, *cells, f"{low} … {high}", number(found.probability), there, names[found.entry]])
    return table


NOTES = """Spreads are standard deviations. "Objective" is the mean of the scores relative to uniform LoRA's, in per
cent (uniform has 100). "Paired": less what a seed does to all schedules alike. Gains are of paired values: "naive" is
the best mean less uniform's, luck included (the winner's curse); "expected" is what the schedule with the best shrunk
mean should be worth when trained again, with a bootstrap interval over schedules; "best there is" is the expected gain
of the truly best of these schedules, which nobody can name."""

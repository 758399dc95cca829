"""Intervals for a mean or a paired difference: over seeds where there are three or more, else over questions.

An interval over seeds (Student's t) says how far the result would move if training were repeated with
other seeds, on the same questions. An interval over questions (percentile bootstrap) says how far it would
move with other questions, for the models at hand, and nothing of seed noise. Each label says which it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, Literal

import numpy as np
from scipy.special import stdtrit

LEVEL = 0.95
"""Coverage of every interval."""

MIN_SEEDS = 3
"""With fewer seeds a t interval is too wide to tell anything (12.7 standard errors at two)."""

RESAMPLES = 2_000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence bounds, both None where no interval can be given.

    `method` says in words what the interval is; `n` counts what it is `over`: seeds or questions.
    """

    mean: float
    low: float | None
    high: float | None
    method: str
    n: int
    over: Literal["seeds", "questions"] = "seeds"

    @property
    def excludes_zero(self) -> bool | None:
        """Whether zero lies outside the bounds; None without bounds."""
        if self.low is None or self.high is None:
            return None
        return self.low > 0 or self.high < 0

    def show(self, decimals: int, unit: str = "", signed: bool = False) -> str:
        """Text such as "91.24 ± 0.41 %" (over seeds), "91.24 % [90.83, 91.65]" (over questions or signed)."""

        def number(value: float) -> str:
            return f"{value:{'+' if signed else ''}.{decimals}f}".replace("-", "−")

        unit = f" {unit}" if unit else ""
        if not math.isfinite(self.mean):
            return "–"
        if self.low is None or self.high is None:
            return f"{number(self.mean)}{unit}"
        if self.over == "seeds" and not signed:
            return f"{number(self.mean)} ± {(self.high - self.low) / 2:.{decimals}f}{unit}"
        return f"{number(self.mean)}{unit} [{number(self.low)}, {number(self.high)}]"

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object; a mean that is not a number becomes null."""
        mean = self.mean if math.isfinite(self.mean) else None
        return {
            "mean": mean,
            "low": self.low,
            "high": self.high,
            "method": self.method,
            "n": self.n,
            "over": self.over,
        }


def seed_interval(values: Sequence[float], kind: str = "t interval") -> Interval:
    """Mean and t interval of one value per seed; no bounds below three seeds or with a value not finite."""
    n, mean = len(values), fmean(values)
    if n < MIN_SEEDS:
        seeds = "one seed" if n == 1 else f"mean of {_count(n)} seeds"
        return Interval(mean, None, None, f"{seeds}, no interval below {_count(MIN_SEEDS)}", n)
    if not math.isfinite(mean):
        return Interval(mean, None, None, f"no interval: not every one of the {n} seeds gave a number", n)
    half = float(stdtrit(n - 1, (1 + LEVEL) / 2)) * stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, f"{LEVEL * 100:.0f} % {kind} over {n} seeds", n)


def paired_seed_interval(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """`seed_interval` of ours - theirs, paired by seed (the key); None when they share no seed."""
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    return seed_interval([ours[seed] - theirs[seed] for seed in common], "paired t interval")


def bootstrap_interval(credits: Sequence[float], n_seeds: int = 1, seed: int = 0) -> Interval:
    """Mean and percentile interval over resampled questions, in per cent.

    `credits` holds one credit (0 to 1) per question, the mean over `n_seeds` training seeds
    (0: nothing was trained); `seed` is the resampling's own.
    """
    return _bootstrap(credits, "bootstrap", n_seeds, seed)


def paired_bootstrap(ours: Sequence[float], theirs: Sequence[float], n_seeds: int = 1, seed: int = 0) -> Interval:
    """Percentile interval of ours - theirs over resampled questions, in per cent.

    Both hold one credit (0 to 1) per question, in the same order; each resample draws questions, so that
    what is hard for both models cancels.
    """
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    return _bootstrap(gains, "paired bootstrap", n_seeds, seed)


def _bootstrap(values: Sequence[float], kind: str, n_seeds: int, seed: int) -> Interval:
    n = len(values)
    if n == 0:
        raise ValueError("a bootstrap needs at least one question.")
    # credits take few distinct values, so drawing how often each occurs equals drawing questions, and is quicker
    distinct, counts = np.unique(100 * np.asarray(values, dtype=np.float64), return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, size=RESAMPLES)
    means = drawn @ distinct / n
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    trained = {
        0: "nothing trained: no seed noise",
        1: "one seed: says nothing about seed noise",
    }.get(n_seeds, f"{_count(n_seeds)} seeds averaged: says little about seed noise")
    method = f"{LEVEL * 100:.0f} % {kind} over {n:,} questions, {trained}"
    return Interval(100 * fmean(values), float(low), float(high), method, n, over="questions")


def _count(n: int) -> str:
    return {1: "one", 2: "two", 3: "three"}.get(n, str(n))

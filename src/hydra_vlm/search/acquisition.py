"""What is believed of schedules not tried yet, and how much a trial of them is expected to improve on the best one.

A performance model predicts what trials measure; the objective of it is one number with a standard deviation; expected
improvement (Jones et al. 1998) weighs the two. Its logarithm is computed (Ament et al. 2023), since it tells schedules
apart where the improvement itself is too small for a float.

Errors of a schedule's several outputs are taken to go together, so that their deviations add up: the models read all
outputs off the same few schedules, and what is not known of a schedule is not known of any of its scores. Taken to be
independent, they would average out over six benchmarks, and the search would look around less than half as far.

Shapes: n candidates, o outputs of the model, v values of the objective.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import erfcx, log_ndtr

from hydra_vlm.performance_model.encoding import FloatArray
from hydra_vlm.performance_model.protocol import Fitted, PerformanceModel
from hydra_vlm.search.objective import Affine
from hydra_vlm.search.space import Candidate

Best = Literal["predicted", "observed"]

AUGMENTATION = 0.05
"""Share of the sum in the augmented Tchebycheff function (Knowles 2006)."""

LEAST_DEVIATION = 1e-9
"""Smallest standard deviation of the objective, as a share of its size."""


@dataclass(frozen=True, eq=False)
class Goal:
    """The objective of a model's outputs as one number: `constant` [v] and `weights` [v, o] give the values.

    With several values, what counts is minus the augmented Tchebycheff distance from the best value of each that was
    observed, `ideal` [v], in units of what was observed, `span` [v], weighted with `shares` [v] that sum to 1.
    """

    constant: FloatArray
    weights: FloatArray
    ideal: FloatArray
    span: FloatArray
    shares: FloatArray

    @classmethod
    def of(
        cls, affines: Sequence[Affine], outputs: Sequence[str], observed: FloatArray, shares: Sequence[float]
    ) -> "Goal":
        """The goal of outputs with these names, of which `observed` [n, o] are known."""
        weights = np.array([[dict(affine.weights).get(name, 0.0) for name in outputs] for affine in affines])
        constant = np.array([affine.constant for affine in affines])
        values = constant + observed @ weights.T
        span = np.ptp(values, axis=0)
        return cls(constant, weights, values.max(axis=0), np.where(span > 0, span, 1.0), np.array(shares))

    def __call__(self, mean: FloatArray, spread: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation [n] from those of the outputs [n, o]; to first order with several values."""
        values, deviations = self.constant + mean @ self.weights.T, spread @ np.abs(self.weights).T
        if len(self.constant) == 1:
            return values[:, 0], deviations[:, 0]
        gaps = self.shares * (self.ideal - values) / self.span
        deviations = self.shares * deviations / self.span
        largest = gaps.argmax(axis=1)[:, None]
        worst, its_own = (np.take_along_axis(array, largest, axis=1)[:, 0] for array in (gaps, deviations))
        return -(worst + AUGMENTATION * gaps.sum(axis=1)), its_own + AUGMENTATION * deviations.sum(axis=1)


@dataclass(frozen=True, eq=False)
class Belief:
    """A fitted model and the objective: `best` is the value to improve on, `deviation` stands in for a spread.

    `values` is what the model now makes of each of `tried`, the distinct candidates that it was fitted to.
    A model without a spread is given the standard deviation of its residuals everywhere; expected improvement then only
    follows the mean.
    """

    fitted: Fitted
    goal: Goal
    tried: tuple[Candidate, ...]
    values: FloatArray
    best: float
    deviation: float

    def of(self, candidates: Sequence[Candidate]) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation [n] of the objective."""
        return _predicted(self.fitted, self.goal, candidates, self.deviation)

    def improvement(self, candidates: Sequence[Candidate]) -> FloatArray:
        """The logarithm of the expected improvement [n]; -inf where the model has no answer."""
        mean, deviation = self.of(candidates)
        deviation = np.maximum(deviation, LEAST_DEVIATION * (1 + abs(self.best)))
        return np.nan_to_num(log_improvement((mean - self.best) / deviation) + np.log(deviation), nan=-np.inf)


def believe(
    model: PerformanceModel,
    known: Sequence[Candidate],
    observed: FloatArray,
    running: Sequence[Candidate],
    goal: Goal,
    seed: int,
    best: Best = "predicted",
    jitter: float = 0.0,
) -> Belief:
    """Fit a model to what is `observed` [n, o] of known candidates.

    Running trials count as finished with their predicted outputs, so that nothing is expected of trying them or their
    neighbours once more; a model with a spread is fitted again for it. The value to improve on is the best one
    predicted for a known candidate (a single run that was lucky does not raise it) or the best one observed, plus
    `jitter` standard deviations of the observed values.
    """
    fitted = _fit(model, known, observed, seed)
    if running:
        prediction = fitted.predict([one.schedule for one in running], extras_of(running))
        if prediction.spread is not None:
            fitted = _fit(model, [*known, *running], np.vstack([observed, prediction.mean]), seed)
    seen, _ = goal(observed, np.zeros_like(observed))
    predicted, _ = _predicted(fitted, goal, [*known, *running], 0.0)
    residual = float(np.sqrt(np.mean((predicted[: len(seen)] - seen) ** 2)))
    top = predicted.max() if best == "predicted" else max(_means(known, seen).values())
    rows = {one.key: i for i, one in enumerate(known)}
    tried = tuple(known[i] for i in rows.values())
    return Belief(fitted, goal, tried, predicted[list(rows.values())], float(top + jitter * seen.std()), residual)


def _fit(model: PerformanceModel, known: Sequence[Candidate], observed: FloatArray, seed: int) -> Fitted:
    return model.fit([one.schedule for one in known], observed, seed, extras_of(known))


def _predicted(
    fitted: Fitted, goal: Goal, candidates: Sequence[Candidate], deviation: float
) -> tuple[FloatArray, FloatArray]:
    prediction = fitted.predict([one.schedule for one in candidates], extras_of(candidates))
    if prediction.spread is None:
        mean, _ = goal(prediction.mean, np.zeros_like(prediction.mean))
        return mean, np.full_like(mean, deviation)
    return goal(prediction.mean, prediction.spread)


def _means(known: Sequence[Candidate], values: FloatArray) -> Mapping[object, float]:
    """Mean value of each distinct candidate, by its key."""
    found: dict[object, list[float]] = {}
    for one, value in zip(known, values, strict=True):
        found.setdefault(one.key, []).append(float(value))
    return {key: sum(of_key) / len(of_key) for key, of_key in found.items()}


def extras_of(candidates: Sequence[Candidate]) -> FloatArray | None:
    """What a performance model is told beside schedules [n, 1]: log2 of the learning rate where that is tuned."""
    rates = [one.learning_rate for one in candidates if one.learning_rate is not None]
    return np.log2(np.array(rates))[:, None] if len(rates) == len(candidates) else None


def log_improvement(z: npt.ArrayLike) -> FloatArray:
    """log(φ(z) + z Φ(z)) of the standard normal distribution, exact to rounding for any z."""
    z = np.asarray(z, dtype=np.float64)
    near = np.maximum(z, -1.0)
    density = np.exp(-(near**2) / 2) / np.sqrt(2 * np.pi)
    middle, far = np.clip(z, -100.0, -1.0), np.minimum(z, -100.0)
    tail = -0.5 * np.log(2 * np.pi)
    return np.where(
        z > -1,
        np.log(density + near * np.exp(log_ndtr(near))),
        np.where(
            z > -100,
            tail - middle**2 / 2 + np.log1p(middle * np.sqrt(np.pi / 2) * erfcx(-middle / np.sqrt(2))),
            tail - far**2 / 2 - 2 * np.log(-far) + np.log1p(-3 / far**2),
        ),
    )

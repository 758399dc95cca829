"""Performance models on the table: Table VIII and Fig. 6 on data of our own, by cross-validation.

Runs are paired: what a seed does to all schedules alike is taken off first (`spread.paired`), as a search sees it.
"""

import importlib.util
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from hydra_vlm.errors import ConfigError, DataError
from hydra_vlm.performance_model.cross_validation import (
    LEARNING_CURVE_SIZES,
    CrossValidation,
    Plan,
    cross_validate,
)
from hydra_vlm.performance_model.metrics import METRICS, Measured
from hydra_vlm.performance_model.protocol import PERFORMANCE_MODELS, performance_model
from hydra_vlm.rankbench.spread import LOSS, Effects, effects
from hydra_vlm.rankbench.table import FloatArray, RankBench
from hydra_vlm.rankbench.text import markdown, number, show

Inputs = Literal["ranks", "profile", "early-loss"]
Target = Literal["scores", "loss"]
PAPER = ("transformer", "lightgbm", "random-forest", "mlp")
"""The paper's four, in the order of Table VIII."""


def known_models() -> tuple[str, ...]:
    """All models that are installed, the paper's four first."""
    names = dict.fromkeys((*PAPER, *PERFORMANCE_MODELS))
    return tuple(name for name in names if name != "lightgbm" or importlib.util.find_spec("lightgbm") is not None)


def measured(bench: RankBench, inputs: Inputs = "ranks", target: Target = "scores") -> Measured:
    """The table's runs; the objective is the mean of scores relative to uniform's, or minus the validation loss.

    With "early-loss" the training losses of a run's first tenth are inputs beside the ranks: what an early look at the
    run tells. Raises DataError where runs were logged at different steps.
    """
    if inputs not in get_args(Inputs):
        raise ConfigError(f"inputs {inputs!r} do not exist: use one of {', '.join(get_args(Inputs))}.")
    extras = _early_losses(bench) if inputs == "early-loss" else None
    schedules = tuple(bench.schedules[row.entry] for row in bench.rows)
    if target == "loss":
        losses = np.array([[row.validation_loss] for row in bench.rows])
        return Measured(schedules, losses, ("validation loss",), (-1.0,), extras)
    scale = np.where(bench.baseline > 0, bench.baseline, 100.0)
    weights = tuple(100 / len(bench.benchmarks) / scale)
    return Measured(schedules, bench.scores(), bench.benchmarks, weights, extras)


def _early_losses(bench: RankBench) -> FloatArray:
    found = [[loss for _, loss in row.train_losses[:2]] for row in bench.rows]
    steps = {tuple(step for step, _ in row.train_losses[:2]) for row in bench.rows}
    if len(steps) > 1 or not next(iter(steps)):
        raise DataError("runs were logged at different steps, or not at all: early losses do not compare.")
    return np.array(found, dtype=np.float64)


def compare_models(
    bench: RankBench, names: Sequence[str], plan: Plan, inputs: Inputs = "ranks", target: Target = "scores"
) -> CrossValidation:
    """Every named model on every fold; with inputs "profile" gradient norms are shown to the models, too."""
    profile = bench.profile if inputs == "profile" else None
    return cross_validate(
        {name: performance_model(name, profile) for name in names}, measured(bench, inputs, target), plan
    )


def noise_floor(bench: RankBench, target: Target = "scores") -> float | None:
    """The MSE of single runs that a model which knew every schedule's expected scores would have; None without seeds.

    In the unit of the report: variances of the outputs over all runs.
    """
    names = (LOSS,) if target == "loss" else bench.benchmarks
    found = [effects(bench, name) for name in names] if _repeated(bench) else []
    shares = [_noise_share(one) for one in found if one.values.std() > 0]
    return float(np.mean(shares)) if shares else None


def _noise_share(found: Effects) -> float:
    return found.variances[1] / float(found.values.var())


def _repeated(bench: RankBench) -> bool:
    return any(len(rows) > 1 for rows in bench.runs.values())


def report(bench: RankBench, found: CrossValidation, target: Target = "scores") -> str:
    """Table VIII, the differences to the paper's Transformer, and learning curves, as Markdown."""
    floor = noise_floor(bench, target)
    said = "" if floor is None else f" Seed noise alone makes an MSE of {number(floor, 3)}: no model gets below."
    seeds = f"{len(found.seeds)} draw{'s' * (len(found.seeds) > 1)} of folds"
    parts = [
        f"{found.n_schedules} schedules ({found.n_rows} runs), {found.n_folds}-fold cross-validation, {seeds}, 95 % "
        f"intervals.{said}\n",
        markdown(_table(found)),
    ]
    if "transformer" in found.models and len(found.models) > 1:
        parts += ["\nMSE less the Transformer's, paired by fold (above 0: worse):\n", markdown(_differences(found))]
    for metric in ("mse", "objective_spearman") if len(found.sizes) > 1 else ():
        parts += [f"\nLearning curve, {METRICS[metric]}:\n", markdown(_curve(found, metric))]
    return "\n".join(parts)


def _table(found: CrossValidation) -> list[list[str]]:
    rows = [["model", *METRICS.values()]]
    return rows + [[m, *(show(found.estimate(m, metric), 3) for metric in METRICS)] for m in found.models]


def _differences(found: CrossValidation) -> list[list[str]]:
    others = [name for name in found.models if name != "transformer"]
    cells = [show(found.difference(name, "transformer", "mse"), 3, signed=True) for name in others]
    return [others, cells]


def _curve(found: CrossValidation, metric: str) -> list[list[str]]:
    rows = [["model", *(f"{size} schedules" for size in found.sizes)]]
    return rows + [[m, *(show(found.estimate(m, metric, size), 3) for size in found.sizes)] for m in found.models]


def curve_sizes(bench: RankBench) -> tuple[int, ...]:
    """Training sizes of a learning curve on this table: those of 8 to 128 that it allows."""
    return tuple(size for size in LEARNING_CURVE_SIZES if size < len(bench.finished))

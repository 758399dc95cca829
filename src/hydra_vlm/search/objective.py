"""What a search maximises, as a function of a trial's scores: always larger is better, always affine in them.

"relative" is the default (Fig. 5 leaves open what to maximise over six scores): the mean over benchmarks of a trial's
score over that of uniform LoRA in the same study, so that a benchmark counts the same whatever its unit, and uniform
LoRA is worth 1. As values are affine in the scores, the objective of predicted scores is the predicted objective.
"""

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from hydra_vlm.errors import ConfigError, DataError

Kind = Literal["relative", "benchmark", "weights", "pareto", "loss"]

LOSS = "validation loss"
"""The name of the validation loss among what a trial measures, beside the benchmarks' names."""

FORMS = "relative, loss, the name of a benchmark, weights such as gqa=2,pope=1, or pareto:gqa,pope"


class Affine(NamedTuple):
    """`constant` plus the sum of weight x measured value; `weights` are by benchmark, or by LOSS."""

    constant: float
    weights: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Objective:
    """What a search maximises.

    - relative: the mean over all benchmarks of score / score of uniform LoRA.
    - weights: the same as a weighted mean over the named benchmarks; `weights` need not sum to 1.
    - benchmark: one benchmark's score as it is.
    - pareto: the scores of two or more benchmarks, side by side.
    - loss: minus the validation loss.

    Raises ConfigError for benchmarks or weights that the kind does not take.
    """

    kind: Kind = "relative"
    benchmarks: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"objective {self.kind!r} is unknown: use {FORMS}.")
        least, most = {"benchmark": (1, 1), "weights": (1, math.inf), "pareto": (2, math.inf)}.get(self.kind, (0, 0))
        if not least <= len(self.benchmarks) <= most:
            raise ConfigError(
                f"objective {self.kind!r} takes {_counted(least, most)}, got {len(self.benchmarks)}: use {FORMS}."
            )
        if not all(self.benchmarks) or len(set(self.benchmarks)) < len(self.benchmarks):
            raise ConfigError(f"an objective names each benchmark once, got {', '.join(map(repr, self.benchmarks))}.")
        if len(self.weights) != (len(self.benchmarks) if self.kind == "weights" else 0):
            raise ConfigError(f"objective {self.kind!r}: weights come with kind 'weights', one for each benchmark.")
        if not all(0 < weight < math.inf for weight in self.weights):
            raise ConfigError(
                f"weights of an objective must be positive, got {self.weights}: leave out what is worth 0."
            )

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """From "relative", "loss", "gqa", "gqa=2,pope=1" or "pareto:gqa,pope"; raises ConfigError.

        Whether these benchmarks are measured is told by `check`, once that is known.
        """
        text = text.strip()
        if text == "relative" or text == "loss":
            return cls("relative" if text == "relative" else "loss")
        head, colon, rest = text.partition(":")
        names = tuple(name.strip() for name in (rest if colon else text).split(","))
        if colon and head.strip() != "pareto":
            raise ConfigError(f"objective {text!r} does not parse: use {FORMS}.")
        if colon:
            return cls("pareto", names)
        if "=" not in text and len(names) == 1:
            return cls("benchmark", names)
        pairs = [name.partition("=") for name in names]
        try:
            weights = tuple(float(weight) for _, _, weight in pairs)
        except ValueError as error:
            raise ConfigError(f"objective {text!r} does not parse: use {FORMS}.") from error
        return cls("weights", tuple(name.strip() for name, _, _ in pairs), weights)

    def __str__(self) -> str:
        """The text that `parse` takes."""
        if self.kind == "weights":
            pairs = zip(self.benchmarks, self.weights, strict=True)
            return ",".join(f"{name}={repr(weight).removesuffix('.0')}" for name, weight in pairs)
        names = ",".join(self.benchmarks)
        return {"benchmark": names, "pareto": f"pareto:{names}"}.get(self.kind, self.kind)

    @property
    def n_values(self) -> int:
        """How many values a trial has: 1, or the number of benchmarks for pareto."""
        return len(self.benchmarks) if self.kind == "pareto" else 1

    @property
    def names(self) -> tuple[str, ...]:
        """What each value is, in words."""
        words = {
            "relative": "mean of scores relative to uniform LoRA",
            "weights": f"weighted mean of scores relative to uniform LoRA ({self})",
            "loss": f"minus {LOSS}",
        }
        return self.benchmarks if self.kind in ("benchmark", "pareto") else (words[self.kind],)

    @property
    def needs_baseline(self) -> bool:
        """Whether values can be told only once uniform LoRA's scores are known."""
        return self.kind in ("relative", "weights")

    def check(self, benchmarks: Collection[str]) -> None:
        """Raises ConfigError unless a search that measures these benchmarks can tell the values."""
        if self.kind == "relative" and not benchmarks:
            raise ConfigError("objective 'relative' compares scores, and no benchmark is measured: use 'loss'.")
        for name in self.benchmarks:
            if name not in benchmarks:
                near = difflib.get_close_matches(name, benchmarks, 1, 0.5)
                meant = f" Did you mean {near[0]!r}?" if near else ""
                raise ConfigError(
                    f"objective {str(self)!r} needs the score of {name!r}, and measured are "
                    f"{', '.join(benchmarks) or 'none'}.{meant}"
                )

    def affine(self, baseline: Mapping[str, float]) -> tuple[Affine, ...]:
        """Each value as an affine function of what is measured; `baseline` are uniform LoRA's scores.

        A benchmark on which uniform LoRA scores 0 counts as 1 + score / 100: the difference in points over 100.
        Raises ConfigError when the baseline lacks a score that is needed.
        """
        match self.kind:
            case "loss":
                return (Affine(0.0, ((LOSS, -1.0),)),)
            case "benchmark" | "pareto":
                return tuple(Affine(0.0, ((name, 1.0),)) for name in self.benchmarks)
        self.check(baseline)
        names = self.benchmarks or tuple(baseline)
        shares = self.weights or (1.0,) * len(names)
        total = sum(shares)
        constant = sum(share for name, share in zip(names, shares, strict=True) if baseline[name] == 0)
        weights = (
            (name, share / (total * (baseline[name] or 100.0))) for name, share in zip(names, shares, strict=True)
        )
        return (Affine(constant / total, tuple(weights)),)

    def measured(self, names: Sequence[str], scores: Mapping[str, float], validation_loss: float) -> tuple[float, ...]:
        """What a trial measured under these names, benchmarks or LOSS; raises ConfigError where a score is missing."""
        found = {**scores, LOSS: validation_loss}
        missing = [name for name in names if name not in found]
        if missing:
            raise ConfigError(
                f"objective {str(self)!r} needs the score of {missing[0]!r}, and this trial has "
                f"{', '.join(scores) or 'none'}: measure the same benchmarks in every trial of a study."
            )
        return tuple(found[name] for name in names)

    def values(
        self, scores: Mapping[str, float], baseline: Mapping[str, float], validation_loss: float
    ) -> tuple[float, ...]:
        """A trial's values, all to be maximised, from its scores and uniform LoRA's, benchmark -> score.

        Raises ConfigError when a score that is needed is missing, DataError when a value is not finite.
        """
        found = []
        for constant, weights in self.affine(baseline):
            measured = self.measured([name for name, _ in weights], scores, validation_loss)
            found.append(constant + sum(weight * value for (_, weight), value in zip(weights, measured, strict=True)))
        if not all(map(math.isfinite, found)):
            raise DataError(
                f"objective {str(self)!r} is not finite: scores {dict(scores)}, {LOSS} {validation_loss}. The training "
                "diverged; count the trial as failed."
            )
        return tuple(found)


def _counted(least: float, most: float) -> str:
    if most == 0:
        return "no benchmark"
    return "one benchmark" if most == 1 else f"{least} or more benchmarks"

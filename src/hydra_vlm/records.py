"""The record of one fine-tuning run: what was asked, what it cost, what came of it. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.graph import at_least, finite, none_for_nan, whole
from hydra_vlm.moving.plan import Move
from hydra_vlm.pilot.candidates import Pilot
from hydra_vlm.schedule import RankSchedule

SETBACK = 0.1
"""Share by which a training loss may be higher after ranks moved."""


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial.

    `schedule` is None for full fine-tuning and for the model as it came (`name` "zero-shot"). `trained` counts the
    trained parameters by part ("lora", "projector", "decoder").

    `train_losses` are (optimizer step, loss) pairs: the mean, over the steps since the pair before, of each step's mean
    over the supervised tokens of its global batch. `validation_loss` is the mean over all supervised tokens of the
    validation records, with the weights that were kept; nan where there are no such records or it is no number.
    `validation_losses` are those by step, the last step's among them. `kept_step` is the step of the weights that were
    kept where they were the best on the way (`training.keep`), else None: those of the last step. `started_from`
    is the SHA-256 of the adapter that training went on from.

    `moves` are the decisions where ranks moved, `schedule` what they ended with; `pilot` chose the `learning_rates` by
    part, where there was one. `training_seconds` are those of `seconds` before answering.
    """

    name: str
    seed: int
    schedule: RankSchedule | None
    trained: dict[str, int]
    train_losses: tuple[tuple[int, float], ...]
    validation_loss: float
    scores: tuple[Score, ...]
    seconds: float
    started_from: str | None = None
    validation_losses: tuple[tuple[int, float], ...] = ()
    kept_step: int | None = None
    moves: tuple[Move, ...] = ()
    pilot: Pilot | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    training_seconds: float = 0.0

    @property
    def first_schedule(self) -> RankSchedule | None:
        """What training began with; `schedule` unless ranks moved."""
        if not self.moves or self.schedule is None:
            return self.schedule
        return replace(self.moves[0].after, name="wide", ranks=self.moves[0].before)

    @property
    def most_trainable(self) -> int:
        """The most LoRA parameters that were trained at a time."""
        if self.schedule is None:
            return self.trained.get("lora", 0)
        ranks = [self.schedule.ranks, *(move.before for move in self.moves)]
        return max(map(self.schedule.graph.parameters, ranks))

    @property
    def key(self) -> str:
        """The trial's folder name: schedule and seed."""
        return f"{self.name}-seed{self.seed}"

    def summary(self) -> str:
        """A few lines: what was trained, the losses, the scores, the time."""
        trained = ", ".join(f"{count:,} {part}" for part, count in self.trained.items()) or "nothing"
        lines = [
            f"{self.name}, seed {self.seed}: trained {trained} parameters in {self.seconds:.0f} s",
            self._validated(),
            *(
                f"the training loss has not come back after ranks moved at step {move.step}: {lost:+.0%}"
                for move in self.moves
                if (lost := self.lost_after(move)) > SETBACK
            ),
            *(score.summary() for score in self.scores),
        ]
        return "\n".join(lines)

    def _validated(self) -> str:
        if self.kept_step is not None:
            last = self.train_losses[-1][0] if self.train_losses else self.kept_step
            what = f"the lowest of {len(self.validation_losses)}; training ended after step {last}"
            return f"validation loss {self.validation_loss:.4f}: weights of step {self.kept_step}, {what}"
        if math.isfinite(self.validation_loss):
            return f"validation loss {self.validation_loss:.4f}"
        if not self.validation_losses:
            return "validation loss not taken: no validation records"
        step = self.validation_losses[-1][0]
        return (
            f"validation loss is no number: nonfinite-validation-{step}.json beside the record names what is to blame"
        )

    def lost_after(self, move: Move) -> float:
        """By which share the training loss is higher 5 to 10 % of the steps after a move than in the 5 % before it.

        nan where no loss was logged in one of the two.
        """
        last = self.train_losses[-1][0] if self.train_losses else 0
        window = max(1, round(0.05 * last))

        def mean(first: int) -> float:
            found = [loss for step, loss in self.train_losses if first < step <= first + window]
            return fmean(found) if found else math.nan

        return mean(move.step + window) / mean(move.step - window) - 1

    def metrics(self) -> list[dict[str, float | None]]:
        """Losses by step, training's and validation's; one that is no number is None."""
        found: dict[int, dict[str, float | None]] = {}
        for step, loss in self.train_losses:
            found.setdefault(step, {"step": step})["loss"] = none_for_nan(loss)
        for step, loss in self.validation_losses:
            found.setdefault(step, {"step": step})["validation_loss"] = none_for_nan(loss)
        return [found[step] for step in sorted(found)]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seed": self.seed,
            "schedule": self.schedule.to_json() if self.schedule else None,
            "trained": self.trained,
            "train_losses": [[step, none_for_nan(loss)] for step, loss in self.train_losses],
            "validation_loss": none_for_nan(self.validation_loss),
            "scores": [score.to_json() for score in self.scores],
            "seconds": self.seconds,
            **({"started_from": self.started_from} if self.started_from else {}),
            "validation_losses": [[step, none_for_nan(loss)] for step, loss in self.validation_losses],
            "kept_step": self.kept_step,
            "learning_rates": dict(self.learning_rates),
            "training_seconds": self.training_seconds,
            **({"pilot": self.pilot.to_json()} if self.pilot else {}),
            **({"moves": [move.to_json() for move in self.moves]} if self.moves else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any], key: str | None = None) -> "TrialRecord":
        """The inverse of `to_json`; `key` is the name of the folder in which the record lies, where it lies in one.

        Raises:
            ValueError, KeyError, TypeError: a number is missing, none, or out of range, or it is another trial's.
        """
        schedule, kept = data["schedule"], data.get("kept_step")
        found = cls(
            name=_text(data["name"]),
            seed=at_least(0, whole(data["seed"])),
            schedule=RankSchedule.from_json(schedule) if schedule else None,
            trained={_text(part): at_least(0, whole(count)) for part, count in dict(data["trained"]).items()},
            train_losses=_losses(data["train_losses"]),
            validation_loss=_loss(data["validation_loss"]),
            scores=tuple(Score.from_json(score) for score in data["scores"]),
            seconds=at_least(0, finite(data["seconds"])),
            started_from=None if data.get("started_from") is None else _text(data["started_from"]),
            validation_losses=_losses(data.get("validation_losses", ())),
            kept_step=None if kept is None else at_least(1, whole(kept)),
            moves=tuple(Move.from_json(move) for move in data.get("moves", ())),
            pilot=Pilot.from_json(data["pilot"]) if data.get("pilot") else None,
            learning_rates={_text(part): finite(rate) for part, rate in dict(data.get("learning_rates", {})).items()},
            training_seconds=at_least(0, finite(data.get("training_seconds", 0))),
        )
        found._require_sense(key)
        return found

    def _require_sense(self, key: str | None) -> None:
        """Raises ValueError where parts of a record contradict each other or its place."""
        if key is not None and self.key != key:
            raise ValueError(f"it is the record of {self.key!r}, and lies in the folder of {key!r}")
        names = [score.benchmark for score in self.scores]
        if len(set(names)) < len(names):
            raise ValueError(f"a benchmark has two scores ({', '.join(names)})")
        if self.kept_step is not None and self.kept_step not in dict(self.validation_losses):
            raise ValueError(f"kept_step is {self.kept_step}, a step without a validation loss")
        for move in self.moves:
            self._require_same_graph(move)

    def _require_same_graph(self, move: Move) -> None:
        """Raises ValueError where a move is of other projections than the schedule's."""
        if self.schedule is None or move.after.graph != self.schedule.graph:
            raise ValueError(f"the move after step {move.step} is of another graph than the schedule")
        lists = [("before", move.before), ("spectra", move.spectra), *(("probed", ranks) for ranks, _ in move.probed)]
        for name, found in lists:
            if len(found) != len(self.schedule.ranks):
                raise ValueError(f"{name} of the move after step {move.step} does not fit the schedule's projections")


def _loss(value: Any) -> float:
    """A cross entropy; null stands for one that is no number."""
    return math.nan if value is None else at_least(0, finite(value))


def _losses(pairs: Any) -> tuple[tuple[int, float], ...]:
    return tuple((at_least(0, whole(step)), _loss(loss)) for step, loss in pairs)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value

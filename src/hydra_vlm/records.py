"""The record of one fine-tuning run: what was asked, what it cost, what came of it. No torch."""

from dataclasses import dataclass
from typing import Any

from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.schedule import RankSchedule


@dataclass(frozen=True)
class TrialRecord:
    """One finished trial.

    `schedule` is None for full fine-tuning and for the model as it came (`name` "zero-shot"). `trained` counts the
    trained parameters by part ("lora", "projector", "decoder"). Losses are (optimizer step, mean loss) pairs;
    `validation_loss` is the mean over supervised tokens of the validation records after the last step. `started_from`
    is the SHA-256 of the adapter that training went on from.
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

    @property
    def key(self) -> str:
        """The trial's folder name: schedule and seed."""
        return f"{self.name}-seed{self.seed}"

    def summary(self) -> str:
        """A few lines: what was trained, the losses, the scores, the time."""
        trained = ", ".join(f"{count:,} {part}" for part, count in self.trained.items()) or "nothing"
        lines = [
            f"{self.name}, seed {self.seed}: trained {trained} parameters in {self.seconds:.0f} s",
            f"validation loss {self.validation_loss:.4f}",
            *(score.summary() for score in self.scores),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "seed": self.seed,
            "schedule": self.schedule.to_json() if self.schedule else None,
            "trained": self.trained,
            "train_losses": [list(pair) for pair in self.train_losses],
            "validation_loss": self.validation_loss,
            "scores": [score.to_json() for score in self.scores],
            "seconds": self.seconds,
            **({"started_from": self.started_from} if self.started_from else {}),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TrialRecord":
        schedule = data["schedule"]
        return cls(
            name=data["name"],
            seed=data["seed"],
            schedule=RankSchedule.from_json(schedule) if schedule else None,
            trained=data["trained"],
            train_losses=tuple((int(step), float(loss)) for step, loss in data["train_losses"]),
            validation_loss=data["validation_loss"],
            scores=tuple(Score.from_json(s) for s in data["scores"]),
            seconds=data["seconds"],
            started_from=data.get("started_from"),
        )

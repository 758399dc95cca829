"""What every benchmark gives and takes: examples in, predictions between, a score out. No torch."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class Example:
    """One question: `image` is a path (None for text alone), `answers` are the accepted references."""

    id: str
    image: str | None
    question: str
    answers: tuple[str, ...]
    group: str = ""


@dataclass(frozen=True)
class Prediction:
    """What a model said to one example, kept so that scoring can be repeated without the model."""

    id: str
    prompt: str
    text: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Prediction":
        return cls(**data)


@dataclass(frozen=True)
class Verdict:
    """How one example was scored: the parsed answer and the credit it earned, from 0 to 1."""

    id: str
    answer: str
    credit: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Score:
    """A benchmark's result: `value` in the benchmark's own unit (per cent unless it says otherwise) over `n` examples.

    `groups` holds sub-scores by group; `unanswered` counts examples without a prediction, which earn nothing.
    """

    benchmark: str
    value: float
    n: int
    unanswered: int = 0
    groups: dict[str, float] = field(default_factory=dict)

    def summary(self) -> str:
        """One line: the value, what it is over, and the groups."""
        groups = ", ".join(f"{name} {value:.1f}" for name, value in self.groups.items())
        missing = f", {self.unanswered} unanswered" if self.unanswered else ""
        return f"{self.benchmark}: {self.value:.2f} over {self.n:,} questions{missing}" + (
            f" ({groups})" if groups else ""
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Score":
        return cls(**data)


class Benchmark(Protocol):
    """The plug point: where examples come from, and what an answer is worth."""

    @property
    def name(self) -> str:
        """What the score is filed under."""
        ...

    def load(self, root: Path) -> list[Example]:
        """Read the examples under `root`; `DataError` names what is missing."""
        ...

    def judge(self, example: Example, text: str) -> Verdict:
        """Parse the raw `text` and give it credit from 0 to 1."""
        ...


def score(
    benchmark: Benchmark, examples: Sequence[Example], predictions: Iterable[Prediction]
) -> tuple[Score, list[Verdict]]:
    """Join by id, judge, and average to per cent; an unanswered example earns nothing and is counted."""
    said = {p.id: p.text for p in predictions}
    verdicts = [benchmark.judge(e, said[e.id]) if e.id in said else Verdict(e.id, "", 0.0) for e in examples]
    groups: dict[str, list[float]] = {}
    for example, verdict in zip(examples, verdicts, strict=True):
        if example.group:
            groups.setdefault(example.group, []).append(verdict.credit)
    return (
        Score(
            benchmark=benchmark.name,
            value=_percent([v.credit for v in verdicts]),
            n=len(examples),
            unanswered=sum(e.id not in said for e in examples),
            groups={name: _percent(credits) for name, credits in sorted(groups.items())},
        ),
        verdicts,
    )


def _percent(credits: Sequence[float]) -> float:
    return 100 * sum(credits) / len(credits) if credits else 0.0

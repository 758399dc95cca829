"""What every benchmark gives and takes: examples in, predictions between, a score out. No torch."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from hydra_vlm.graph import at_least, finite, whole

Rule = Literal["published", "corrected"]
"""How answers are judged: as the reference's own scorer does, or with its known mistakes put right."""

_SHOWN = 6  # how many sub-scores one line tells


@dataclass(frozen=True)
class Example:
    """One question.

    `image` is a path (None for text alone), `question` the user's turn as it is asked, `answers` are the accepted
    references. `group` names a sub-score; "wide/narrow" counts towards both. Examples of one `unit` are one image
    of MME or one base question of MMBench: they are sampled together; an example without is a unit by itself.
    `options` are the texts of a multiple choice, in the order of their letters.
    """

    id: str
    image: str | None
    question: str
    answers: tuple[str, ...]
    group: str = ""
    unit: str = ""
    options: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Example":
        found = cls(**data | {"answers": tuple(data["answers"]), "options": tuple(data["options"])})
        texts = (found.id, found.image or "", found.question, found.group, found.unit, *found.answers, *found.options)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"an example is made of texts, found {data!r:.100}")
        return found


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
        found = cls(**data)
        if not all(isinstance(text, str) for text in (found.id, found.prompt, found.text)):
            raise ValueError(f"id, prompt and text of a prediction must be texts, found {data!r:.100}")
        return found


@dataclass(frozen=True)
class Verdict:
    """How one example was scored: the parsed answer and the credit it earned, from 0 to 1.

    An unanswered example has no parsed answer and no credit.
    """

    id: str
    answer: str
    credit: float
    answered: bool = True

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Total:
    """What a benchmark makes of its verdicts: its value, sub-scores by name, and counts worth telling."""

    value: float
    groups: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A benchmark's result: `value` out of `maximum`, in the benchmark's own unit, over `n` examples.

    `groups` holds sub-scores, `counts` what else is worth telling; `unanswered` counts examples without a prediction,
    which earn nothing. `error` is the standard error of `value` (None where it cannot be told). `otherwise` is the
    value under the other `rule`, where that differs.
    """

    benchmark: str
    value: float
    n: int
    unanswered: int = 0
    groups: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    maximum: float = 100.0
    error: float | None = None
    rule: Rule = "published"
    otherwise: float | None = None

    @property
    def percent(self) -> float:
        """The value in per cent of the maximum (MME-P / 20 and the others as they are)."""
        return 100 * self.value / self.maximum

    def summary(self) -> str:
        """One line: the value, what it is over, and the widest sub-scores."""
        error = f" ± {self.error:.2f} (standard error)" if self.error is not None else ""
        top = f" of {self.maximum:,.0f}" if self.maximum != 100 else ""
        notes = [f"{self.unanswered} unanswered"] if self.unanswered else []
        notes += [f"{count} {what}" for what, count in self.counts.items() if count]
        if self.otherwise is not None:
            other = "corrected" if self.rule == "published" else "published"
            notes.append(f"{self.otherwise:.2f} by the {other} rule")
        wide = [f"{name} {value:.1f}" for name, value in self.groups.items() if "/" not in name]
        groups = ", ".join(wide[:_SHOWN]) + (", …" if len(wide) > _SHOWN else "")
        return (
            f"{self.benchmark}: {self.value:.2f}{top}{error} over {self.n:,} questions"
            + "".join(f", {note}" for note in notes)
            + (f" ({groups})" if groups else "")
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Score":
        """The inverse of `to_json`; raises ValueError or TypeError on a field or a number that no score has."""
        found = cls(**data)
        if not isinstance(found.benchmark, str) or found.rule not in get_args(Rule):
            raise ValueError(f"a score has the name of a benchmark and one of its rules, found {data!r:.100}")
        told = [number for number in (found.error, found.otherwise) if number is not None]
        for number in (found.value, *found.groups.values(), *told):
            at_least(0, finite(number))
        for count in (found.n, found.unanswered, *found.counts.values()):
            at_least(0, whole(count))
        if found.value > finite(found.maximum) * (1 + 1e-9) or found.maximum <= 0:
            raise ValueError(f"a score of {found.value} lies beyond its maximum, {found.maximum}")
        if found.unanswered > found.n:
            raise ValueError(f"{found.unanswered} of {found.n} questions are without an answer")
        return found


class Benchmark(Protocol):
    """The plug point: what an answer is worth, and what the answers come to."""

    @property
    def name(self) -> str:
        """What the score is filed under."""
        ...

    @property
    def rule(self) -> Rule:
        """How answers are judged."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """The longest answer in tokens, as published."""
        ...

    @property
    def pads(self) -> bool:
        """Whether images are padded to squares; the reference cuts ScienceQA's in place of that."""
        ...

    def judge(self, example: Example, text: str) -> Verdict:
        """Parse the raw `text` and give it credit from 0 to 1."""
        ...

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        """The value and its sub-scores; `verdicts` are aligned with `examples`, either may be empty."""
        ...

    def maximum(self, examples: Sequence[Example]) -> float:
        """What perfect answers to these examples come to."""
        ...


class Published(Benchmark, Protocol):
    """A benchmark that comes as a folder of files and has a scorer of its authors."""

    @property
    def source(self) -> str:
        """Where to get the files, one sentence."""
        ...

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the examples from this benchmark's folder `root`; images that files contain go to `scratch`.

        Raises:
            DataError: naming what is missing or wrong, and where to get it.
        """
        ...

    def surplus(self, root: Path) -> list[str]:
        """Names in the folder that are not the benchmark's."""
        ...

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write the result files that the reference's own scorer reads; returns them."""
        ...

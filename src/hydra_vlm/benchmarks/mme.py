"""MME: pairs of yes/no questions in fourteen categories, each worth accuracy + accuracy+, at most 200. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from hydra_vlm.benchmarks.folder import (
    first_of,
    image_path,
    read_lines,
    reference_answer,
    require_images,
    surplus_entries,
)
from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Total, Verdict
from hydra_vlm.benchmarks.scoring import percent
from hydra_vlm.data.prompts import SHORT_ANSWER
from hydra_vlm.errors import DataError, FileError
from hydra_vlm.files import write_lines, write_text
from hydra_vlm.reading import read_text

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
CATEGORIES = PERCEPTION + COGNITION

_QUESTIONS = "llava_mme.jsonl"
_RELEASES = ("MME_Benchmark_release_version", "MME_Benchmark", "images")
_ASKING = "Please answer yes or no."
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_KNOWN = (_QUESTIONS, *_RELEASES, *CATEGORIES, "answers", "eval_tool", "*.py", "*.zip", "*.md", "readme*", "README*")


@dataclass(frozen=True)
class _Line:
    """One line of a ground-truth file, as it is there; `number` counts from 0, empty lines too."""

    category: str
    file: str
    number: int
    question: str
    answer: str
    image: Path

    @property
    def id(self) -> str:
        return f"{self.category}/{self.file}#{self.number}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.category, PurePosixPath(self.file).stem, _bare(self.question)


@dataclass(frozen=True)
class MME:
    """Scored as the official calculation.py does, questions asked as LLaVA's llava_mme.jsonl words them.

    The value is the perception total (2000 at most); cognition is a group. Published rule: the first four characters
    of the answer, in lower case, hold "yes" or else "no" ("Not sure" is a no, "A: yes" neither). Corrected rule: the
    first word is yes, no, y or n. Neither is wrong.
    """

    rule: Rule = "published"
    name: ClassVar[str] = "mme"
    max_new_tokens: ClassVar[int] = 128
    pads: ClassVar[bool] = True
    source: ClassVar[str] = (
        "MME comes from its authors on request (MME_Benchmark_release_version: fourteen folders of images and txt "
        "files; see github.com/BradyFU/Awesome-Multimodal-Large-Language-Models), "
        "and llava_mme.jsonl, which is optional, in the eval.zip of LLaVA's evaluation guide."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the release, flat or with images/ and questions_answers_YN/, and LLaVA's wording where it is there.

        A part of the fourteen categories is read as it is; the score says how many are absent.

        Raises:
            DataError: no category, a line that is not "question TAB answer", an image without its two questions or
                questions without their image, questions of llava_mme.jsonl that do not match.
        """
        lines = _read_release(self._release(root), self.source)
        path = root / _QUESTIONS
        prompts = _read_prompts(path, lines, self.source) if path.exists() else {}
        require_images((line.image for line in lines), self.source)
        return [
            Example(
                id=line.id,
                image=str(line.image),
                question=prompts.get(line.id) or _prompt(line.question),
                answers=(line.answer.lower(),),
                group=line.category,
                unit=f"{line.category}/{line.file}",
            )
            for line in lines
        ]

    def judge(self, example: Example, text: str) -> Verdict:
        answer = parse_published(text) if self.rule == "published" else parse_corrected(text)
        return Verdict(example.id, answer, float(answer == example.answers[0]))

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        """A category's score is 100 x accuracy + 100 x the share of images with all answers right (accuracy+)."""
        images: dict[str, dict[str, list[float]]] = {}
        for example, verdict in zip(examples, verdicts, strict=True):
            images.setdefault(example.group, {}).setdefault(example.unit, []).append(verdict.credit)
        scores: dict[str, float] = {}
        parts: dict[str, float] = {}
        for category in (name for name in CATEGORIES if name in images):
            answers = list(images[category].values())
            accuracy, plus = (
                percent([c for image in answers for c in image]),
                percent([min(image) for image in answers]),
            )
            scores[category] = accuracy + plus
            parts |= {f"{category}/accuracy": accuracy, f"{category}/accuracy+": plus}
        totals = {
            name: sum(scores[c] for c in members if c in scores)
            for name, members in (("perception", PERCEPTION), ("cognition", COGNITION))
            if any(c in scores for c in members)
        }
        counts = {
            "answers neither yes nor no": sum(v.answered and v.answer == "other" for v in verdicts),
            "absent categories": len(CATEGORIES) - len(scores),
        }
        return Total(next(iter(totals.values()), 0.0), totals | scores | parts, counts)

    def maximum(self, examples: Sequence[Example]) -> float:
        """200 a category of perception: 2000 for all; of cognition (800) where there is no other."""
        present = {example.group for example in examples}
        return 200.0 * (len(present & set(PERCEPTION)) or len(present & set(COGNITION)) or len(PERCEPTION))

    def surplus(self, root: Path) -> list[str]:
        names = surplus_entries(root, _KNOWN)
        release = _find_release(root)
        if release is None or release == root:
            return names
        inside = surplus_entries(release, (*_KNOWN, "*.txt"))
        return names + [f"{release.relative_to(root).as_posix()}/{name}" for name in inside]

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write results/<category>.txt for calculation.py, and answers.jsonl for convert_answer_to_mme.py.

        The two lines of an image follow each other, since calculation.py pairs lines by position. Both tools need
        every question of all fourteen categories: what a sample leaves out is absent. An unanswered question has an
        empty answer, which calculation.py counts as wrong. Tabs and line ends in answers become spaces.
        """
        release = self._release(root)
        said = {prediction.id: _one_line(prediction.text) for prediction in predictions}
        asked = {example.id: example.question for example in examples}
        lines = [line for line in _read_release(release, self.source) if line.id in asked]
        results: dict[str, str] = {}
        answers: list[dict[str, Any]] = []
        for line in lines:
            text = said.get(line.id, "")
            row = "\t".join((line.file, line.question, line.answer, text)) + "\n"
            results[line.category] = results.get(line.category, "") + row
            question_id = line.image.relative_to(release).as_posix()
            answers.append(reference_answer(question_id, asked[line.id], text))
        for category, rows in results.items():
            write_text(folder / "results" / f"{category}.txt", rows)
        write_lines(folder / "answers.jsonl", answers)
        return [*(folder / "results" / f"{category}.txt" for category in results), folder / "answers.jsonl"]

    def _release(self, root: Path) -> Path:
        release = _find_release(root)
        if release is None:
            raise DataError(
                f"{root} has none of MME's category folders (existence, count, …), neither directly nor in "
                f"{' or '.join(_RELEASES)}. {self.source}"
            )
        return release


def parse_published(text: str) -> str:
    """yes, no or other, by the first four characters (MME's calculation.py, parse_pred_ans)."""
    head = _one_line(text).lower()[:4]
    return next((word for word in ("yes", "no") if word in head), "other")


def parse_corrected(text: str) -> str:
    """yes, no or other, by the first word; hyphens, apostrophes and slashes join a word ("n/a"), other marks end it."""
    word = re.search(r"[^\W_][\w'’/-]*", text.lower())
    return {"yes": "yes", "y": "yes", "no": "no", "n": "no"}.get(word.group().rstrip("_'’/-") if word else "", "other")


def _one_line(text: str) -> str:
    return re.sub(r"[\t\r\n]", " ", text)


def _bare(question: str) -> str:
    """The question itself, without what is asked of the answer and with single spaces: the key of the join."""
    return " ".join(question.replace(SHORT_ANSWER, " ").replace(_ASKING, " ").split())


def _prompt(question: str) -> str:
    return f"{question.replace(_ASKING, '').strip()}\n{SHORT_ANSWER}"


def _find_release(root: Path) -> Path | None:
    """The folder that holds the categories; some unpack to MME_Benchmark_release_version/MME_Benchmark."""
    places = [root / first / second for first in _RELEASES for second in ("", "MME_Benchmark")]
    return next((p for p in [*places, root] if any((p / category).is_dir() for category in CATEGORIES)), None)


def _read_release(release: Path, source: str) -> list[_Line]:
    lines = []
    for category in (name for name in CATEGORIES if (release / name).is_dir()):
        folder = release / category
        texts, pictures = first_of(folder, ["questions_answers_YN"]) or folder, first_of(folder, ["images"]) or folder
        images = {p.stem: p for p in sorted(pictures.iterdir(), reverse=True) if p.suffix.lower() in _PICTURES}
        files = sorted(path for path in texts.glob("*.txt") if not path.name.startswith("."))
        if not files:
            raise DataError(f"{folder} has no txt file with questions and answers. {source}")
        for path in files:
            found = images.get(path.stem)
            image = Path(image_path(pictures, found.name)) if found else pictures / f"{path.stem}.*"
            lines += _read_pair(path, category, image)
    return lines


def _read_pair(path: Path, category: str, image: Path) -> list[_Line]:
    """The two questions about one image."""
    try:
        text = read_text(path)
    except FileError as problem:
        raise DataError(f"{problem}: get it again") from None
    lines = []
    for number, line in enumerate(text.split("\n")):
        if not line.strip():
            continue
        question, _, answer = line.strip().partition("\t")
        if answer.lower() not in ("yes", "no"):
            raise DataError(
                f'{path}, line {number + 1} is not "question TAB Yes or No": {line.strip()!r}; get it again'
            )
        lines.append(_Line(category, path.name, number, question, answer, image))
    if len(lines) != 2:
        raise DataError(f"{path} has {len(lines)} questions, an image of MME has two: get it again")
    return lines


def _read_prompts(path: Path, lines: Sequence[_Line], source: str) -> dict[str, str]:
    """The wording of LLaVA's file by example id, joined by category, file and question.

    Equal questions of one file are taken in their order. Rows of categories that are absent from the release do not
    count: their absence is told with the score.
    """
    waiting: dict[tuple[str, str, str], list[str]] = {}
    for line in lines:
        waiting.setdefault(line.key, []).append(line.id)
    present = {line.category for line in lines}
    prompts: dict[str, str] = {}
    unknown = []
    for row in read_lines(path, ("question_id", "text")):
        place = PurePosixPath(str(row["question_id"]))
        category, text = place.parts[0] if place.parts else "", str(row["text"]).replace("<image>", "").strip()
        ids = waiting.get((category, place.stem, _bare(text)))
        if ids:
            prompts[ids.pop(0)] = text
        elif category in present or category not in CATEGORIES:
            unknown.append(f"{place}: {_bare(text)}")
    left = [id for ids in waiting.values() for id in ids]
    for rows, problem in ((unknown, "questions have no ground truth"), (left, "ground-truth lines have no question")):
        if rows:
            raise DataError(f"{path}: {len(rows)} {problem}, such as {', '.join(map(repr, rows[:3]))}. {source}")
    return prompts

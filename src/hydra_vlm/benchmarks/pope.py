"""POPE: "is there a … in the image?", three ways of choosing the absent objects; F1 of yes. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from hydra_vlm.benchmarks.folder import (
    first_of,
    image_path,
    read_lines,
    reference_answer,
    require,
    require_images,
    surplus_entries,
)
from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Total, Verdict
from hydra_vlm.data.prompts import SHORT_ANSWER
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_lines

SPLITS = ("random", "popular", "adversarial")

_QUESTIONS = "llava_pope_test.jsonl"
_IMAGES = ("val2014", "coco/val2014", "images")
_KNOWN = (_QUESTIONS, "coco", "output", "val2014", "images", "coco_pope_*.json", "answers", "*.py", "*.zip", "*.md")


@dataclass(frozen=True)
class _Line:
    """One line of an annotation file; `row` is the line as it is there, `question` LLaVA's row for it."""

    split: str
    row: dict[str, Any]
    question: dict[str, Any] | None = None

    @property
    def id(self) -> str:
        return f"{self.split}/{self.row['question_id']}"

    @property
    def key(self) -> tuple[str, str, str]:
        return self.split, str(self.row["image"]), _bare(str(self.row["text"]))


@dataclass(frozen=True)
class POPE:
    """Scored as LLaVA's eval_pope.py does, except that answers and labels are joined by (split, image, question).

    The value is the mean over the splits of F1 in per cent, yes being positive. Published rule: up to the first full
    stop and without commas, an answer with "No", "no" or "not" as a word between single spaces is a no; every other
    is a yes ("NO", "There isn't" and an empty one too). Corrected rule: the first word that is yes or no, in any
    case; an answer with neither counts as the opposite of its label, as an unanswered question does.
    """

    rule: Rule = "published"
    name: ClassVar[str] = "pope"
    max_new_tokens: ClassVar[int] = 128
    pads: ClassVar[bool] = True
    source: ClassVar[str] = (
        "coco_pope_{random,popular,adversarial}.json are in output/coco of github.com/AoiDragon/POPE (commit e3e3926 "
        "has the 2,910 random lines that LLaVA uses), val2014 is COCO's (images.cocodataset.org), "
        "and llava_pope_test.jsonl, which is optional, is in the eval.zip of LLaVA's evaluation guide."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the three annotation files and LLaVA's wording where it is there; without it, all lines are examples.

        Versions of POPE differ: random has 2,910 or 3,000 lines, and "imange" became "image". With LLaVA's file only
        lines that it asks about are examples, in the annotation files' order; `surplus` counts the others.

        Raises:
            DataError: a file or image is missing, a label is neither yes nor no, an id occurs twice, or no question
                of llava_pope_test.jsonl belongs to a line.
        """
        lines = self._lines(root)
        images = require(root, _IMAGES, self.source)
        examples = [
            Example(
                id=line.id,
                image=image_path(images, line.row["image"]),
                question=str(line.question["text"]).replace("<image>", "").strip(),
                answers=(line.row["label"],),
                group=line.split,
            )
            for line in lines
            if line.question is not None
        ]
        require_images((example.image for example in examples if example.image), self.source)
        return examples

    def judge(self, example: Example, text: str) -> Verdict:
        answer = parse_published(text) if self.rule == "published" else parse_corrected(text)
        return Verdict(example.id, answer, float(answer == example.answers[0]))

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        """Per split F1 under its own name, and accuracy, precision, recall, F1 and yes ratio, all in per cent."""
        groups: dict[str, float] = {}
        for split in (name for name in SPLITS if any(example.group == name for example in examples)):
            pairs = [
                (example.answers[0] == "yes", verdict.credit > 0)
                for example, verdict in zip(examples, verdicts, strict=True)
                if example.group == split
            ]
            measures = _measures(pairs)
            groups[split] = measures["f1"]
            groups |= {f"{split}/{name}": value for name, value in measures.items()}
        values = [groups[split] for split in SPLITS if split in groups]
        neither = sum(v.answered and v.answer == "other" for v in verdicts)
        return Total(_share(sum(values), len(values)), groups, {"answers neither yes nor no": neither})

    def maximum(self, examples: Sequence[Example]) -> float:
        return 100.0

    def surplus(self, root: Path) -> list[str]:
        """Also how many annotation lines have no question, and how many questions no annotation line."""
        names = surplus_entries(root, _KNOWN)
        if not (root / _QUESTIONS).exists():
            return names
        try:
            lines, questions = _read_labels(root, self.source), _read_questions(root / _QUESTIONS)
        except DataError:  # loading says what is wrong
            return names
        for split, path in _annotations(root, self.source).items():
            alone = sum(line.split == split and line.key not in questions for line in lines)
            names += [f"{path.relative_to(root).as_posix()}: {alone} lines have no question"] if alone else []
        alone = len(questions.keys() - {line.key for line in lines})
        return names + ([f"{_QUESTIONS}: {alone} questions have no label"] if alone else [])

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write answers.jsonl for eval_pope.py, and questions.jsonl and coco/ that hold these examples alone.

        eval_pope.py joins answers and labels by position, so the answers follow the annotation files. It scores all
        of POPE with the files of `root`; a sample, or annotation files with lines that LLaVA does not ask about, only
        with the files written here (--question-file questions.jsonl --annotation-dir coco). An unanswered question
        has an empty answer, which eval_pope.py takes for a yes.
        """
        said = {prediction.id: prediction.text for prediction in predictions}
        asked = {example.id: example.question for example in examples}
        lines = [line for line in self._lines(root) if line.id in asked]
        ids = {line.id: (line.question or {}).get("question_id", line.id) for line in lines}
        answers = [reference_answer(ids[line.id], asked[line.id], said.get(line.id, "")) for line in lines]
        questions = [
            {"question_id": ids[n.id], "image": n.row["image"], "text": asked[n.id], "category": n.split} for n in lines
        ]
        files: dict[Path, list[dict[str, Any]]] = {
            folder / "answers.jsonl": answers,
            folder / "questions.jsonl": questions,
        }
        for line in lines:
            files.setdefault(folder / "coco" / f"coco_pope_{line.split}.json", []).append(line.row)
        for path, rows in files.items():
            write_lines(path, rows)
        return list(files)

    def _lines(self, root: Path) -> list[_Line]:
        """The annotation lines with their questions (None: LLaVA's file has none); composed where there is no file."""
        lines = _read_labels(root, self.source)
        path = root / _QUESTIONS
        if not path.exists():
            return [_Line(n.split, n.row, {"text": f"{str(n.row['text']).strip()}\n{SHORT_ANSWER}"}) for n in lines]
        questions = _read_questions(path)
        lines = [_Line(line.split, line.row, questions.get(line.key)) for line in lines]
        if all(line.question is None for line in lines):
            raise DataError(f"{path}: none of its questions belongs to a line of coco_pope_*.json. {self.source}")
        return lines


def parse_published(text: str) -> str:
    """yes or no (LLaVA's eval_pope.py)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_corrected(text: str) -> str:
    """The first word that is yes or no; other without one."""
    return next((word for word in re.findall(r"\w+", text.lower()) if word in ("yes", "no")), "other")


def _measures(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Of (label is yes, answered right) pairs, in per cent; what has no denominator is 0."""
    tp, tn = pairs.count((True, True)), pairs.count((False, True))
    fp, fn = pairs.count((False, False)), pairs.count((True, False))
    return {
        "accuracy": 100 * _share(tp + tn, len(pairs)),
        "precision": 100 * _share(tp, tp + fp),
        "recall": 100 * _share(tp, tp + fn),
        "f1": 100 * _share(2 * tp, 2 * tp + fp + fn),
        "yes ratio": 100 * _share(tp + fp, len(pairs)),
    }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _bare(text: str) -> str:
    """The question in a form that all versions of POPE have in common."""
    return " ".join(text.replace(SHORT_ANSWER, " ").lower().replace("imange", "image").split())


def _annotations(root: Path, source: str) -> dict[str, Path]:
    """The annotation file of each split."""
    folder = first_of(root, ["coco/coco_pope_random.json", "output/coco/coco_pope_random.json"])
    place = folder.parent.relative_to(root).as_posix() + "/" if folder else ""
    names = [f"{place}coco_pope_{split}.json" for split in SPLITS]
    missing = [name for name in names if not (root / name).is_file()]
    if missing:
        raise DataError(f"{root} has no {', '.join(missing)}. {source}")
    return {split: root / name for split, name in zip(SPLITS, names, strict=True)}


def _read_labels(root: Path, source: str) -> list[_Line]:
    lines = []
    for split, path in _annotations(root, source).items():
        rows = read_lines(path, ("question_id", "image", "text", "label"))
        ids = [row["question_id"] for row in rows]
        for id, row in zip(ids, rows, strict=True):
            if row["label"] not in ("yes", "no"):
                raise DataError(f"{path}: question {id} has the label {row['label']!r}, not yes or no. {source}")
        if len(set(ids)) < len(ids):
            twice = next(id for id in ids if ids.count(id) > 1)
            raise DataError(f"{path}: question_id {twice} occurs twice: get the file again. {source}")
        lines += [_Line(split, row) for row in rows]
    return lines


def _read_questions(path: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    rows = read_lines(path, ("question_id", "image", "text", "category"))
    return {(str(row["category"]), str(row["image"]), _bare(str(row["text"]))): row for row in rows}

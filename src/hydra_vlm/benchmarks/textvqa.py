"""TextVQA: questions about writing in pictures, ten people's answers each, soft accuracy. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.benchmarks.folder import (
    image_path,
    read_lines,
    read_object,
    reference_answer,
    require,
    require_images,
    surplus_entries,
)
from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Total, Verdict
from hydra_vlm.benchmarks.scoring import mean_total
from hydra_vlm.benchmarks.vqa_answers import process
from hydra_vlm.data.prompts import SHORT_ANSWER
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_lines

QUESTIONS = "llava_textvqa_val_v051_ocr.jsonl"
ANNOTATIONS = "TextVQA_0.5.1_val.json"
OCR = "TextVQA_Rosetta_OCR_v0.2_val.json"
IMAGES = "train_images"
OCR_LINE = "Reference OCR token: "

CREDIT = (0.0, 0.3, 0.6, 0.9, 1.0)
"""By how many of the ten answers are the same: the mean over leaving one out of min(1, matches / 3)."""

Key = tuple[str, str]  # image id, question in lower case


@dataclass(frozen=True)
class TextVQA:
    """TextVQA 0.5.1, validation, as MobileVLM and LLaVA-1.5 score it (eval_textvqa.py, m4c_evaluator.py).

    An answer earns 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or more equal ones among the ten, after `vqa_answers.process`
    by the same `rule`. With LLaVA's question file the prompts are its own; without it they are composed as there:
    question, OCR tokens if the Rosetta file is in the folder, short-answer line.
    """

    rule: Rule = "published"
    name = "textvqa"
    max_new_tokens = 128
    pads = True
    source = (
        f"Get {ANNOTATIONS} and the images (train_val_images.zip, whose folder is {IMAGES}) from textvqa.org/dataset, "
        f"and {QUESTIONS} from LLaVA's eval.zip or MobileVLM's benchmark_data.zip."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the folder `root`; the id of an example is the question id of the annotations.

        Raises:
            DataError: a file or image is missing, an annotation has not ten answers, questions and annotations do
                not join one to one.
        """
        annotations = _annotations(require(root, [ANNOTATIONS], self.source))
        asked, images = _asked(root, annotations, self.source), root / IMAGES
        examples = [
            Example(_id(annotation), image_path(images, asked[key][0]), asked[key][1], tuple(annotation["answers"]))
            for key, annotation in annotations.items()
        ]
        require_images((example.image or "" for example in examples), self.source)
        return examples

    def surplus(self, root: Path) -> list[str]:
        return surplus_entries(root, [QUESTIONS, ANNOTATIONS, OCR, IMAGES, "eval.py"])

    def judge(self, example: Example, text: str) -> Verdict:
        answer = process(text, self.rule)
        matches = sum(answer == process(other, self.rule) for other in example.answers)
        return Verdict(example.id, answer, CREDIT[min(matches, len(CREDIT) - 1)])

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        return mean_total(examples, verdicts)

    def maximum(self, examples: Sequence[Example]) -> float:
        return 100.0

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write predictions.jsonl for eval_textvqa.py, which joins by image id and the question in the prompt.

        An unanswered question has an empty text. The reference scores the lines that are there, so that a sample
        gives the sample's number, whereas only all questions give the published one.
        """
        images = {_id(a): a["image_id"] for a in _annotations(require(root, [ANNOTATIONS], self.source)).values()}
        said = {prediction.id: prediction.text for prediction in predictions}
        path = folder / "predictions.jsonl"
        write_lines(path, (reference_answer(images[e.id], e.question, said.get(e.id, "")) for e in examples))
        return [path]


def _annotations(path: Path) -> dict[Key, dict[str, Any]]:
    """The annotations by image id and question."""
    content = read_object(path)
    rows = content.get("data") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise DataError(f"{path} must hold an object with a list `data`")
    found: dict[Key, dict[str, Any]] = {}
    ids = set()
    for number, row in enumerate(rows):
        missing = [key for key in ("image_id", "question", "answers") if not isinstance(row, dict) or key not in row]
        if missing:
            raise DataError(f"{path}, entry {number} lacks the key {missing[0]!r}: the test split has no answers")
        answers = row["answers"]
        if not isinstance(answers, list) or len(answers) != 10 or not all(isinstance(a, str) for a in answers):
            raise DataError(f"{path}, entry {number} (question {_id(row)}) must have 10 answers for the soft accuracy")
        key = (str(row["image_id"]), row["question"].lower())
        if key in found or _id(row) in ids:
            raise DataError(f"{path}, entry {number}: question {_id(row)} ({row['question']!r}) is there twice")
        ids.add(_id(row))
        found[key] = row
    return found


def _id(annotation: dict[str, Any]) -> str:
    """The question id; where there is none, image id and question, which are the key of the reference."""
    return str(annotation.get("question_id", f"{annotation['image_id']}: {annotation['question'].lower()}"))


def _asked(root: Path, annotations: dict[Key, dict[str, Any]], source: str) -> dict[Key, tuple[str, str]]:
    """Image file name and prompt of each annotation, from LLaVA's question file or composed as there."""
    path = root / QUESTIONS
    if not path.exists():
        return _composed(root, annotations, source)
    asked: dict[Key, tuple[str, str]] = {}
    for number, row in enumerate(read_lines(path, ("question_id", "image", "text")), start=1):
        question = asked_question(row["text"])
        if question is None:
            raise DataError(f"{path}, question {number}: no question in {row['text']!r}; it must be its first line")
        key = (str(row["question_id"]), question.lower())
        if key in asked:
            raise DataError(f"{path}: image {key[0]} is asked {question!r} twice")
        asked[key] = (row["image"], row["text"])
    for have, lack, where in ((asked, annotations, ANNOTATIONS), (annotations, asked, QUESTIONS)):
        apart = [key for key in have if key not in lack]
        if apart:
            image, question = apart[0]
            raise DataError(
                f"{root / where} lacks {len(apart)} question(s) that the other file has, such as {question!r} "
                f"about image {image}: take both files of one release. {source}"
            )
    return asked


def asked_question(prompt: str) -> str | None:
    """The question in a prompt of LLaVA's TextVQA files, by the three forms that eval_textvqa.py knows."""
    lines = prompt.split("\n")
    if prompt.startswith("OCR tokens: "):
        found = re.search(r"Question: (.*?) Short answer:", prompt, re.DOTALL)
        return found[1] if found else None
    if OCR_LINE in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(OCR_LINE.strip()) else lines[0]
    return lines[0] if len(lines) == 2 else None


def _composed(root: Path, annotations: dict[Key, dict[str, Any]], source: str) -> dict[Key, tuple[str, str]]:
    """Prompts as in LLaVA's file: the question capitalised; the OCR line is there even where no token was found."""
    require(root, [IMAGES], source)
    tokens = _tokens(root / OCR) if (root / OCR).exists() else None
    asked = {}
    for key, annotation in annotations.items():
        image = key[0]
        if tokens is not None and image not in tokens:
            raise DataError(f"{root / OCR} has no image {image}: it must be the file of the same split. {source}")
        line = [OCR_LINE + ", ".join(tokens[image])] if tokens is not None else []
        prompt = "\n".join([annotation["question"].capitalize(), *line, SHORT_ANSWER])
        asked[key] = (f"{image}.jpg", prompt)
    return asked


def _tokens(path: Path) -> dict[str, list[str]]:
    try:
        return {str(row["image_id"]): row["ocr_tokens"] for row in read_object(path)["data"]}
    except (KeyError, TypeError):
        raise DataError(f"{path} must hold a list `data` of objects with `image_id` and `ocr_tokens`") from None

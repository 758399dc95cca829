"""GQA's balanced test-dev: short answers that must be equal to the reference. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

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
from hydra_vlm.data.prompts import SHORT_ANSWER
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_json, write_lines

_QUESTIONS = "llava_gqa_testdev_balanced.jsonl"
_TRUTH = tuple(
    f"{place}testdev_balanced_questions.json"
    for place in ("", "data/", "data/questions1.2/", "data/questions/", "questions1.2/", "questions/")
)
_IMAGES = ("images", "data/images")
_KNOWN = (_QUESTIONS, "testdev_balanced_*.json", "images", "data", "questions*", "answers", "eval", "*.py", "*.zip")
_ARTICLES = ("a", "an", "the")


@dataclass(frozen=True)
class GQA:
    """Scored as LLaVA's convert_gqa_for_eval.py and GQA's eval.py do; the value is accuracy in per cent.

    Published rule: without final full stops and in lower case, the answer is the reference letter for letter.
    Corrected rule: white space around and leading articles do not count either.
    """

    rule: Rule = "published"
    name: ClassVar[str] = "gqa"
    max_new_tokens: ClassVar[int] = 128
    pads: ClassVar[bool] = True
    source: ClassVar[str] = (
        "testdev_balanced_questions.json (questions1.2.zip) and the images are GQA's (cs.stanford.edu/people/dorarad/"
        "gqa/download.html), and llava_gqa_testdev_balanced.jsonl, which is optional, is in the eval.zip of LLaVA's "
        "evaluation guide."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the balanced questions, and LLaVA's wording where it is there, joined by question id.

        Raises:
            DataError: a file or image is missing, a question lacks a key, or LLaVA's questions are not the same ones.
        """
        path = require(root, _TRUTH, self.source)
        truth = _read_truth(path)
        images = require(root, _IMAGES, self.source)
        rows = _read_rows(root / _QUESTIONS, path, truth, self.source) if (root / _QUESTIONS).exists() else {}
        names = {str(row["imageId"]) for row in truth.values()}
        pictures = {name: _picture(images, name) for name in names}
        examples = [
            Example(
                id=id,
                image=image_path(images, rows[id]["image"]) if id in rows else pictures[str(row["imageId"])],
                question=_wording(rows[id]["text"]) if id in rows else f"{row['question'].strip()}\n{SHORT_ANSWER}",
                answers=(row["answer"],),
                group="open" if row["types"]["structural"] == "query" else "binary",
            )
            for id, row in truth.items()
            if row["isBalanced"]
        ]
        require_images((example.image for example in examples if example.image), self.source)
        return examples

    def judge(self, example: Example, text: str) -> Verdict:
        answer, reference = published_answer(text), example.answers[0]
        if self.rule == "corrected":
            answer, reference = corrected_answer(text), corrected_answer(reference)
        return Verdict(example.id, answer, float(answer == reference))

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        return mean_total(examples, verdicts)

    def maximum(self, examples: Sequence[Example]) -> float:
        return 100.0

    def surplus(self, root: Path) -> list[str]:
        return surplus_entries(root, _KNOWN)

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write answers.jsonl for convert_gqa_for_eval.py, and what that makes of it for eval.py.

        eval.py needs every balanced question; what a sample leaves out is absent. An unanswered question has an empty
        answer, which eval.py counts as wrong.
        """
        said = {prediction.id: prediction.text for prediction in predictions}
        answers = [reference_answer(e.id, e.question, said.get(e.id, "")) for e in examples]
        converted = [{"questionId": row["question_id"], "prediction": published_answer(row["text"])} for row in answers]
        paths = [folder / "answers.jsonl", folder / "testdev_balanced_predictions.json"]
        write_lines(paths[0], answers)
        write_json(paths[1], converted)
        return paths


def published_answer(text: str) -> str:
    """Without final full stops, in lower case (LLaVA's convert_gqa_for_eval.py)."""
    return text.rstrip(".").lower()


def corrected_answer(text: str) -> str:
    """Also without white space around, before the full stops too, and without leading articles."""
    words = text.strip().rstrip(".").lower().split()
    while len(words) > 1 and words[0] in _ARTICLES:
        words = words[1:]
    return " ".join(words)


def _read_truth(path: Path) -> dict[str, dict[str, Any]]:
    """The questions by id, each with what is read of it."""
    truth = read_object(path)
    if not isinstance(truth, dict):
        raise DataError(f"{path} holds a {type(truth).__name__}, not questions by their ids: get it again")
    for id, row in truth.items():
        known = row.keys() if isinstance(row, dict) else ()
        for key in ("question", "imageId", "answer", "isBalanced", "types"):
            if key not in known:
                raise DataError(f"{path}: question {id} lacks the key {key!r}: get the file with answers and types")
        if not isinstance(row["types"], dict) or "structural" not in row["types"]:
            raise DataError(f"{path}: question {id} lacks the key 'types.structural': get the file again")
    return truth


def _read_rows(
    path: Path, truth_path: Path, truth: dict[str, dict[str, Any]], source: str
) -> dict[str, dict[str, Any]]:
    """LLaVA's rows by question id: each of a known question, none twice, every balanced question among them."""
    rows: dict[str, dict[str, Any]] = {}
    for row in read_lines(path, ("question_id", "image", "text")):
        id = str(row["question_id"])
        if id in rows:
            raise DataError(f"{path}: question_id {id!r} occurs twice: get the file again. {source}")
        rows[id] = row
    unknown = [id for id in rows if id not in truth]
    left = [id for id, row in truth.items() if row["isBalanced"] and id not in rows]
    for ids, problem in ((unknown, f"are not in {truth_path}"), (left, f"of {truth_path} are not there")):
        if ids:
            raise DataError(f"{path}: {len(ids)} questions {problem}, such as {', '.join(ids[:3])}. {source}")
    return rows


def _wording(text: Any) -> str:
    return str(text).replace("<image>", "").strip()


def _picture(images: Path, name: object) -> str:
    """The file of an image id: .jpg as released, or .png."""
    jpg, png = (image_path(images, f"{name}{suffix}") for suffix in (".jpg", ".png"))
    return png if Path(png).is_file() and not Path(jpg).is_file() else jpg

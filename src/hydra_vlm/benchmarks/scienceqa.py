"""ScienceQA-IMG: multiple choice on school science, the questions with a picture. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_vlm.benchmarks.folder import (
    image_path,
    read_object,
    reference_answer,
    require,
    require_images,
    surplus_entries,
)
from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Total, Verdict
from hydra_vlm.benchmarks.scoring import mean_total
from hydra_vlm.data.prompts import OPTION_LETTER, lettered
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_lines

QUESTIONS = "llava_test_CQM-A.json"
PROBLEMS = "problems.json"
SPLITS = "pid_splits.json"
IMAGES = ("images/test", "test")
LETTERS = "ABCDE"
FAILED = "FAILED"
"""The reference's word for an answer without a letter."""


@dataclass(frozen=True)
class ScienceQA:
    """ScienceQA's test questions with an image, as LLaVA-1.5 and MobileVLM score them (eval_science_qa.py).

    Published, exactly: the answer is a letter A to E, or begins with one, full stop and space; or "The answer is X"
    followed by any character but a new line occurs exactly once. Everything else is FAILED: "A.", "a", "(A)", "A)".
    Corrected: a letter alone in either case, with or without brackets and punctuation; one that begins the answer as
    "A.", "A)", "(A)" or "A:" do (in lower case only before a space); or the only capital that "answer is" names.

    A letter beyond the question's choices is wrong. An unanswered question counts as a wrong one with an image; the
    reference counts it as one without, which raises its IMG accuracy. `pads` is False: MobileVLM's generator for this
    benchmark alone cuts the image's centre whatever the model's configuration says.
    """

    rule: Rule = "published"
    name = "scienceqa"
    max_new_tokens = 1024
    pads = False
    source = (
        f"Get {PROBLEMS}, {SPLITS} and images/test from the ScienceQA repository (lupantech/ScienceQA, data/scienceqa),"
        f" and {QUESTIONS} from LLaVA's eval.zip or MobileVLM's benchmark_data.zip."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the folder `root`: LLaVA's question file, or prompts composed from the original release alone.

        Raises:
            DataError: a file or image is missing, a problem is incomplete, question file and problems do not join.
        """
        problems = _problems(root, self.source)
        asked = _asked(root, problems, self.source)
        images = require(root, IMAGES, self.source)
        examples = [
            Example(
                id=pid,
                image=image_path(images, image),
                question=f"{text}\n{OPTION_LETTER}",
                answers=(LETTERS[problems[pid]["answer"]],),
                group=str(problems[pid].get("subject", "")),
                options=tuple(problems[pid]["choices"]),
            )
            for pid, (image, text) in asked.items()
        ]
        require_images((example.image or "" for example in examples), self.source)
        return examples

    def surplus(self, root: Path) -> list[str]:
        return surplus_entries(root, [QUESTIONS, PROBLEMS, SPLITS, "images", "test", "captions.json", "eval.py"])

    def judge(self, example: Example, text: str) -> Verdict:
        answer = published_letter(text) if self.rule == "published" else corrected_letter(text)
        return Verdict(example.id, answer, float(answer == example.answers[0]))

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        """Accuracy, by subject too; counts the answers without a letter."""
        unreadable = sum(verdict.answer == FAILED for verdict in verdicts)
        return replace(mean_total(examples, verdicts), counts={"without a letter": unreadable})

    def maximum(self, examples: Sequence[Example]) -> float:
        return 100.0

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write predictions.jsonl for eval_science_qa.py, which knows image questions by "<image>" in the prompt.

        An unanswered question has an empty text. The reference needs every image question for its IMG accuracy; its
        accuracy over all questions has no meaning here, since those without an image are not asked.
        """
        said = {prediction.id: prediction.text for prediction in predictions}
        path = folder / "predictions.jsonl"
        write_lines(path, (reference_answer(e.id, f"<image>\n{e.question}", said.get(e.id, "")) for e in examples))
        return [path]


def published_letter(text: str) -> str:
    """The letter by the reference's three forms, or FAILED."""
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)  # the last mark is any character, as in the reference
    return found[0] if len(found) == 1 else FAILED


def corrected_letter(text: str) -> str:
    """The letter that a reader would take, or FAILED."""
    text = text.strip()
    alone = text.strip(" \t\r\n.,:;()[]{}*\"'`").upper()
    if len(alone) == 1 and alone in LETTERS:
        return alone
    first = re.match(r"[(\[*\s]*(?:([A-E])\**[.):\]]|([a-e])[.):\]]\s)", text)
    if first:
        return (first[1] or first[2]).upper()
    named = set(re.findall(r"(?i:\banswer is)[:\s]*[(\[*]*([A-E])(?!\w)", text))
    return named.pop() if len(named) == 1 else FAILED


def _problems(root: Path, source: str) -> dict[str, dict[str, Any]]:
    """The test split's problems that have an image, by id, in the split's order."""
    path, splits = require(root, [PROBLEMS], source), read_object(require(root, [SPLITS], source))
    everything = read_object(path)
    if not isinstance(splits, dict) or not isinstance(splits.get("test"), list) or not isinstance(everything, dict):
        raise DataError(f"{root / SPLITS} must hold a list `test` of problem ids, and {path} an object of problems")
    found: dict[str, dict[str, Any]] = {}
    for pid in map(str, splits["test"]):
        problem = everything.get(pid)
        if not isinstance(problem, dict):
            raise DataError(f"{path} lacks problem {pid} of the test split in {SPLITS}. {source}")
        if pid in found:
            raise DataError(f"{root / SPLITS} names problem {pid} twice in its test split")
        if not problem.get("image"):
            continue
        missing = [key for key in ("question", "choices", "answer") if key not in problem]
        if missing:
            raise DataError(f"{path}: problem {pid} lacks the key {missing[0]!r}. {source}")
        count, answer = len(problem["choices"]), problem["answer"]
        if not isinstance(answer, int) or not 0 <= answer < count <= len(LETTERS):
            raise DataError(f"{path}: problem {pid} has {count} choices (2 to 5 are read), its answer is {answer!r}")
        found[pid] = problem
    return found


def _asked(root: Path, problems: dict[str, dict[str, Any]], source: str) -> dict[str, tuple[str, str]]:
    """Image file and prompt without its last line by problem id, from LLaVA's question file or composed as there."""
    path = root / QUESTIONS
    if not path.exists():
        return {pid: (f"{pid}/{problem['image']}", composed(problem)) for pid, problem in problems.items()}
    records = read_object(path)
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a list of records with `id`, `image` and `conversations`")
    asked: dict[str, tuple[str, str]] = {}
    for number, record in enumerate(records):
        try:
            pid, text, image = str(record["id"]), record["conversations"][0]["value"], record.get("image")
        except (KeyError, TypeError, IndexError, AttributeError):
            raise DataError(f"{path}, record {number} lacks `id` or a first turn in `conversations`") from None
        if image is None:
            continue
        if pid in asked:
            raise DataError(f"{path} asks problem {pid} twice")
        asked[pid] = (image, str(text).replace("<image>", "").strip())
    for have, lack, where in ((asked, problems, PROBLEMS), (problems, asked, QUESTIONS)):
        apart = [pid for pid in have if pid not in lack]
        if apart:
            raise DataError(
                f"{root / where} lacks {len(apart)} of the test questions with an image, such as problem {apart[0]}: "
                f"take {QUESTIONS}, {PROBLEMS} and {SPLITS} of one release. {source}"
            )
    return {pid: asked[pid] for pid in problems}


def composed(problem: dict[str, Any]) -> str:
    """The prompt that LLaVA's question file has: context if there is one, question, a line for each option."""
    lines = [f"Context: {problem['hint']}"] if problem.get("hint") else []
    lines.append(problem["question"])
    lines.append(lettered(problem["choices"]))
    return "\n".join(lines).replace("  ", " ").strip()

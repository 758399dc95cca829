"""GQA: golden answers, every layout, and the reference's numbers from the files we write."""

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_vlm.benchmarks.gqa import GQA, corrected_answer
from hydra_vlm.benchmarks.protocol import Example, Prediction, Published
from hydra_vlm.benchmarks.scoring import score
from hydra_vlm.errors import DataError

SUFFIX = "Answer the question using a single word or phrase."
TRUTH = "testdev_balanced_questions.json"

GOLDEN = [  # answer, reference, right by the published rule, right by the corrected one
    ("dog", "dog", True, True),
    ("Dog", "dog", True, True),
    ("DOG", "dog", True, True),
    ("dog.", "dog", True, True),
    ("dog...", "dog", True, True),
    ("Yes", "yes", True, True),
    ("No.", "no", True, True),
    ("dog. ", "dog", False, True),
    (" dog", "dog", False, True),
    ("dog\n", "dog", False, True),
    ("dog .", "dog", False, True),
    (".dog", "dog", False, False),
    ("a dog", "dog", False, True),
    ("An orange", "orange", False, True),
    ("The dog.", "dog", False, True),
    ("the a dog", "dog", False, True),
    ("the", "the", True, True),
    ("a", "a", True, True),
    ("the", "a", False, False),
    ("theatre", "atre", False, False),
    ("dogs", "dog", False, False),
    ("dog,", "dog", False, False),
    ("dog!", "dog", False, False),
    ("", "dog", False, False),
    (".", "dog", False, False),
    ("tennis racket", "tennis racket", True, True),
    ("tennis  racket", "tennis racket", False, True),
    ("dog and cat", "dog", False, False),
    ("yes, it is", "yes", False, False),
    ("two", "2", False, False),
    ("to the left", "left", False, False),
    ("t-shirt", "t-shirt", True, True),
    ("t shirt", "t-shirt", False, False),
    ("É", "é", True, True),
]


def truth_of(count: int = 8) -> dict[str, dict[str, Any]]:
    """Alternately open and binary questions; each fourth one is not balanced."""
    return {
        f"20{number}": {
            "question": f"Is it number {number}?",
            "imageId": f"n{number // 2}",
            "answer": f"thing {number}" if number % 2 == 0 else "yes",
            "isBalanced": number % 4 != 3,
            "types": {"structural": "query" if number % 2 == 0 else "verify", "semantic": "attr"},
        }
        for number in range(count)
    }


def write_truth(path: Path, truth: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(truth_of() if truth is None else truth))


def write_images(folder: Path, suffix: str = ".jpg") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        (folder / f"n{number}{suffix}").touch()


def rows_of(suffix: str = ".jpg") -> list[dict[str, Any]]:
    """LLaVA's rows, last question first."""
    return [
        {
            "question_id": id,
            "image": row["imageId"] + suffix,
            "text": f"{row['question']}\n{SUFFIX}",
            "category": "default",
        }
        for id, row in reversed(truth_of().items())
        if row["isBalanced"]
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MobileVLM's layout."""
    folder = tmp_path_factory.mktemp("gqa")
    write_truth(folder / TRUTH)
    write_images(folder / "images")
    write_rows(folder / "llava_gqa_testdev_balanced.jsonl", rows_of())
    return folder


@pytest.fixture(scope="module")
def examples(root: Path) -> list[Example]:
    return GQA().load(root, root)


def answered(examples: Sequence[Example], texts: Sequence[str]) -> list[Prediction]:
    return [Prediction(example.id, "", text) for example, text in zip(examples, texts, strict=True)]


def perfect(examples: Sequence[Example]) -> list[Prediction]:
    return answered(examples, [example.answers[0] for example in examples])


def evaluate(truth: Path, predictions: Path) -> dict[str, float]:
    """GQA's evaluation as described: every balanced question needs a prediction, which must be equal."""
    said = {row["questionId"]: row["prediction"] for row in json.loads(predictions.read_text())}
    right: dict[str, list[bool]] = {"accuracy": [], "open": [], "binary": []}
    for id, row in json.loads(truth.read_text()).items():
        if row["isBalanced"]:
            correct = said[id] == row["answer"]
            right["accuracy"].append(correct)
            right["open" if row["types"]["structural"] == "query" else "binary"].append(correct)
    return {name: 100 * sum(values) / len(values) for name, values in right.items()}


@pytest.mark.parametrize(("text", "reference", "published", "corrected"), GOLDEN)
def test_golden_answers(text: str, reference: str, published: bool, corrected: bool) -> None:
    example = Example("i", None, "?", (reference,))
    assert GQA().judge(example, text).credit == float(published)
    assert GQA("corrected").judge(example, text).credit == float(corrected)


def test_the_reference_itself_is_not_lowered() -> None:
    """As there: only the prediction is put in lower case."""
    example = Example("i", None, "?", ("TV",))
    assert GQA().judge(example, "TV").credit == 0
    assert GQA("corrected").judge(example, "tv").credit == 1


@given(st.text(max_size=12), st.text(max_size=12))
def test_the_corrected_rule_forgives_and_never_takes(text: str, reference: str) -> None:
    example = Example("i", None, "?", (reference,))
    assert GQA("corrected").judge(example, text).credit >= GQA().judge(example, text).credit
    once = corrected_answer(text)
    assert corrected_answer(f"  the {text.strip()} ") in (once, "the")


def test_mobilevlms_layout(root: Path, examples: list[Example]) -> None:
    benchmark: Published = GQA()
    assert (benchmark.name, benchmark.max_new_tokens, benchmark.pads) == ("gqa", 128, True)
    assert benchmark.surplus(root) == []
    assert [example.id for example in examples] == ["200", "201", "202", "204", "205", "206"]
    assert [example.group for example in examples[:2]] == ["open", "binary"]
    assert examples[3] == Example(
        id="204",
        image=str(root / "images" / "n2.jpg"),
        question=f"Is it number 4?\n{SUFFIX}",
        answers=("thing 4",),
        group="open",
    )


@pytest.mark.parametrize("truth", [TRUTH, f"data/{TRUTH}", f"data/questions1.2/{TRUTH}", f"questions1.2/{TRUTH}"])
@pytest.mark.parametrize("images", ["images", "data/images"])
@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_every_layout_gives_the_same_examples(
    tmp_path: Path, examples: list[Example], truth: str, images: str, suffix: str
) -> None:
    write_truth(tmp_path / truth)
    write_images(tmp_path / images, suffix)
    alone = GQA().load(tmp_path, tmp_path)
    write_rows(tmp_path / "llava_gqa_testdev_balanced.jsonl", rows_of(suffix))
    assert GQA().load(tmp_path, tmp_path) == alone
    assert [(e.id, e.question, e.answers, e.group) for e in alone] == [
        (e.id, e.question, e.answers, e.group) for e in examples
    ]
    assert alone[0].image == str(tmp_path / images / f"n0{suffix}")
    assert GQA().surplus(tmp_path) == []


def test_untidy_files(tmp_path: Path, examples: list[Example]) -> None:
    """Byte order marks, Windows line ends, empty lines, a separator of lines within a text, ids that are numbers."""
    (tmp_path / TRUTH).write_bytes(b"\xef\xbb\xbf" + json.dumps(truth_of(), indent=1).replace("\n", "\r\n").encode())
    write_images(tmp_path / "images")
    rows = [row | {"question_id": int(row["question_id"]), "text": row["text"] + "\u2028"} for row in rows_of()]
    lines = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "llava_gqa_testdev_balanced.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert [(e.id, e.question) for e in GQA().load(tmp_path, tmp_path)] == [(e.id, e.question) for e in examples]


def test_perfect_answers_score_the_maximum(examples: list[Example]) -> None:
    for rule in ("published", "corrected"):
        result, _ = score(GQA(rule), examples, perfect(examples))
        assert (result.value, result.maximum, result.groups) == (100, 100, {"binary": 100, "open": 100})
        assert score(GQA(rule), examples[::-1], perfect(examples)[::-1])[0] == result


def test_nothing_answered(examples: list[Example]) -> None:
    result, _ = score(GQA(), examples, [])
    assert (result.value, result.unanswered, result.groups) == (0, 6, {"binary": 0, "open": 0})
    assert score(GQA(), [], [])[0].value == 0


TEXTS = st.one_of(
    st.sampled_from(["Yes", "yes.", "No", "Thing 0.", "thing 2", "a thing 4", "thing 6 ", ""]), st.text(max_size=8)
)


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=6, max_size=6), st.randoms())
def test_the_reference_gives_our_numbers(root: Path, texts: list[str], rng: random.Random) -> None:
    examples = GQA().load(root, root)
    predictions = answered(examples, texts)
    rng.shuffle(predictions)
    ours, _ = score(GQA(), examples, predictions)
    with tempfile.TemporaryDirectory() as folder:
        answers, converted = GQA().write_reference(root, examples, predictions, Path(folder))
        theirs = evaluate(root / TRUTH, converted)
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        again = [{"questionId": row["question_id"], "prediction": row["text"].rstrip(".").lower()} for row in rows]
        assert converted.name == "testdev_balanced_predictions.json"
        assert json.loads(converted.read_text()) == again
    assert {"accuracy": ours.value, **ours.groups} == pytest.approx(theirs)


def test_an_unanswered_question_is_an_empty_answer(tmp_path: Path, root: Path, examples: list[Example]) -> None:
    answers, converted = GQA().write_reference(root, examples, perfect(examples)[1:], tmp_path / "out")
    first = json.loads(answers.read_text().splitlines()[0])
    assert (first["question_id"], first["prompt"], first["text"]) == ("200", examples[0].question, "")
    assert evaluate(root / TRUTH, converted)["accuracy"] == pytest.approx(500 / 6)


def test_surplus_names(tmp_path: Path) -> None:
    for name in ("mine.txt", "questions1.2.zip", "data", "llava_gqa_testdev_balanced.jsonl", ".hidden"):
        (tmp_path / name).touch()
    assert GQA().surplus(tmp_path) == ["mine.txt"]


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"has no {TRUTH} or .*cs.stanford.edu"):
        GQA().load(tmp_path, tmp_path)
    write_truth(tmp_path / TRUTH)
    with pytest.raises(DataError, match=r"has no images or data/images.*cs\.stanford\.edu"):
        GQA().load(tmp_path, tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=r"4 image\(s\) do not exist:\n.*images/n0.jpg"):
        GQA().load(tmp_path, tmp_path)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([], "holds a list, not questions by their ids"),
        ({"1": None}, "question 1 lacks the key 'question'"),
        ({"1": {"question": "?", "imageId": "n0", "isBalanced": True}}, "question 1 lacks the key 'answer'"),
        (
            {"1": {"question": "?", "imageId": "n0", "answer": "a", "isBalanced": True, "types": {}}},
            "question 1 lacks the key 'types.structural'",
        ),
    ],
)
def test_wrong_ground_truth(tmp_path: Path, truth: Any, message: str) -> None:
    write_truth(tmp_path / TRUTH, truth)
    write_images(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        GQA().load(tmp_path, tmp_path)


def test_ground_truth_that_is_cut_off(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    (tmp_path / TRUTH).write_text(json.dumps(truth_of())[:-9])
    with pytest.raises(DataError, match="not valid JSON"):
        GQA().load(tmp_path, tmp_path)
    (tmp_path / TRUTH).write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="not UTF-8 text but UTF-16"):
        GQA().load(tmp_path, tmp_path)


def test_questions_that_do_not_match(tmp_path: Path) -> None:
    write_truth(tmp_path / TRUTH)
    write_images(tmp_path / "images")
    path, rows = tmp_path / "llava_gqa_testdev_balanced.jsonl", rows_of()
    for wrong, message in (
        (rows[1:], rf"1 questions of .*{TRUTH} are not there, such as 206\. testdev_balanced"),
        ([*rows, rows[0] | {"question_id": "7"}], rf"1 questions are not in .*{TRUTH}, such as 7\."),
        ([*rows, rows[0]], "question_id '206' occurs twice"),
        ([*rows, {"question_id": "7"}], "line 7 lacks the key 'image'"),
    ):
        write_rows(path, wrong)
        with pytest.raises(DataError, match=message):
            GQA().load(tmp_path, tmp_path)

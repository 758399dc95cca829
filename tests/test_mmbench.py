"""MMBench: letter and text rules, circular groups, images in the table, pandas' missing cells, the submission."""

import base64
import csv
import io
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import load_workbook
from PIL import Image

from hydra_vlm.benchmarks.mmbench import DECORATIONS, MMBench, corrected_letter, published_letter
from hydra_vlm.benchmarks.protocol import Example, Prediction, Published
from hydra_vlm.benchmarks.scoring import sample_examples, score
from hydra_vlm.errors import DataError

SUFFIX = "Answer with the option's letter from the given choices directly."
COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
COLUMNS += ["comment", "split"]

# answer to a question with these options, letter published, letter corrected (None: the same; "" is undecidable)
OPTIONS = ("a cat", "dog", "red", "dark red")
JUDGED = [
    ("A", "A", None),
    ("D", "D", None),
    ("E", "E", None),  # none of the options
    ("F", "", None),
    ("b", "", "B"),
    (" C \n", "C", None),
    ("B.", "B", None),
    ("B,", "B", None),
    ("B:", "B", None),
    ("B)", "B", None),
    ("B).", "B", None),
    ("(B)", "B", None),
    ("(B).", "B", None),
    (":B", "B", None),
    (":B,", "B", None),
    (":B.", "B", None),
    (":B)", "B", None),
    (":B).", "B", None),
    ("[B]", "", "B"),
    ("**B**", "", "B"),
    ("(b)", "", "B"),
    ("b)", "", "B"),
    ("b. it barks", "", "B"),
    ("(b) it barks", "", "B"),
    ("B. dog", "B", None),
    ("Answer:B", "", "B"),
    ("The answer is B", "B", None),
    ("The answer is A", "", "A"),  # four words: taken for the article
    ("It is A", "A", None),
    ("A is right", "A", None),
    ("A is the right one", "", "A"),
    ("A dog", "A", "B"),  # the article, which with three words or fewer is taken for the letter
    ("A dog on grass", "B", None),  # by the text
    ("A bird on grass", "", None),
    ("A. A cat on grass", "A", None),
    ("B) A cat", "A", "B"),  # the bare letter comes first
    ("A B", "", None),
    ("A and B", "", None),
    ("A and B.", "A", ""),  # "B." is no bare letter
    ("A. or B.", "", None),
    ("A. or (B)", "A", ""),  # "X." is looked for before "(X)"
    ("B B", "B", None),
    ("dog", "B", None),
    ("It is a DOG!", "B", None),
    ("dogma", "B", None),
    ("red", "C", None),
    ("dark red", "", None),  # contains two options
    ("a cat and a dog", "", None),
    ("cat", "", None),
    ("", "", None),
    ("None", "", None),
    ("nan", "", None),
]


@pytest.mark.parametrize(("text", "published", "corrected"), JUDGED, ids=[repr(row[0]) for row in JUDGED])
def test_answers_are_judged(text: str, published: str, corrected: str | None) -> None:
    example = Example("1", None, "?", ("B",), options=OPTIONS)
    verdict = MMBench().judge(example, text)
    assert (verdict.answer, verdict.credit) == (published, float(published == "B"))
    verdict = MMBench("corrected").judge(example, text)
    expected = published if corrected is None else corrected
    assert (verdict.answer, verdict.credit) == (expected, float(expected == "B"))


@pytest.mark.parametrize("form", ["X", *DECORATIONS])
@pytest.mark.parametrize("letter", "ABCDE")
def test_every_form_of_every_letter(form: str, letter: str) -> None:
    written = form.replace("X", letter)
    assert published_letter(written) == letter
    assert corrected_letter(written) == letter
    assert corrected_letter(written.lower()) == letter


@settings(deadline=None)
@given(st.text(alphabet="ABCDE abc.,:()\n", max_size=30))
def test_published_letter_equals_its_description(text: str) -> None:
    words = set(text.split())
    if "A" in words and len(text.split()) > 3 and len(words & set("ABCDE")) == 1:
        words -= {"A"}
    expected = ""
    for form in ["X", *DECORATIONS]:
        hits = [letter for letter in "ABCDE" if form.replace("X", letter) in words]
        if len(hits) == 1 and not expected:
            expected = hits[0]
    assert published_letter(text) == expected


def test_texts_that_pandas_takes_for_missing_are_no_answer() -> None:
    example = Example("1", None, "?", ("B",), options=("yes", "no"))
    assert MMBench().judge(example, "None").answer == ""  # the sheet's cell reads as missing
    assert MMBench("corrected").judge(example, "None").answer == "B"  # it contains "no"
    assert MMBench().judge(Example("1", None, "?", ("C",), options=("x", "", "y")), "it is y").answer == "C"


def encoded(colour: tuple[int, int, int], form: str = "PNG", mode: str = "RGB") -> str:
    picture = Image.new("RGB", (6, 4), colour).convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


def rows() -> list[dict[str, str]]:
    """Base questions of 4, 3, 2 and 2 options with all their rotated copies; the last two share a picture."""
    base = [
        ("7", 'Who "said"\nit?', "", ["a", "b", "c", "d"], "B", "identity", "logic", encoded((1, 2, 3))),
        ("9", "Which?", "Read\tthis.", ["x", "y", "z"], "C", "physical", "logic", encoded((9, 9, 9), mode="L")),
        ("12", "Is it?", "nan", ["yes", "no"], "A", "ocr", "fine", encoded((200, 0, 0), "JPEG")),
        ("30", "Is it?", "", ["yes", "no"], "B", "ocr", "fine", encoded((200, 0, 0), "JPEG")),
    ]
    made = []
    for index, question, hint, options, answer, category, wide, image in base:
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            place = ("ABCD".index(answer) - turn) % len(options)
            row = dict(zip("ABCD", [*turned, "", ""], strict=False))
            row |= {"index": str(int(index) + turn * 10**6), "question": question, "hint": hint, "image": image}
            row |= {"answer": "ABCD"[place], "category": category, "l2-category": wide, "split": "dev"}
            made.append(row)
    return sorted(made, key=lambda row: int(row["index"]))


def write_table(root: Path, made: list[dict[str, str]], name: str = "mmbench_dev_en_20231003.tsv", **form: Any) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    columns = form.pop("columns", COLUMNS)
    with (root / name).open("w", encoding=form.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, columns, "", "ignore", delimiter="\t", lineterminator="\n", **form)
        writer.writeheader()
        writer.writerows(made)
    return root


def test_the_official_table(tmp_path: Path) -> None:
    benchmark: Published = MMBench()
    limit = csv.field_size_limit()
    root = write_table(tmp_path / "mmbench", rows())
    examples = benchmark.load(root, tmp_path / "scratch")
    assert csv.field_size_limit() == limit
    assert [e.id for e in examples[:5]] == ["7", "9", "12", "30", "1000007"]
    assert len(examples) == 11
    by_id = {e.id: e for e in examples}
    assert by_id["7"].question == f'Who "said"\nit?\nA. a\nB. b\nC. c\nD. d\n{SUFFIX}'
    assert by_id["9"].question == f"Read\tthis.\nWhich?\nA. x\nB. y\nC. z\n{SUFFIX}"
    assert by_id["12"].question == f"Is it?\nA. yes\nB. no\n{SUFFIX}"  # the hint "nan" is none
    copy = by_id["2000009"]
    assert (copy.unit, copy.group, copy.options, copy.answers) == ("9", "logic/physical", ("z", "x", "y"), ("A",))
    assert copy.image == by_id["9"].image
    assert benchmark.surplus(root) == []
    (root / "old.tsv").write_text("")
    assert benchmark.surplus(root) == ["old.tsv"]
    assert (benchmark.name, benchmark.max_new_tokens, benchmark.pads) == ("mmbench", 1024, True)


def test_images_are_written_once_and_in_rgb(tmp_path: Path) -> None:
    made = rows()
    images = {
        "7": encoded((1, 2, 3)),
        "9": encoded((90, 90, 90), mode="L"),
        "12": encoded((200, 0, 0), "JPEG"),
        "30": encoded((4, 5, 6), mode="RGBA"),
        "1000007": encoded((7, 8, 9), mode="P"),
        "1000009": encoded((7, 7, 7), "BMP"),
    }
    for row in made:
        row["image"] = images.get(row["index"], images["7"])
    scratch = tmp_path / "scratch"
    examples = {e.id: e for e in MMBench().load(write_table(tmp_path / "mmbench", made), scratch)}
    assert len(list(scratch.iterdir())) == len(images)
    for index, cell in images.items():
        path = Path(examples[index].image or "")
        with Image.open(path) as stored, Image.open(io.BytesIO(base64.b64decode(cell))) as given:
            assert stored.mode == "RGB"
            assert stored.tobytes() == given.convert("RGB").tobytes()
    for index in ("7", "12"):  # readable RGB pictures keep their bytes
        assert Path(examples[index].image or "").read_bytes() == base64.b64decode(images[index])
    times = {path: path.stat().st_mtime_ns for path in scratch.iterdir()}
    MMBench().load(tmp_path / "mmbench", scratch)
    assert {path: path.stat().st_mtime_ns for path in scratch.iterdir()} == times


@pytest.mark.parametrize(
    "name", ["mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv", "my_own.tsv"]
)
def test_other_tables_and_the_compact_form(tmp_path: Path, name: str) -> None:
    """A copy's image may be the index of its base; columns that nobody reads may lack; a byte order mark is no name."""
    made = rows()
    whole = MMBench().load(write_table(tmp_path / "whole", made), tmp_path / "scratch")
    for row in made:
        if int(row["index"]) >= 10**6:
            row["image"] = str(int(row["index"]) % 10**6)
    columns = [column for column in COLUMNS if column not in ("source", "comment")]
    root = write_table(tmp_path / "compact", made[::-1], name, columns=columns, encoding="utf-8-sig")
    compact = MMBench().load(root, tmp_path / "scratch")
    assert sorted(compact, key=lambda e: int(e.id)) == whole


def test_quoting_and_line_ends(tmp_path: Path) -> None:
    """Everything quoted, Windows line ends, a blank line and no last line end read the same."""
    made = rows()
    plain = MMBench().load(write_table(tmp_path / "plain", made), tmp_path / "scratch")
    root = write_table(tmp_path / "other", made, quoting=csv.QUOTE_ALL)
    table = root / "mmbench_dev_en_20231003.tsv"
    text = table.read_text().replace('"\n"', '"\r\n"')
    header, rest = text.split("\r\n", 1)
    table.write_bytes((header + "\r\n\r\n" + rest.rstrip("\n")).encode())
    assert MMBench().load(root, tmp_path / "scratch") == plain


def test_missing_options_as_pandas_sees_them(tmp_path: Path) -> None:
    made = rows()
    made[0] |= {"A": "One", "B": "None", "C": "Three", "D": "NA"}
    made[1] |= {"A": "none", "hint": "None"}
    made[2] |= {"hint": "N/A"}
    root = write_table(tmp_path / "mmbench", made)
    first, second, third = MMBench().load(root, tmp_path / "s")[:3]
    assert first.options == ("One", "", "Three")  # the scorer goes on after a gap, the prompt does not
    assert first.question == f'Who "said"\nit?\nA. One\n{SUFFIX}'
    assert second.options == ("none", "y", "z")
    assert second.question == f"Which?\n{SUFFIX}"  # lower-case "none" is the generator's own
    assert third.question == f"Is it?\nA. yes\nB. no\n{SUFFIX}"
    first, second, third = MMBench("corrected").load(root, tmp_path / "s")[:3]
    assert first.question == f'Who "said"\nit?\nA. One\nB. None\nC. Three\nD. NA\n{SUFFIX}'
    assert second.question == f"None\nWhich?\nA. none\nB. y\nC. z\n{SUFFIX}"
    assert third.question.startswith("N/A\n")


def test_perfect_shuffled_empty(tmp_path: Path) -> None:
    examples = MMBench().load(write_table(tmp_path / "mmbench", rows()), tmp_path / "s")
    perfect = [Prediction(e.id, "", e.answers[0]) for e in examples]
    best, _ = score(MMBench(), examples, perfect)
    assert (best.value, best.maximum, best.counts) == (100, 100, {"base questions": 4, "undecidable": 0})
    assert best.groups == dict.fromkeys(["fine", "fine/ocr", "logic", "logic/identity", "logic/physical"], 100)
    assert score(MMBench(), examples, random.Random(0).sample(perfect, len(perfect)))[0] == best
    nothing, _ = score(MMBench(), examples, [])
    assert (nothing.value, nothing.unanswered, nothing.counts["undecidable"]) == (0, 11, 0)
    silent, _ = score(MMBench(), examples, [Prediction(e.id, "", "") for e in examples])
    assert (silent.value, silent.unanswered, silent.counts["undecidable"]) == (0, 0, 11)
    assert score(MMBench(), [], [])[0].value == 0


def test_one_wrong_or_missing_row_fails_its_base_question(tmp_path: Path) -> None:
    examples = MMBench().load(write_table(tmp_path / "mmbench", rows()), tmp_path / "s")
    perfect = [Prediction(e.id, "", e.answers[0]) for e in examples]
    for changed in (perfect[:-1], [*perfect[:-1], Prediction(perfect[-1].id, "", "none")]):
        result, _ = score(MMBench(), examples, changed)  # the last row is the fourth of question 7
        assert (result.value, result.groups["logic"], result.groups["fine"]) == (75, 50, 100)
    assert result.counts["undecidable"] == 1


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=11, max_size=11), st.integers(0, 99))
def test_circular_value(right: list[bool], seed: int) -> None:
    examples = [
        Example(row["index"], None, "?", (row["answer"],), row["l2-category"], str(int(row["index"]) % 10**6))
        for row in rows()
    ]
    said = [Prediction(e.id, "", e.answers[0] if ok else "E") for e, ok in zip(examples, right, strict=True)]
    groups = defaultdict(list)
    for example, ok in zip(examples, right, strict=True):
        groups[example.unit].append(ok)
    result, _ = score(MMBench(), examples, random.Random(seed).sample(said, len(said)))
    assert result.value == pytest.approx(100 * sum(map(all, groups.values())) / 4)


def test_a_sample_keeps_circular_groups_whole(tmp_path: Path) -> None:
    examples = MMBench().load(write_table(tmp_path / "mmbench", rows()), tmp_path / "s")
    sampled = sample_examples(examples, 7, 0, "mmbench")
    for unit in {e.unit for e in sampled}:
        assert sum(e.unit == unit for e in sampled) == sum(e.unit == unit for e in examples)


def scored_as_reference(sheet: Path, table: Path) -> float:
    """eval_mmbench.py without GPT: rows of one index modulo a million, every one of which must be decided right."""
    with table.open(newline="") as file:
        answers = {int(row["index"]): row["answer"] for row in csv.DictReader(file, delimiter="\t")}
    header, *lines = load_workbook(sheet).active.iter_rows(values_only=True)
    data = [dict(zip(header, line, strict=True)) for line in lines]
    hits = []
    for base in (row["index"] for row in data if row["index"] < 10**6):
        hit = True
        for row in (row for row in data if row["index"] % 10**6 == base):
            text = str(row["prediction"] or "nan")
            letters = [c for c in "ABCDE" if {c, f"{c}.", f"({c})"} & set(text.split())]
            texts = [c for c in "ABCD" if row[c] is not None and str(row[c]).lower() in text.lower()]
            decided = letters if len(letters) == 1 else texts if len(texts) == 1 else [""]
            hit = hit and decided[0] == answers[row["index"]]
        hits.append(hit)
    return 100 * sum(hits) / len(hits)


TEXTS = {"9": "C. z", "12": "(A)", "1000012": "it is yes", "30": "no", "1000030": "A"}


def test_the_references_files_score_the_same(tmp_path: Path) -> None:
    root = write_table(tmp_path / "mmbench", rows())
    examples = MMBench().load(root, tmp_path / "s")
    texts = {e.id: TEXTS.get(e.id, e.answers[0]) for e in examples}
    texts["1000009"] = "=1+1\x07"  # neither a formula nor a file that does not open
    del texts["2000009"]
    predictions = [Prediction(id, "", text) for id, text in reversed(texts.items())]
    lines, sheet = MMBench().write_reference(root, examples, predictions, tmp_path / "out")
    ours, _ = score(MMBench(), examples, predictions)
    assert (ours.value, ours.unanswered, ours.counts["undecidable"]) == (75, 1, 1)
    assert scored_as_reference(sheet, root / "mmbench_dev_en_20231003.tsv") == ours.value

    table = list(load_workbook(sheet)["Sheet1"].iter_rows(values_only=True))
    assert table[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert table[1] == (7, 'Who "said"\nit?', "a", "b", "c", "d", "B", "B", "dev")
    assert table[3] == (12, "Is it?", "yes", "no", None, None, "(A)", "A", "dev")
    said = {line[0]: line[6] for line in table[1:]}
    assert (said[1000009], said[2000009]) == ("=1+1", None)

    answers = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["question_id"] for line in answers] == [int(e.id) for e in examples]
    assert answers[1]["prompt"] == "Read\tthis.\nWhich?\nA. x\nB. y\nC. z"
    assert (answers[1]["options"], answers[1]["option_char"]) == (["x", "y", "z"], ["A", "B", "C"])
    assert (answers[1]["text"], answers[1]["round_id"]) == ("C. z", 0)
    assert next(line["text"] for line in answers if line["question_id"] == 2000009) == ""


def test_a_sample_leaves_the_other_rows_empty(tmp_path: Path) -> None:
    root = write_table(tmp_path / "mmbench", rows())
    examples = [e for e in MMBench().load(root, tmp_path / "s") if e.unit == "12"]
    predictions = [Prediction(e.id, "", e.answers[0]) for e in examples]
    lines, sheet = MMBench().write_reference(root, examples, predictions, tmp_path / "out")
    assert len(lines.read_text().splitlines()) == 2
    said = [line[6] for line in load_workbook(sheet).active.iter_rows(min_row=2, values_only=True)]
    assert sorted(text for text in said if text) == ["A", "B"]
    assert len(said) == 11


def edited(index: str, /, **cells: str) -> list[dict[str, str]]:
    return [row | cells if row["index"] == index else row for row in rows()]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (edited("9", index="7"), "index 7 is there twice"),
        (edited("9", index="x"), "index 'x' is not a whole number"),
        (edited("9", index="10"), "row 1000009 is a rotated copy of row 9, which is not there"),
        (edited("9", answer="E"), "row 9 has the answer 'E'"),
        (edited("9", answer=""), "row 9 has the answer ''"),
        (edited("9", image=encoded((1, 1, 1))[:-3]), "image of row 9 does not decode"),
        (edited("9", image=encoded((1, 1, 1))[:48]), "image of row 9 does not decode"),
        (edited("9", image="bm90IGFuIGltYWdl"), "image of row 9 does not decode"),
        (edited("9", image="§§§§"), "image of row 9 does not decode"),
        (edited("9", image=""), "image of row 9 does not decode"),
        (edited("9", image="8"), "image of row 9 is that of row 8, which has none"),
        (edited("9", image="9"), "image of row 9 is that of row 9, which has none"),
        ([row | {"answer": ""} for row in rows()], "has no answers: a test split"),
        ([], "no column 'index' or no rows"),
    ],
)
def test_wrong_rows(tmp_path: Path, made: list[dict[str, str]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MMBench().load(write_table(tmp_path / "mmbench", made), tmp_path / "s")


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("answer", "has no answers: a test split"),
        ("image", "no column 'image'"),
        ("index", "no column 'index'"),
        ("A", "no column 'A'"),
    ],
)
def test_missing_columns(tmp_path: Path, column: str, message: str) -> None:
    root = write_table(tmp_path / "mmbench", rows(), columns=[name for name in COLUMNS if name != column])
    with pytest.raises(DataError, match=message):
        MMBench().load(root, tmp_path / "s")


def test_missing_and_cut_off_tables(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no \*.tsv.*download.openmmlab.com"):
        MMBench().load(tmp_path, tmp_path / "s")
    root = write_table(write_table(tmp_path / "two", rows(), "one.tsv"), rows(), "two.tsv")
    with pytest.raises(DataError, match=r"2 tables \(one.tsv, two.tsv\): keep one"):
        MMBench().load(root, tmp_path / "s")
    write_table(root, rows(), "mmbench_dev_20230712.tsv")  # the published one is taken
    assert len(MMBench().load(root, tmp_path / "s")) == 11
    root = write_table(tmp_path / "cut", rows())
    table = root / "mmbench_dev_en_20231003.tsv"
    whole = table.read_bytes()
    table.write_bytes(whole[:-200])
    with pytest.raises(DataError, match=r"cells, the header has 14"):
        MMBench().load(root, tmp_path / "s")
    table.write_bytes(whole.replace(b"Is it?", b'"Is it?', 1))
    with pytest.raises(DataError, match="a quotation mark is not closed"):
        MMBench().load(root, tmp_path / "s")
    table.write_bytes(whole.replace(b"Is it?", b"Is it\xff?", 1))
    with pytest.raises(DataError, match="not UTF-8 text"):
        MMBench().load(root, tmp_path / "s")


def test_large_cells_are_read(tmp_path: Path) -> None:
    """A picture of noise is larger than what the csv module takes for a cell by itself."""
    noise = Image.frombytes("RGB", (256, 256), random.Random(0).randbytes(256 * 256 * 3))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    cell = base64.b64encode(buffer.getvalue()).decode()
    assert len(cell) > csv.field_size_limit()
    examples = MMBench().load(write_table(tmp_path / "mmbench", edited("9", image=cell)), tmp_path / "s")
    with Image.open(examples[1].image or "") as stored:
        assert stored.tobytes() == noise.tobytes()

"""MMBench (dev): multiple choice, each question asked again with its options rotated. No torch."""

import base64
import binascii
import csv
import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from PIL import Image

from hydra_vlm.benchmarks.folder import first_of, reference_answer, surplus_entries
from hydra_vlm.benchmarks.protocol import Example, Prediction, Rule, Total, Verdict
from hydra_vlm.benchmarks.scoring import group_means, percent
from hydra_vlm.data.prompts import OPTION_LETTER, lettered
from hydra_vlm.errors import DataError, FileError
from hydra_vlm.files import write_lines
from hydra_vlm.reading import TABLE, read_text

TABLES = ("mmbench_dev_en_20231003.tsv", "mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_V11.tsv")
REQUIRED = ("index", "question", "A", "B", "answer", "image")
LETTERS = "ABCD"
CERTAIN = "ABCDE"
"""The letters that count as an answer: E stands for none of the options."""

COPY = 1_000_000
"""What a rotated copy's index is more than that of the question before."""

DECORATIONS = ("X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X).")
"""How a letter may be written, in the order in which the reference looks for it."""

NOT_AVAILABLE = {"", "NA", "N/A", "#NA", "#N/A", "#N/A N/A", "<NA>", "n/a", "NULL", "null", "None"} | {
    sign + word for sign in ("", "-") for word in ("nan", "NaN", "1.#IND", "1.#QNAN")
}
"""Cells that pandas, with which the reference reads the table, takes for missing."""

DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
"""Columns that are not part of a submission (LLaVA's convert_mmbench_for_submission.py)."""

Row = dict[str, str]


@dataclass(frozen=True)
class MMBench:
    """MMBench's dev split with circular evaluation, as OpenCompass' eval_mmbench.py scores it without GPT.

    A base question is right if it and all its rotated copies are. Published, the letter: if exactly one of A to E is
    a word of the answer, that one (but not "A" among more than three words, where it may be the article); else the
    first of `DECORATIONS` in which exactly one of them is a word. The text, if there is no letter: the only option
    whose text the answer contains, in lower case. Neither: undecidable; the reference then asks GPT, here it is wrong
    and counted. Corrected: see `corrected_letter`; the text rule is the same.

    Cells that pandas reads as missing are missing by the published rule, an option "None" among them, and the options
    of the prompt end at the first missing one; so is an answer, which is then undecidable (the reference would look
    for the options in the word "nan"). By the corrected rule only an empty cell and "nan" are missing.
    """

    rule: Rule = "published"
    name = "mmbench"
    max_new_tokens = 1024
    pads = True
    source = (
        f"Get {TABLES[0]} (or {TABLES[1]}) from download.openmmlab.com/mmclassification/datasets/mmbench, or "
        f"{TABLES[2]} from opencompass.openxlab.space/utils/VLMEval."
    )

    def load(self, root: Path, scratch: Path) -> list[Example]:
        """Read the folder's table; each distinct image is written once to `scratch`, named by its content.

        Raises:
            DataError: the table is missing, of a test split, cut off or inconsistent, or an image does not decode.
        """
        path = find_table(root, self.source)
        rows = _checked(path, read_table(path), self.source)
        scratch.mkdir(parents=True, exist_ok=True)
        return [self._example(path, index, rows, scratch) for index in rows]

    def _example(self, path: Path, index: int, rows: dict[int, Row], scratch: Path) -> Example:
        row = rows[index]
        options = self._options(row)
        lines = [*self._asked([self._present(row.get("hint", ""))]), row["question"]]
        texts = self._asked(options)
        lines += [lettered(texts)] if texts else []
        return Example(
            id=str(index),
            image=str(_written(path, index, rows, scratch)),
            question="\n".join([*lines, OPTION_LETTER]),
            answers=(row["answer"],),
            group="/".join(filter(None, [row.get("l2-category", ""), row.get("category", "")])),
            unit=str(index % COPY),
            options=options,
        )

    def _present(self, cell: str) -> str:
        """The cell, or nothing where it counts as missing."""
        missing = cell in NOT_AVAILABLE if self.rule == "published" else cell == "nan"
        return "" if missing else cell

    def _options(self, row: Row) -> tuple[str, ...]:
        """The options by letter; a missing one before the last is empty."""
        options = [self._present(row.get(letter, "")) for letter in LETTERS]
        while options and not options[-1]:
            options.pop()
        return tuple(options)

    def _asked(self, options: Sequence[str]) -> list[str]:
        """The options (or the hint) up to the first that the reference's generator takes for missing."""
        ends = ("", "nan", "none") if self.rule == "published" else ("",)
        return list(takewhile(lambda option: option.lower() not in ends, options))

    def surplus(self, root: Path) -> list[str]:
        table = first_of(root, TABLES)
        patterns = [table.name] if table else ["*.tsv"]
        return surplus_entries(root, [*patterns, "eval.py", "convert_mmbench_for_submission.py"])

    def judge(self, example: Example, text: str) -> Verdict:
        if self.rule == "corrected":
            letter = corrected_letter(text)
        else:  # the reference reads answers from a spreadsheet with pandas
            letter, text = published_letter(text), self._present(text)
        letter = letter or text_letter(text, example.options)
        return Verdict(example.id, letter, float(letter == example.answers[0]))

    def total(self, examples: Sequence[Example], verdicts: Sequence[Verdict]) -> Total:
        """Per cent of the base questions all of whose rows are right, by l2-category and category too."""
        units: dict[str, Example] = {}
        right: dict[str, float] = {}
        for example, verdict in zip(examples, verdicts, strict=True):
            units.setdefault(example.unit, example)
            right[example.unit] = min(right.get(example.unit, 1.0), verdict.credit)
        undecidable = sum(verdict.answered and not verdict.answer for verdict in verdicts)
        return Total(
            percent(list(right.values())),
            group_means(list(units.values()), list(right.values())),
            {"base questions": len(units), "undecidable": undecidable},
        )

    def maximum(self, examples: Sequence[Example]) -> float:
        return 100.0

    def write_reference(
        self, root: Path, examples: Sequence[Example], predictions: Sequence[Prediction], folder: Path
    ) -> list[Path]:
        """Write predictions.jsonl as the generator does, and predictions.xlsx, which is what is submitted.

        The sheet has a row for every row of the table, filled by index; unanswered rows are empty. The reference
        needs all rows: what a sample leaves out is an empty answer to it.
        """
        said = {prediction.id: prediction.text for prediction in predictions}
        lines, sheet = folder / "predictions.jsonl", folder / "predictions.xlsx"
        write_lines(lines, (self._line(example, said.get(example.id, "")) for example in examples))
        _write_sheet(sheet, read_table(find_table(root, self.source)), said)
        return [lines, sheet]

    def _line(self, example: Example, text: str) -> dict[str, object]:
        options = self._asked(example.options)
        line = reference_answer(int(example.id), example.question.removesuffix(f"\n{OPTION_LETTER}"), text)
        return line | {"round_id": 0, "options": options, "option_char": list(LETTERS[: len(options)])}


def published_letter(text: str) -> str:
    """The letter that OpenCompass finds in an answer, or nothing."""
    words = text.split()
    bare = [letter for letter in CERTAIN if letter in words]
    if len(bare) == 1 and (bare != ["A"] or len(words) <= 3):
        return bare[0]
    for form in DECORATIONS:
        decorated = [letter for letter in CERTAIN if form.replace("X", letter) in words]
        if len(decorated) == 1:
            return decorated[0]
    return ""


def corrected_letter(text: str) -> str:
    """The letter that a reader would find in an answer, or nothing.

    A letter that is all there is, in either case, with or without brackets and punctuation; else the only one of the
    capitals A to E that stand alone and of the lower-case letters in brackets, such as "(b)", or that begin the answer
    as "b)" or "b." do. A capital A counts as the article, not as a letter, where a sentence or clause begins with it
    and a word follows that is neither a verb nor a conjunction: "A cat." but not "A is right", "It is A" or "A, B".
    """
    alone = text.strip(" \t\r\n.,:;()[]{}*\"'`").upper()
    if len(alone) == 1 and alone in CERTAIN:
        return alone
    article = r"(?:^|[.!?:;,)\]\n-])\s*A\s+(?!(?:and|or|is|was|as|since|because|seems)\b)\w"
    found = set(re.findall(r"(?<![\w'])[A-E](?![\w'])", re.sub(article, " ", text.strip())))
    found |= {letter.upper() for letter in re.findall(r"\(([a-e])\)", text)}
    found |= {letter.upper() for letter in re.findall(r"^\s*([a-e])[.):]\s", text)}
    return found.pop() if len(found) == 1 else ""


def text_letter(text: str, options: Sequence[str]) -> str:
    """The letter of the only option whose text the answer contains, or nothing."""
    found = [
        letter for letter, option in zip(LETTERS, options, strict=False) if option and option.lower() in text.lower()
    ]
    return found[0] if len(found) == 1 else ""


def find_table(root: Path, source: str) -> Path:
    """The published table in the folder, or its only one.

    Raises:
        DataError: there is none, or several of which none is known.
    """
    known, tables = first_of(root, TABLES), sorted(root.glob("*.tsv"))
    if known is None and len(tables) != 1:
        found = (
            f"{len(tables)} tables ({', '.join(table.name for table in tables)}): keep one" if tables else "no *.tsv"
        )
        raise DataError(f"{root} has {found}. {source}")
    return known or tables[0]


def read_table(path: Path) -> list[Row]:
    """The rows of a tab-separated table, quoted as pandas writes it.

    Raises:
        DataError: a row has more or fewer cells than the header, or the file is not text.
    """
    before = csv.field_size_limit()
    try:
        text = read_text(path, TABLE)
        csv.field_size_limit(max(before, len(text)))  # one cell holds a whole image
        return list(_rows(path, io.StringIO(text, newline="")))
    except FileError as problem:
        raise DataError(f"{problem}: get it again") from None
    except csv.Error as problem:
        raise DataError(f"{path} does not read as a tab-separated table ({problem}): get it again") from None
    finally:
        csv.field_size_limit(before)


def _rows(path: Path, file: io.StringIO) -> Iterator[Row]:
    reader = csv.reader(file, delimiter="\t")
    header = next(reader, [])
    for cells in filter(None, reader):
        if len(cells) != len(header):
            raise DataError(
                f"{path}: the row that ends in line {reader.line_num} has {len(cells)} cells, the header has "
                f"{len(header)}: the file is cut off, or a quotation mark is not closed"
            )
        yield dict(zip(header, cells, strict=True))


def _checked(path: Path, rows: Sequence[Row], source: str) -> dict[int, Row]:
    """The rows by index, once they hang together."""
    missing = [column for column in REQUIRED if not rows or column not in rows[0]]
    if missing == ["answer"] or (not missing and not any(row["answer"] for row in rows)):
        raise DataError(f"{path} has no answers: a test split is scored by MMBench's server alone. {source}")
    if missing:
        raise DataError(f"{path} has no column {missing[0]!r}" + ("" if rows else " or no rows") + f". {source}")
    found: dict[int, Row] = {}
    for row in rows:
        if not row["index"].isdecimal():
            raise DataError(f"{path}: index {row['index']!r} is not a whole number")
        index = int(row["index"])
        if index in found:
            raise DataError(f"{path}: index {index} is there twice, and answers are joined by it")
        if len(row["answer"]) != 1 or row["answer"] not in LETTERS:
            raise DataError(f"{path}: row {index} has the answer {row['answer']!r}, which is none of A to D")
        found[index] = row
    for index in found:
        if index % COPY not in found:
            raise DataError(f"{path}: row {index} is a rotated copy of row {index % COPY}, which is not there")
    return found


def _written(path: Path, index: int, rows: dict[int, Row], scratch: Path) -> Path:
    """The file of a row's image; the cell may be the index of another row, whose image it then is."""
    cell = rows[index]["image"].strip()
    if cell.isdecimal():
        shared = rows[int(cell)]["image"].strip() if int(cell) in rows else ""
        if not shared or shared.isdecimal():
            raise DataError(f"{path}: the image of row {index} is that of row {cell}, which has none of its own")
        cell = shared
    try:
        content = base64.b64decode(cell, validate=True)
        name = hashlib.sha256(content).hexdigest()[:32]
        return first_of(scratch, [f"{name}.png", f"{name}.jpg"]) or _write_image(scratch / name, content)
    except (binascii.Error, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise DataError(f"{path}: the image of row {index} does not decode ({problem}): get the file again") from None


def _write_image(stem: Path, content: bytes) -> Path:
    """The bytes as they are if they are an RGB image in JPEG or PNG, else the picture in RGB as PNG."""
    with Image.open(io.BytesIO(content)) as image:
        image.load()  # a picture that is cut off fails here, not in the middle of an evaluation
        suffix = ".jpg" if image.format == "JPEG" else ".png"
        if image.mode != "RGB" or image.format not in ("JPEG", "PNG"):
            suffix, buffer = ".png", io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            content = buffer.getvalue()
    path = stem.with_name(stem.name + suffix)
    draft = stem.with_name(f".{stem.name}.tmp")
    draft.write_bytes(content)
    os.replace(draft, path)
    return path


def _write_sheet(path: Path, rows: Sequence[Row], said: dict[str, str]) -> None:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    columns = [column for column in rows[0] if column not in DROPPED]
    columns.insert(6, "prediction")
    sheet.append(columns)
    for row in rows:
        cells: list[object] = []
        for column in columns:
            text = said.get(str(int(row["index"])), "") if column == "prediction" else row[column]
            cell = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text))
            cell.data_type = "s"  # text that begins with "=" is no formula
            missing = text == "" if column == "prediction" else text in NOT_AVAILABLE
            cells.append(int(text) if column == "index" else None if missing else cell)
        sheet.append(cells)
    book.save(path)

"""Rows of a JSON list, or of a JSON Lines file, one at a time in bounded memory, each with its place. No torch.

The standard library's C scanner finds where a row ends, so text is looked at once. What is wrong within a row is told
with the row (`fault`); what makes the rest of a file unreadable, such as a bracket that is missing, raises.
"""

import codecs
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hydra_vlm.errors import DataError, FileError
from hydra_vlm.reading import open_file
from hydra_vlm.strict import StrictJson, syntax_fault

CHUNK = 2**20
"""Bytes that are read at a time."""

LONGEST = 2**24
"""Characters of the longest row that is read (16 Mi); more are a mistake, or meant to fill memory."""

_BLANK = re.compile(r"[ \t\r\n]*")
_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_WIDE |= {codecs.BOM_UTF16_BE: "UTF-16"}


def cannot_open(path: Path, problem: FileError | OSError) -> DataError:
    """The error for a data file that is not there, or not to be read."""
    told = problem if isinstance(problem, FileError) else f"{path} cannot be read ({problem.strerror or problem})"
    return DataError(f"data file {told}: give a LLaVA-format file")


class JsonRow(NamedTuple):
    """One row: its number from 0, its lines from 1 (the first, and where reading goes on), its first byte and how many
    it has, its value, and what is wrong with it ("" for nothing)."""

    number: int
    line: int
    end_line: int
    offset: int
    size: int
    value: Any
    fault: str

    @property
    def behind(self) -> "Place":
        """Where reading goes on."""
        return Place(self.number + 1, self.end_line, self.offset + self.size)


@dataclass(frozen=True, slots=True)
class Place:
    """Where reading goes on: behind row `number` - 1, at a byte in a line."""

    number: int = 0
    line: int = 1
    offset: int = 0


def rows_of(path: Path, start: Place = Place()) -> Iterator[JsonRow]:
    """Every row of a file: of one JSON list, or one row a line (`.jsonl`, `.ndjson`, or a file that begins with `{`).

    A byte order mark of UTF-8 and line ends of any kind are read over. `start` is the place behind a row that was read
    before.

    Raises:
        DataError: no such file, or it can be read no further; naming line and byte.
    """
    try:
        file = open_file(path)
    except FileError as problem:
        raise cannot_open(path, problem) from None
    with file:
        opening = file.read(4096)
        skipped = _byte_order_mark(path, opening)
        first = opening[skipped:].lstrip()[:1]
        file.seek(max(start.offset, skipped))
        if path.suffix.lower() in (".jsonl", ".ndjson") or first == b"{":
            yield from _lines(file, start)
        elif first == b"[" or (not first and len(opening) == 4096):
            yield from _items(_Window(path, file, Place(start.number, start.line, max(start.offset, skipped))))
        elif not first:
            raise DataError(f"{path} is empty: it must hold a non-empty JSON list of records, or one record a line")
        else:
            raise DataError(
                f"{path} must hold a JSON list of records, or one record a line: it begins with {first[:1]!r} (line 1)"
            )


def _byte_order_mark(path: Path, opening: bytes) -> int:
    for mark, name in _WIDE.items():
        if opening.startswith(mark):
            raise DataError(f"{path} is written in {name}: save it as UTF-8")
    return len(codecs.BOM_UTF8) if opening.startswith(codecs.BOM_UTF8) else 0


class _Window:
    """The part of a file that is in memory as text, and the place in it."""

    def __init__(self, path: Path, file: BinaryIO, start: Place) -> None:
        self.path, self.file = path, file
        self.number, self.line, self.offset = start.number, start.line, start.offset
        self.text, self.position, self.ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._strict = StrictJson(finite=True)

    def fill(self) -> None:
        """Drop what was read, add the next chunk."""
        chunk = self.file.read(CHUNK)
        self.ended = not chunk
        self.text = self.text[self.position :] + self._decoder.decode(chunk, final=self.ended)
        self.position = 0

    def peek(self) -> str:
        """The next character that is not blank; "" at the end."""
        while True:
            self._advance(_BLANK.match(self.text, self.position).end())  # type: ignore[union-attr]
            if self.position < len(self.text):
                return self.text[self.position]
            if self.ended:
                return ""
            self.fill()

    def step(self) -> None:
        self._advance(self.position + 1)

    def row(self) -> JsonRow:
        """The value that begins here."""
        while True:
            problem: Exception | None = None
            self._strict.noted.clear()
            try:
                value, end = self._strict.decoder.raw_decode(self.text, self.position)
                if self.ended or end < len(self.text) - (32 if isinstance(value, int | float) else 0):
                    break  # the start of a number is a number, too
            except (ValueError, RecursionError) as found:
                problem = found
            if isinstance(problem, RecursionError) or self.ended or len(self.text) - self.position > LONGEST:
                raise self.broken(f"row {self.number} {_fault(problem)}", getattr(problem, "pos", None))
            self.fill()
        text = self.text[self.position : end]
        line, offset = self.line, self.offset
        self._advance(end)
        fault = self._strict.fault(value, text) if len(text) <= LONGEST else _fault(None)
        self.number += 1
        return JsonRow(self.number - 1, line, self.line, offset, self.offset - offset, value, fault)

    def broken(self, what: str, position: int | None = None) -> DataError:
        """The error that ends the reading, at a position in the text (default: here)."""
        if position is not None and self.position <= position <= len(self.text):
            self._advance(position)
        return DataError(
            f"{self.path} is not valid JSON from line {self.line}, byte {self.offset} on: {what}. What follows cannot "
            "be told apart into records: mend the file, or write one record a line (.jsonl)"
        )

    def _advance(self, end: int) -> None:
        passed = self.text[self.position : end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode("utf-8", "surrogateescape"))
        self.line += passed.count("\n")
        self.position = end


def _items(window: _Window) -> Iterator[JsonRow]:
    """The items of a list; behind row 0 the window stands before a comma or the closing bracket."""
    if window.number == 0:
        window.peek()
        window.step()
    while (mark := window.peek()) != "]":
        if window.number:
            if mark != ",":
                raise window.broken(f"`,` or `]` must follow row {window.number - 1}, found {mark or 'the end'!r}")
            window.step()
            mark = window.peek()
        if mark in ("", "]"):
            raise window.broken(f"row {window.number} is missing")
        yield window.row()
    window.step()
    if rest := window.peek():
        raise window.broken(f"{rest!r} stands behind the list")


def _lines(file: BinaryIO, start: Place) -> Iterator[JsonRow]:
    """One row a line; blank lines are no rows."""
    strict = StrictJson(finite=True)
    number, line, offset = start.number, start.line, file.tell()
    while raw := file.readline(LONGEST + 1):
        size = len(raw)
        whole = raw.endswith(b"\n") or size <= LONGEST
        while not whole:
            rest = file.readline(CHUNK)
            size += len(rest)
            whole = len(rest) < CHUNK or rest.endswith(b"\n")
        text = raw.decode("utf-8", "surrogateescape").strip(" \t\r\n")
        if text:
            value, fault = strict.read(text) if size <= LONGEST else (None, _fault(None))
            yield JsonRow(number, line, line + 1, offset, size, value, fault)
            number += 1
        offset += size
        line += 1


def _fault(problem: Exception | None) -> str:
    return f"is longer than {LONGEST:,} characters" if problem is None else syntax_fault(problem)

"""Rows of a JSON list, or of a JSON Lines file, one at a time in bounded memory, each with its place. No torch.

The standard library's C scanner finds where a row ends, so text is looked at once. What is wrong within a row is told
with the row (`fault`); what makes the rest of a file unreadable, such as a bracket that is missing, raises.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hydra_vlm.errors import DataError

CHUNK = 2**20
"""Bytes that are read at a time."""

LONGEST = 2**24
"""Characters of the longest row that is read (16 Mi); more are a mistake, or meant to fill memory."""

DEEPEST = 64
"""Brackets within brackets; a record needs three."""

_BLANK = re.compile(r"[ \t\r\n]*")
_WIDE = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
_WIDE |= {codecs.BOM_UTF16_BE: "UTF-16"}


def cannot_open(path: Path, problem: Exception) -> DataError:
    """The error for a data file that is not there, or not to be read."""
    reason = getattr(problem, "strerror", None) or problem  # without the path, which is named already
    return DataError(f"data file {path} does not exist or cannot be read ({reason}): give a LLaVA-format file")


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
        file = path.open("rb")
    except (OSError, ValueError) as problem:
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


class _Strict:
    """A JSON decoder that notes what Python's reads without a word: repeated keys, NaN, numbers of any length."""

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.decoder = json.JSONDecoder(
            object_pairs_hook=self._object,
            parse_int=self._integer,
            parse_float=self._float,
            parse_constant=self._constant,
        )

    def read(self, text: str) -> tuple[Any, str]:
        """The value of a row's whole text, and what is wrong with it."""
        self.noted.clear()
        try:
            value = self.decoder.decode(text)
        except (ValueError, RecursionError) as problem:
            return None, _syntax(problem)
        return value, self.fault(value, text)

    def fault(self, value: Any, text: str) -> str:
        """What is wrong with the value that was just decoded from `text`; "" for nothing."""
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as problem:
                self.noted.append(f"is not UTF-8 ({_bytes(problem)})")
        if ("\\ud" in text or "\\uD" in text) and not _encodable(value):
            self.noted.append("holds half of a surrogate pair, which is no character")
        if text.count("[") + text.count("{") > DEEPEST and _depth(value) > DEEPEST:
            self.noted.append(f"is nested deeper than {DEEPEST} brackets")
        found, self.noted = "; ".join(self.noted), []
        return found

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            self.noted.append(f"has the key {twice[:40]!r} twice")
        return found

    def _integer(self, digits: str) -> int:
        if len(digits) > 20:
            self.noted.append(f"holds a number of {len(digits)} digits")
            return 0
        return int(digits)

    def _float(self, digits: str) -> float:
        value = float(digits)
        if value - value != 0:
            self.noted.append(f"holds the number {digits[:20]}, which is too large")
        return value

    def _constant(self, name: str) -> float:
        self.noted.append(f"holds {name}, which JSON does not know")
        return 0.0


class _Window:
    """The part of a file that is in memory as text, and the place in it."""

    def __init__(self, path: Path, file: BinaryIO, start: Place) -> None:
        self.path, self.file = path, file
        self.number, self.line, self.offset = start.number, start.line, start.offset
        self.text, self.position, self.ended = "", 0, False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._strict = _Strict()

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
                raise self.broken(f"row {self.number} {_syntax(problem)}", getattr(problem, "pos", None))
            self.fill()
        text = self.text[self.position : end]
        line, offset = self.line, self.offset
        self._advance(end)
        fault = self._strict.fault(value, text) if len(text) <= LONGEST else _syntax(None)
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
    strict = _Strict()
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
            value, fault = strict.read(text) if size <= LONGEST else (None, _syntax(None))
            yield JsonRow(number, line, line + 1, offset, size, value, fault)
            number += 1
        offset += size
        line += 1


def _syntax(problem: Exception | None) -> str:
    if problem is None:
        return f"is longer than {LONGEST:,} characters"
    if isinstance(problem, RecursionError):
        return f"is nested deeper than {DEEPEST} brackets"
    return f"is not valid JSON ({getattr(problem, 'msg', problem)})"


def _bytes(problem: UnicodeEncodeError) -> str:
    code = ord(problem.object[problem.start])
    return f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"U+{code:04X}"


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _depth(value: Any) -> int:
    """Brackets within brackets, counted without recursion."""
    deepest, waiting = 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, dict | list):
            deepest = max(deepest, depth)
            waiting += [(inner, depth + 1) for inner in (item.values() if isinstance(item, dict) else item)]
    return deepest

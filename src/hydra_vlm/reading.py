"""The one way to read a small file on a user's behalf: JSON, JSON Lines, YAML, text. No torch.

A file must be a regular one: a pipe would block, a device never end, so neither is opened. It may be as large as files
of its kind are (`SETTINGS`, `TABLE`, ...). Text is UTF-8, a byte order mark is read over. What the text may hold is
`strict.py`'s business.
"""

import codecs
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from hydra_vlm.errors import FileError, MissingFileError
from hydra_vlm.strict import StrictJson, parse_json, parse_yaml, parsed

PAGE = 2**18
"""Bytes of a configuration in YAML (256 KiB)."""

SETTINGS = 2**24
"""Bytes of a JSON file about a model, an adapter or a run (16 MiB)."""

TOKENIZER = 2**26
"""Bytes of a tokenizer's file (64 MiB); the largest vocabularies take 35."""

TABLE = 2**29
"""Bytes of a benchmark's file, or of saved answers (512 MiB)."""

_KINDS: dict[str, Callable[[int], bool]] = {
    "a folder": stat.S_ISDIR,
    "a pipe": stat.S_ISFIFO,
    "a socket": stat.S_ISSOCK,
    "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def file_fault(path: str | Path) -> str:
    """Why `path` cannot be read as a file, without opening it: "does not exist", "is a pipe"; "" for a regular file."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return f"is a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "does not exist"
    except (OSError, ValueError) as problem:  # a link to itself, a name too long, a NUL in it
        return f"cannot be read ({getattr(problem, 'strerror', None) or problem})"
    if stat.S_ISREG(mode):
        return ""
    return f"is {next((name for name, holds in _KINDS.items() if holds(mode)), 'no regular file')}, not a file"


def require_file(path: str | Path) -> None:
    """Raises MissingFileError, or FileError for what is there but no regular file (which is not opened)."""
    fault = file_fault(path)
    if fault:
        raise (MissingFileError if fault.endswith("not exist") else FileError)(f"{path} {fault}")


def open_file(path: str | Path) -> BufferedReader:
    """A regular file's bytes; raises as `require_file` does, or FileError where it may not be read."""
    require_file(path)
    try:  # should a pipe have taken its place meanwhile, opening does not wait for a writer
        file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    except OSError as problem:
        raise FileError(f"{path} cannot be read ({problem.strerror})") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise FileError(f"{path} is no regular file any more")
    return file


def read_bytes(path: str | Path, limit: int = SETTINGS) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        FileError: it is no regular file, larger, or may not be read.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            found = file.read(limit + 1) if size <= limit else b""
    except FileError:
        raise
    except OSError as problem:
        raise FileError(f"{path} cannot be read ({problem.strerror or problem})") from None
    if max(size, len(found)) > limit:
        raise FileError(
            f"{path} has {max(size, len(found)):,} bytes, more than the {limit:,} that a file of its kind may have"
        )
    return found


def read_text(path: str | Path, limit: int = SETTINGS) -> str:
    """A file's text; raises FileError as `read_bytes` does, or when it is not UTF-8."""
    raw = read_bytes(path, limit)
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise FileError(f"{path} is not UTF-8 text but UTF-16: save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise FileError(f"{path} is not UTF-8 text (byte {problem.start})") from None


def read_json(path: str | Path, limit: int = SETTINGS) -> Any:
    """What a JSON file of at most `limit` bytes holds.

    Raises:
        MissingFileError: there is no such file.
        FileError: naming the file and what is wrong with it.
    """
    return parse_json(read_text(path, limit), str(path))


def read_object(path: str | Path, limit: int = SETTINGS) -> dict[str, Any]:
    """What a JSON file holds where that must be keys and values; raises as `read_json` does."""
    found = read_json(path, limit)
    if not isinstance(found, dict):
        raise FileError(f"{path} must hold a JSON object, keys and values; found {_called(found)}")
    return found


def read_json_lines(path: str | Path, limit: int = TABLE) -> Iterator[tuple[int, Any]]:
    """Line numbers from 1 and the values of a JSON Lines file, blank lines left out; raises as `read_json` does."""
    reader = StrictJson()
    for number, line in enumerate(read_text(path, limit).split("\n"), start=1):  # splitlines would cut at U+2028
        if line.strip():
            yield number, parsed(reader, line, f"{path}, line {number}")


def read_yaml(path: str | Path) -> Any:
    """What a YAML file of one document holds (None: nothing); raises as `read_json` does."""
    return parse_yaml(read_text(path, PAGE), str(path))


def _called(value: Any) -> str:
    return {"list": "a list", "str": "a text", "NoneType": "null"}.get(type(value).__name__, type(value).__name__)

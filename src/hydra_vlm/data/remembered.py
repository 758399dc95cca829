"""What was found out about files, kept in the cache until they change. No torch.

A file is known again by its path, size, inode and both times (`state_of`). The time of change cannot be set by hand, so
an edit that keeps size and time of modification is seen all the same, wherever the file system has such a time.
"""

import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SWIFT = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = OFF")  # what is lost can be found out again
State = tuple[int, int, int, int]


def state_of(path: str) -> State:
    """Size, times of modification and of change in nanoseconds, inode; all -1 where there is no such file."""
    try:
        seen = os.stat(path)
    except (OSError, ValueError):
        return (-1, -1, -1, -1)
    return seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino


class Remembered:
    """A table of files in the cache, with these columns; an empty one where it cannot be used."""

    def __init__(self, cache: Path, table: str, columns: Sequence[str]) -> None:
        self._file: sqlite3.Connection | None = None
        names = ", ".join(columns)
        marks = ", ".join("?" * (5 + len(columns)))
        self._ask = (
            f"SELECT {names} FROM {table} WHERE path = ? AND size = ? AND modified = ? AND changed = ? AND inode = ?"
        )
        self._store = f"INSERT OR REPLACE INTO {table} VALUES ({marks})"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            self._file = sqlite3.connect(cache / f"{table}.sqlite", timeout=30)
            for line in _SWIFT:
                self._file.execute(line)
            self._file.execute(
                f"CREATE TABLE IF NOT EXISTS {table} "
                f"(path TEXT PRIMARY KEY, size INTEGER, modified INTEGER, changed INTEGER, inode INTEGER, {names})"
            )
        except (sqlite3.Error, OSError):
            self.close()

    def get(self, path: str, state: State) -> tuple[Any, ...] | None:
        """The columns' values for a file in this state; None where they are not known."""
        if self._file is None:
            return None
        try:
            found: tuple[Any, ...] | None = self._file.execute(self._ask, (path, *map(_signed, state))).fetchone()
        except (sqlite3.Error, UnicodeEncodeError):
            return None
        return found

    def put(self, path: str, state: State, *values: Any) -> None:
        if self._file is not None:
            try:
                self._file.execute(self._store, (path, *map(_signed, state), *values))
            except (sqlite3.Error, UnicodeEncodeError):
                return

    def keep(self) -> None:
        """Write what was put."""
        if self._file is not None:
            try:
                self._file.commit()
            except sqlite3.Error:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _signed(number: int) -> int:
    """SQLite's integers have 64 bits with a sign; some file systems use all 64 for inodes."""
    return number - 2**64 if number >= 2**63 else number

"""Every image of a data set, decoded once and remembered. No torch.

What was found is kept in the cache by path, size and time of change, so that neither a second start nor one after a
kill decodes an image again.
"""

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

from hydra_vlm.data.image_files import examine, place_fault, size_fault
from hydra_vlm.names import resolved

BATCH = 256
"""Images between two writes to the cache."""

THREADS = 4
"""At most so many images are decoded at a time; Pillow's decoders let go of Python's lock."""

_TABLE = (
    "CREATE TABLE IF NOT EXISTS images "
    "(path TEXT PRIMARY KEY, size INTEGER, changed INTEGER, width INTEGER, height INTEGER, fault TEXT)"
)
_SWIFT = ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = OFF")
State = tuple[int, int]


def image_faults(
    images: Iterable[tuple[int, str]], folder: Path, max_pixels: int, cache: Path
) -> Iterator[list[tuple[int, str]]]:
    """For each batch of (key, path): the same keys with what is wrong with the image, "" for nothing."""
    root = resolved(folder)
    workers = min(THREADS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    with closing(_Remembered(cache / "images.sqlite")) as remembered, ThreadPoolExecutor(workers) as pool:
        waiting = iter(images)
        while batch := list(islice(waiting, BATCH)):
            paths = [path for _, path in batch]
            faults = _faults(paths, root, max_pixels, remembered, pool)
            yield [(key, fault) for (key, _), fault in zip(batch, faults, strict=True)]


def _faults(
    paths: Sequence[str], root: str, max_pixels: int, remembered: "_Remembered", pool: ThreadPoolExecutor
) -> list[str]:
    found = {path: place_fault(path, root) for path in paths}
    states = {path: _state(path) for path, fault in found.items() if not fault}
    new = []
    for path, state in states.items():
        known = remembered.get(os.path.abspath(path), state)
        if known is None:
            new.append(path)
        else:
            width, height, fault = known
            found[path] = fault or size_fault(path, (width, height), max_pixels)
    for path, (size, fault) in zip(new, pool.map(lambda path: examine(path, max_pixels), new), strict=True):
        found[path] = fault
        if size is not None and not size_fault(path, size, max_pixels):  # then it was decoded
            remembered.put(os.path.abspath(path), states[path], size, fault)
    remembered.keep()
    return [found[path] for path in paths]


def _state(path: str) -> State:
    try:
        seen = os.stat(path)
    except OSError:
        return (-1, -1)
    return seen.st_size, seen.st_mtime_ns


class _Remembered:
    """The table of images in the cache; without one where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self._table: sqlite3.Connection | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._table = sqlite3.connect(path, timeout=30)
            for line in _SWIFT:  # what is lost can be found out again
                self._table.execute(line)
            self._table.execute(_TABLE)
        except (sqlite3.Error, OSError):
            self.close()

    def get(self, path: str, state: State) -> tuple[int, int, str] | None:
        if self._table is None:
            return None
        try:
            asked = "SELECT width, height, fault FROM images WHERE path = ? AND size = ? AND changed = ?"
            found: tuple[int, int, str] | None = self._table.execute(asked, (path, *state)).fetchone()
        except (sqlite3.Error, UnicodeEncodeError):
            return None
        return found

    def put(self, path: str, state: State, size: tuple[int, int], fault: str) -> None:
        if self._table is not None:
            try:
                row = (path, *state, *size, fault)
                self._table.execute("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?)", row)
            except (sqlite3.Error, UnicodeEncodeError):
                return

    def keep(self) -> None:
        """Write what was put."""
        if self._table is not None:
            try:
                self._table.commit()
            except sqlite3.Error:
                self.close()

    def close(self) -> None:
        if self._table is not None:
            self._table.close()
            self._table = None

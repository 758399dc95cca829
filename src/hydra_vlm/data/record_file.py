"""A LLaVA-format file of any size: one pass finds its records, later ones are read by number. No torch.

The pass keeps 40 bytes a record (where it is, and what its image, text and id hash to) and stores them in the cache, in
blocks, so that a stopped pass goes on and a finished one is not repeated.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

import numpy as np
from tqdm import tqdm

from hydra_vlm.data.cache import (
    cache_folder,
    digest_of,
    file_digest,
    number_of,
    read_array,
    read_summary,
    write_array,
    write_summary,
)
from hydra_vlm.data.json_rows import Place, rows_of
from hydra_vlm.data.records import Record, record_of
from hydra_vlm.errors import DataError

BLOCK = 50_000
"""Rows that are stored together; a stopped pass reads at most so many again."""

_VERSION = "1"  # of what is stored

ROW = np.dtype(
    [
        ("number", "<u4"),
        ("line", "<u4"),
        ("offset", "<u8"),
        ("size", "<u4"),
        ("image", "<u8"),  # hash of its path, 0 for none
        ("text", "<u8"),  # hash of image and conversation
        ("name", "<u8"),  # hash of its id, 0 for none
    ]
)


class Finding(NamedTuple):
    """What was found about one row; a `warning` keeps nothing from training."""

    row: int
    line: int
    id: str
    kind: str
    reason: str
    warning: bool = False

    def __str__(self) -> str:
        return f"record {self.row}{f' (id {self.id})' if self.id else ''}: {self.reason}"


@dataclass(frozen=True, eq=False)
class RecordFile(Sequence[Record]):
    """The good records of a file, read one at a time when they are asked for.

    `rows` says where they are; images are relative to `folder`. Copies for other processes open the file themselves.
    """

    path: Path
    folder: Path
    digest: str
    rows: np.ndarray = field(repr=False)
    _open: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index.__index__()]
        try:
            raw = os.pread(self._descriptor(), int(row["size"]), int(row["offset"]))
            value = json.loads(raw)
            record = record_of(value, int(row["number"]), self.folder)
            same = _text_number(value, record) == row["text"]
        except (OSError, ValueError, RecursionError):
            same = False
        if not same:
            raise DataError(
                f"{self.path}, row {row['number']} (line {row['line']}) is no longer what it was when the file was "
                "checked: start again, and leave the file alone while it is used"
            )
        return record

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def select(self, positions: Sequence[int] | np.ndarray) -> "RecordFile":
        """Those of the records, by position or by a mask."""
        return replace(self, rows=self.rows[np.asarray(positions)])

    def place(self, index: int) -> str:
        """Where a record stands, for messages."""
        row = self.rows[index]
        return f"{self.path}, row {row['number']} (line {row['line']})"

    def images(self) -> Iterator[tuple[int, str]]:
        """Each image once: the hash of its path as in `rows`, and its path."""
        hashes, first = np.unique(self.rows["image"], return_index=True)
        for key, position in sorted(zip(hashes.tolist(), first.tolist(), strict=True), key=lambda pair: pair[1]):
            if key and (image := self[position].image):
                yield key, image

    def _descriptor(self) -> int:
        """The file, opened once in each process."""
        process = os.getpid()
        if process not in self._open:
            self._open[process] = os.open(self.path, os.O_RDONLY)
        return self._open[process]

    def __del__(self) -> None:
        if (descriptor := self._open.pop(os.getpid(), None)) is not None:
            os.close(descriptor)


@dataclass(frozen=True)
class Scan:
    """What one pass over a file found: its good records, how many rows there are, and what is wrong with the others."""

    records: RecordFile
    total: int
    findings: tuple[Finding, ...]


def scan(path: Path, images: Path | None = None, cache: Path | None = None) -> Scan:
    """Find the records of a file; one linear pass, or none where the cache has it.

    Raises:
        DataError: no such file, no rows in it, or it can be read no further from some byte on.
    """
    path, cache = Path(path), cache or cache_folder()
    folder = Path(images) if images else path.parent
    digest = file_digest(path, cache)
    store = cache / "records" / digest_of(digest, path.suffix.lower(), _VERSION)
    rows, summary = read_array(store / "rows.npy"), read_summary(store / "scan.json")
    if rows is None or summary is None:
        rows, summary = _pass_over(path, folder, store)
    if not summary["total"]:
        raise DataError(f"{path} must hold a non-empty JSON list of records, found none")
    findings = tuple(Finding(*finding) for finding in summary["findings"])
    return Scan(RecordFile(path, folder, digest, rows), summary["total"], findings)


def blocks_of(store: Path) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
    """The blocks that a pass has stored, in order, up to the first that is not whole."""
    number = 0
    while (told := read_summary(store / f"{number:06d}.json")) is not None:
        array = read_array(store / f"{number:06d}.npy")
        if array is None:
            return
        yield np.asarray(array), told
        number += 1


def write_block(store: Path, number: int, array: np.ndarray, told: dict[str, Any]) -> None:
    """Store one block, what is told of it last."""
    write_array(store / f"{number:06d}.npy", array)
    write_summary(store / f"{number:06d}.json", told)


def drop_blocks(store: Path) -> None:
    """Remove the blocks of a finished pass."""
    for block in store.glob("[0-9]*"):
        block.unlink(missing_ok=True)


def _pass_over(path: Path, folder: Path, store: Path) -> tuple[np.ndarray, dict[str, Any]]:
    done = list(blocks_of(store))
    place = start = Place(*done[-1][1]["place"]) if done else Place()
    parts = [array for array, _ in done]
    findings = [finding for _, told in done for finding in told["findings"]]
    size, told = path.stat().st_size, f"reading {path.name}"
    with tqdm(total=size, initial=place.offset, desc=told, unit="B", unit_scale=True, leave=False) as bar:
        for number, (array, found, place) in enumerate(_blocks(path, folder, start), len(done)):
            write_block(store, number, array, {"place": [place.number, place.line, place.offset], "findings": found})
            parts.append(array)
            findings += found
            bar.update(place.offset - bar.n)
    rows = np.concatenate([*parts, np.empty(0, ROW)])
    summary = {"total": place.number, "findings": findings}
    write_array(store / "rows.npy", rows)
    write_summary(store / "scan.json", summary)
    drop_blocks(store)
    return rows, summary


def _blocks(path: Path, folder: Path, start: Place) -> Iterator[tuple[np.ndarray, list[Finding], Place]]:
    """Up to BLOCK rows at a time: the good ones, what is wrong with the others, and the place behind them."""
    good: list[tuple[int, ...]] = []
    findings: list[Finding] = []
    row = None
    for row in rows_of(path, start):
        name = str(row.value.get("id", "")) if isinstance(row.value, dict) else ""
        try:
            if row.fault:
                raise ValueError(row.fault)
            record = record_of(row.value, row.number, folder)
            image = number_of(row.value["image"]) if record.image else 0
            own = number_of(name) if name else 0
            good.append((row.number, row.line, row.offset, row.size, image, _text_number(row.value, record), own))
        except ValueError as problem:
            shown = name[:80].encode("utf-8", "replace").decode()
            findings.append(Finding(row.number, row.line, shown, "json" if row.fault else "record", _plain(problem)))
        if (row.number + 1) % BLOCK == 0:
            yield np.array(good, ROW), findings, row.behind
            good, findings, row = [], [], None
    if row is not None:
        yield np.array(good, ROW), findings, row.behind


def _text_number(value: dict[str, Any], record: Record) -> int:
    """What image and conversation hash to; the same for records that differ in their id alone."""
    return number_of("\0".join([value.get("image") or "", *(text for pair in record.rounds for text in pair)]))


def _plain(problem: ValueError) -> str:
    """A reason that can be printed, and is not longer than what it is about."""
    reason = str(problem).encode("utf-8", "replace").decode()
    return reason if len(reason) <= 400 else f"{reason[:400]}…"

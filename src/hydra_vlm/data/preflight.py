"""Everything that can be wrong with a data set, found before long work: by row, with a report. No torch.

Three passes, each kept in the cache and gone on with where it was stopped: the file's rows (`record_file`), each image
once (`image_check`), and each record as the model reads it (its length in tokens, image tokens counted).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from hydra_vlm.data.cache import cache_folder, digest_of, read_array, read_summary, write_array, write_summary
from hydra_vlm.data.image_check import image_faults
from hydra_vlm.data.image_files import MAX_PIXELS
from hydra_vlm.data.record_file import (
    Finding,
    RecordFile,
    blocks_of,
    drop_blocks,
    scan,
    write_block,
)
from hydra_vlm.data.records import raise_bad
from hydra_vlm.errors import DataError
from hydra_vlm.files import write_json, write_lines

REPORT, ROWS = "preflight.json", "preflight-rows.jsonl"
BLOCK = 5_000
"""Records whose lengths are stored together."""

_SHOWN = 10

KEPT_TOKENS = 2**21
"""Of a set with no more tokens than this, what the reader made of the records is kept in memory."""

KEPT_RECORDS = 20_000
"""Of a set with more records than this, only lengths are taken where the reader can do so."""

OnBadRow = Literal["error", "skip"]
Items = MutableMapping[int, dict[str, Any]]


@dataclass(frozen=True)
class Checked:
    """A data file after a check: its good records, with their `lengths` in tokens once a model's reader saw them.

    `items` are what the reader made of the first records, by position in `records`, where the set is small.
    """

    path: Path
    total: int
    records: RecordFile
    findings: tuple[Finding, ...]
    lengths: np.ndarray | None = None
    items: dict[int, dict[str, Any]] | None = None

    @property
    def bad(self) -> list[Finding]:
        """What keeps rows from training, by row."""
        return sorted(finding for finding in self.findings if not finding.warning)

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.warning]

    def summary(self) -> str:
        kinds = Counter(finding.kind for finding in self.bad)
        told = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
        repeats = Counter(finding.kind for finding in self.warnings)
        also = "".join(f"; {count:,} {kind}" for kind, count in sorted(repeats.items()))
        bad = f"{len({finding.row for finding in self.bad}):,} bad ({told})" if kinds else "none bad"
        return f"{self.path}: {self.total:,} records, {bad}{also}"

    def table(self) -> str:
        """The summary and the first findings, bad rows before warnings."""
        found = [*self.bad, *self.warnings]
        lines = [f"  {'warning: ' if f.warning else ''}{f} (line {f.line})" for f in found[:_SHOWN]]
        more = [f"  … and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
        return "\n".join([self.summary(), *lines, *more])

    def to_json(self) -> dict[str, Any]:
        return {
            "file": str(self.path),
            "images": str(self.records.folder),
            "records": self.total,
            "good": len(self.records),
            "bad": dict(Counter(finding.kind for finding in self.bad)),
            "warnings": dict(Counter(finding.kind for finding in self.warnings)),
            "first": [str(finding) for finding in self.bad[:_SHOWN]],
        }


def check_file(
    path: Path, images: Path | None = None, max_pixels: int = MAX_PIXELS, cache: Path | None = None
) -> Checked:
    """Rows, images and repetitions of a file; what is bad is left out of the records and listed.

    Raises:
        DataError: the file cannot be read, or not to its end.
    """
    cache = cache or cache_folder()
    found = scan(path, images, cache)
    findings = [*found.findings, *_repetitions(found.records.rows)]
    records, bad = _without_bad_images(found.records, max_pixels, cache)
    return Checked(Path(path), found.total, records, (*findings, *bad))


def check_reading(checked: Checked, reader: Any, max_length: int, cache: Path | None = None) -> Checked:
    """Each record as the model's reader takes it in; what it cannot read, or is longer than `max_length`, is left out.

    `reader` is a `readers.Reader`; max_length is in tokens, image tokens counted.
    """
    items: dict[int, dict[str, Any]] = {}
    lengths, bad = _lengths(checked.records, reader, cache or cache_folder(), items)
    rows = checked.records.rows
    for position in np.flatnonzero(lengths > max_length):
        reason = (
            f"{lengths[position]} tokens with the image exceed {max_length}: shorten it or raise data.max_length "
            "(at most the model's max_position_embeddings)"
        )
        row, line = int(rows["number"][position]), int(rows["line"][position])
        bad.append(Finding(row, line, checked.records[int(position)].id, "too long", reason))
    good = (lengths >= 0) & (lengths <= max_length)
    places = np.flatnonzero(good)
    kept = {new: items[old] for new, old in enumerate(places.tolist()) if old in items}
    return replace(
        checked,
        records=checked.records.select(places),
        findings=(*checked.findings, *bad),
        lengths=lengths[places],
        items=kept,
    )


def settle(sets: Sequence[Checked], on_bad_row: OnBadRow, folder: Path | None = None, say: Any = print) -> None:
    """Write the report, if there is a `folder` for it; then say what is left out, or refuse it.

    Raises:
        DataError: `error` was asked for and a row is bad, or no row is good.
    """
    if folder is not None:
        write_report(sets, on_bad_row, folder)
    place = f" (all of them in {folder / ROWS})" if folder is not None else ""
    for checked in sets:
        bad = checked.bad
        if bad and on_bad_row == "error":
            raise_bad(checked.path, [str(finding) for finding in bad], _remedy(place))
        if not len(checked.records):
            raise_bad(checked.path, [str(finding) for finding in bad], f"; no record is left{place}")
        if bad:
            left = len({finding.row for finding in bad})
            say(f"{checked.path}: {left:,} of {checked.total:,} records are bad and left out{place}")
            for finding in bad[:_SHOWN]:
                say(f"  {finding}")
        if checked.warnings:
            told = ", ".join(f"{n:,} {kind}" for kind, n in Counter(w.kind for w in checked.warnings).items())
            say(f"{checked.path}: {told}{place}")


def write_report(sets: Sequence[Checked], on_bad_row: OnBadRow, folder: Path) -> None:
    """`preflight.json` (counts by file) and `preflight-rows.jsonl` (a line for each finding, by file and row)."""
    write_json(folder / REPORT, {"on_bad_row": on_bad_row, "files": [checked.to_json() for checked in sets]})
    write_lines(folder / ROWS, _lines(sets))


def _lines(sets: Sequence[Checked]) -> Iterator[dict[str, Any]]:
    for checked in sets:
        for finding in sorted(checked.findings):
            level = "warning" if finding.warning else "bad"
            yield {"file": str(checked.path), "level": level, **finding._asdict(), "warning": finding.warning}


def _remedy(place: str) -> str:
    return f"{place}; mend them, or leave them out with --on-bad-row skip"


def _repetitions(rows: np.ndarray) -> list[Finding]:
    """Records that repeat image and conversation of an earlier one, and ids that come again: warnings."""
    found = []
    for column, kind, words in (
        ("text", "duplicate records", "has the image and conversation of record"),
        ("name", "duplicate ids", "has the id of record"),
    ):
        _, first, which = np.unique(rows[column], return_index=True, return_inverse=True)
        earlier = first[which]
        again = np.flatnonzero((earlier != np.arange(len(rows))) & (rows[column] != 0))
        numbers = rows["number"]
        found += [
            Finding(int(numbers[i]), int(rows["line"][i]), "", kind, f"{words} {numbers[earlier[i]]}", True)
            for i in again
        ]
    return found


def _without_bad_images(records: RecordFile, max_pixels: int, cache: Path) -> tuple[RecordFile, list[Finding]]:
    """The records whose image can be read, and a finding for each of the others."""
    faults: dict[int, str] = {}
    count = len(np.unique(records.rows["image"]))
    with tqdm(total=count, desc=f"images of {records.path.name}", unit="image", leave=False) as bar:
        for batch in image_faults(records.images(), records.folder, max_pixels, cache):
            faults |= {key: fault for key, fault in batch if fault}
            bar.update(len(batch))
    if not faults:
        return records, []
    bad = np.isin(records.rows["image"], np.array(list(faults), np.uint64))
    findings = []
    for position in np.flatnonzero(bad).tolist():
        row, line, image = (int(records.rows[column][position]) for column in ("number", "line", "image"))
        findings.append(Finding(row, line, records[position].id, "image", faults[image]))
    return records.select(~bad), findings


def _lengths(records: RecordFile, reader: Any, cache: Path, items: Items) -> tuple[np.ndarray, list[Finding]]:
    """Length of each record, -1 where the reader refuses it, and what was refused."""
    rows = hashlib.blake2b(np.ascontiguousarray(records.rows["number"]).tobytes(), digest_size=16).hexdigest()
    images = str(records.folder.resolve())
    store = cache / "lengths" / digest_of(records.digest, rows, images, reader_fingerprint(reader))
    lengths, summary = read_array(store / "lengths.npy"), read_summary(store / "lengths.json")
    if lengths is not None and summary is not None:
        return np.asarray(lengths), [Finding(*finding) for finding in summary["findings"]]
    done = list(blocks_of(store))
    parts = [array for array, _ in done]
    findings = [Finding(*finding) for _, told in done for finding in told["findings"]]
    start = len(done) * BLOCK
    with tqdm(total=len(records), initial=start, desc=f"tokens of {records.path.name}", leave=False) as bar:
        for number, first in enumerate(range(start, len(records), BLOCK), len(done)):
            array, found = _measured(records, range(first, min(first + BLOCK, len(records))), reader, items)
            write_block(store, number, array, {"findings": found})
            parts.append(array)
            findings += found
            bar.update(len(array))
            if sum(int(part.clip(0).sum()) for part in parts) > KEPT_TOKENS:
                items.clear()
    lengths = np.concatenate([*parts, np.empty(0, np.int32)])
    write_array(store / "lengths.npy", lengths)
    write_summary(store / "lengths.json", {"findings": findings})
    drop_blocks(store)
    return lengths, findings


def _measured(records: RecordFile, numbers: range, reader: Any, items: Items) -> tuple[np.ndarray, list[Finding]]:
    measure = getattr(reader, "length", None) if len(records) > KEPT_RECORDS else None
    lengths, findings = np.full(len(numbers), -1, np.int32), []
    for place, position in enumerate(numbers):
        record = records[position]
        try:
            if measure is None:
                items[position] = reader.item(record)
                lengths[place] = items[position]["length"]
            else:
                lengths[place] = measure(record)
        except Exception as problem:  # chat templates and processors raise what they like
            own = isinstance(problem, DataError)
            reason = str(problem).removeprefix(f"record {record.id}: ")
            reason = reason if own else f"cannot be read by the model's processor ({type(problem).__name__}: {problem})"
            row, line = int(records.rows["number"][position]), int(records.rows["line"][position])
            findings.append(Finding(row, line, record.id, "text", reason))
    return lengths, findings


def reader_fingerprint(reader: Any) -> str:
    """Digest of what a record's length depends on beside the record: tokenizer, template, the processor's settings."""
    tokenizer, processor = reader.tokenizer, getattr(reader, "processor", None)
    form = getattr(reader, "form", None)
    written = getattr(processor, "to_dict", None) if processor is not tokenizer else None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = {
        "reader": type(reader).__name__,
        "form": {name: str(getattr(form, name)) for name in getattr(form, "__slots__", ()) if name != "render"},
        "templates": [str(getattr(part, "chat_template", None)) for part in (processor, tokenizer)],
        "special": [str(mark) for mark in tokenizer.all_special_tokens],
        "processor": written() if written else None,
        "image_tokens": getattr(processor, "image_tokens", None),
        "tokenizer": backend.to_str() if backend is not None else f"{type(tokenizer).__name__} {tokenizer!r}",
    }
    return digest_of(json.dumps(told, sort_keys=True, default=str))

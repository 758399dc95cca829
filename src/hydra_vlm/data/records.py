"""LLaVA-format instruction data: a JSON list of records (or one a line), images in a folder beside it. No torch.

A record: `id`, optional `image` (path relative to the image folder), `conversations` (alternating `human` and `gpt`
turns); `<image>` stands once, in the first human turn, if and only if there is an image. An optional `task` groups
records in reports; other keys are ignored.
"""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra_vlm.data.image_files import MAX_PIXELS, image_fault, place_fault
from hydra_vlm.data.json_rows import rows_of
from hydra_vlm.errors import DataError
from hydra_vlm.names import path_fault, resolved, shown

IMAGE_TOKEN = "<image>"
T = TypeVar("T")
_SHOWN = 10  # how many bad records one error lists


@dataclass(frozen=True, slots=True)
class Record:
    """One instruction record; `image` is an absolute path, `rounds` are (human, gpt) pairs."""

    id: str
    image: str | None
    rounds: tuple[tuple[str, str], ...]
    task: str = ""


def read_records(path: Path, images: Path | None = None) -> list[Record]:
    """Read a LLaVA-format file into memory; `images` is the image folder (default: the folder of the file).

    For a set to train on, `record_file.RecordFile` reads one record at a time.

    Raises:
        DataError: naming file, index and reason for (up to ten of) the bad records.
    """
    folder = Path(images) if images else Path(path).parent
    root = resolved(folder)
    records, problems, number = [], [], -1
    for row in rows_of(Path(path)):
        number = row.number
        try:
            if row.fault:
                raise ValueError(row.fault)
            record = record_of(row.value, number, folder)
            if record.image is not None and (misplaced := place_fault(record.image, root)):
                raise ValueError(misplaced)
            records.append(record)
        except ValueError as problem:
            problems.append(f"record {number}: {problem}")
    if number < 0:
        raise DataError(f"{path} must hold a non-empty JSON list of records, found none")
    raise_bad(path, problems)
    return records


def check_images(path: Path, records: Sequence[Record], max_pixels: int = MAX_PIXELS) -> None:
    """Decode every image once, before any training.

    Raises:
        DataError: naming file, index and reason for missing, truncated, undecodable or oversized images.
    """
    problems, checked = [], set()
    for index, record in enumerate(records):
        if record.image is None or record.image in checked:
            continue
        checked.add(record.image)
        if fault := image_fault(record.image, None, max_pixels):
            problems.append(f"record {index} (id {record.id}): {fault}")
    raise_bad(path, problems)


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write LLaVA-format records as they are, one JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(records), indent=0), encoding="utf-8")


def sample(items: Sequence[T], limit: int | None, seed: int = 0) -> list[T]:
    """At most `limit` items (None: all), chosen by `seed`, in their original order."""
    return [items[i] for i in sample_numbers(len(items), limit, seed)]


def sample_numbers(count: int, limit: int | None, seed: int = 0) -> Sequence[int]:
    """The positions that `sample` chooses of `count`."""
    if limit is None or limit >= count:
        return range(count)
    return sorted(random.Random(seed).sample(range(count), limit))


def record_of(item: Any, index: int, folder: Path) -> Record:
    """The record in a row's value; whether its image is there is not asked.

    Raises:
        ValueError: the reason, in words that follow "record 3: ".
    """
    if not isinstance(item, dict):
        raise ValueError(f"must be an object, found {type(item).__name__}")
    turns = item.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError("`conversations` must be a non-empty list of turns")
    rounds = tuple(_rounds(turns))
    image = item.get("image")
    if image is not None and not isinstance(image, str):
        raise ValueError(f"`image` must be one path, found {type(image).__name__}")
    marks = [human.count(IMAGE_TOKEN) for human, _ in rounds]
    if image is not None and sum(marks) == 0:
        raise ValueError(f"names image {image!r} but no human turn contains {IMAGE_TOKEN}: put it in the first one")
    if image is None and sum(marks) > 0:
        raise ValueError(f"contains {IMAGE_TOKEN} but names no `image`")
    if sum(marks) > 1 or (sum(marks) == 1 and marks[0] == 0):
        raise ValueError(f"{IMAGE_TOKEN} must stand exactly once, in the first human turn (found per turn: {marks})")
    if image is not None and (fault := path_fault(image, "the image folder")):
        raise ValueError(f"names image {shown(image)}, which {fault}")
    location = None if image is None else str(folder / image)
    return Record(str(item.get("id", index)), location, rounds, str(item.get("task", "")))


def _rounds(turns: list[Any]) -> Iterable[tuple[str, str]]:
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f"turn {position} must be an object with a string `value`")
        expected = ("human", "gpt")[position % 2]
        if turn.get("from") != expected:
            raise ValueError(f"turn {position} must be from {expected!r}, found {turn.get('from')!r}")
    if len(turns) % 2:
        raise ValueError(f"{len(turns)} turns: every human turn needs an answer")
    for human, answer in zip(turns[::2], turns[1::2], strict=True):
        if not answer["value"].strip():
            raise ValueError("has an empty answer")
        yield human["value"], answer["value"]


def raise_bad(path: Path, problems: Sequence[str], remedy: str = "") -> None:
    """Raises DataError with the number of bad records and the first of them, where there are any."""
    if not problems:
        return
    shown = "\n  ".join(problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DataError(f"{path}: {len(problems)} bad record(s), nothing was trained{remedy}:\n  {shown}{more}")

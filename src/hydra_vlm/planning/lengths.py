"""How long the data's rows are, from a seeded sample, or from the configuration where there is no data to read."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hydra_vlm.benchmarks.protocol import Example
from hydra_vlm.benchmarks.suite import tasks_of
from hydra_vlm.config import Config
from hydra_vlm.data.batches import (
    WORTH_PACKING,
    common_beginning,
    needed_positions,
    supervised_positions,
)
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.record_file import scan
from hydra_vlm.data.records import Record, sample, sample_numbers
from hydra_vlm.data.templates import IGNORED
from hydra_vlm.errors import DataError
from hydra_vlm.planning.shapes import Batch

SAMPLE = 512
"""Rows that are tokenized for a plan; more change the mean little, and the longest is a sample's in any case."""

BATCH = 16
"""Rows that are made a batch of, images included, to see what they have in common."""

DRAWS = 64
"""Batches drawn from the sample, whose mean longest row is what a step pads to."""


@dataclass(frozen=True)
class Rows:
    """Lengths in tokens of some rows, how many rows there are in all, and per row supervised tokens and images.

    `common` is the beginning that all share, `tail` the tokens of a row, on average, that no supervised one sees.
    """

    lengths: tuple[int, ...]
    count: int
    supervised: float
    images: float
    common: int = 0
    tail: float = 0.0

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    def padded(self, rows: int, by_length: bool = False) -> float:
        """What a batch of so many rows is padded to on average."""
        if by_length:
            return fmean(self.lengths)
        draw = random.Random(0)
        return fmean(max(draw.choices(self.lengths, k=rows)) for _ in range(DRAWS))

    def batch(self, rows: int, length: float) -> Batch:
        """A batch of `rows` that is padded to `length`."""
        supervised = min(self.supervised, length)
        return Batch(rows, round(length), round(rows * self.images), round(rows * supervised))

    def packed(self, rows: int, length: float, own: float) -> Batch:
        """The same batch of rows that are `own` long, with what training leaves out left out."""
        whole = self.batch(rows, length - self.tail)
        computed = self.common + round(rows * (own - self.tail - self.common))
        spares = rows > 1 and computed <= WORTH_PACKING * rows * length
        return replace(whole, packed=computed) if spares else self.batch(rows, length)


@dataclass(frozen=True)
class DataSize:
    """Training rows, validation rows and test prompts, how many different images they show, and where that is from.

    An image of a test that is one of training as well counts twice.
    """

    train: Rows
    validation: Rows | None
    tests: Rows | None
    images: int
    source: str
    is_read: bool


def data_size(config: Config, processor: Any | None, longest: int, image_token: int | None = None) -> DataSize:
    """Read the data if it is there, else take `data.max_length` for every row.

    `longest` is the model's own limit, `image_token` what stands for an image in its rows. A built-in set is written to
    a folder that is removed again. Without a processor there is nothing to read the data with.
    """
    limit = min(config.data.max_length, longest)
    if processor is not None and config.data.train in BUILTIN:
        with tempfile.TemporaryDirectory() as folder:
            return _read(
                config, processor, write_builtin(config.data.train, Path(folder) / "data"), Path(folder), image_token
            )
    wish, path = config.data, Path(config.data.train)
    if processor is not None and path.is_file():
        files = DataFiles(path, wish.validation, wish.tests, wish.images, wish.benchmarks)
        with tempfile.TemporaryDirectory() as scratch:
            return _read(config, processor, files, Path(scratch), image_token)
    why = f"{path} is not there" if processor is not None else "the model has no processor"
    rows = Rows((limit,), 0, float(limit), 1.0)
    return DataSize(rows, rows, rows, 0, f"{why}: every row is taken for {limit} tokens (data.max_length)", False)


def _read(config: Config, processor: Any, files: DataFiles, scratch: Path, image_token: int | None) -> DataSize:
    reader = open_reader(processor, config.data.template)
    train = scan(files.train, files.images).records
    validation = None
    if files.validation:
        validation = scan(files.validation, files.images).records
        validation = validation.select(sample_numbers(len(validation), config.data.validation_limit))
    has_tests = bool(files.tests) or files.benchmarks is not None
    tasks = tasks_of(files, (), scratch / "images") if has_tests else []
    limited = [task.limited(config.evaluation.limit) for task in tasks]
    questions = [example for task in limited for example in task.examples]
    seen = np.concatenate([found.rows["image"] for found in (train, validation) if found is not None])
    images = np.count_nonzero(np.unique(seen)) + len({e.image for e in questions if e.image})
    size = DataSize(
        train=_with_ends(_rows(reader, train), reader, train, image_token),
        validation=_with_ends(_rows(reader, validation), reader, validation, image_token) if validation else None,
        tests=_rows(reader, [_asked(example) for example in questions]) if questions else None,
        images=int(images),
        source="",
        is_read=True,
    )
    told = f"{len(size.train.lengths)} of {len(train):,} training rows tokenized, longest {size.train.longest}"
    return DataSize(size.train, size.validation, size.tests, size.images, told, True)


def _rows(reader: Reader, records: Sequence[Record]) -> Rows:
    chosen = sample(records, SAMPLE)
    items = [reader.item(record) for record in chosen]
    answers = [
        sum(label != IGNORED for label in item["labels"])
        if "labels" in item
        else sum(len(reader.tokenizer(answer)["input_ids"]) + 1 for _, answer in record.rounds)
        for record, item in zip(chosen, items, strict=True)
    ]
    shown = fmean(record.image is not None for record in chosen)
    return Rows(tuple(item["length"] for item in items), len(records), fmean(answers), shown)


def _with_ends(rows: Rows, reader: Reader, records: Sequence[Record], image_token: int | None) -> Rows:
    """With what rows have in common, and have behind their last answer, from some that are read as a batch.

    Where one of these does not read, which is for preflight to say, nothing is taken to be left out.
    """
    try:
        batch = reader.batch([reader.item(record) for record in sample(records, BATCH)])
    except DataError:
        return rows
    supervised = supervised_positions(batch["labels"])
    own = batch["attention_mask"].sum(dim=1) - needed_positions(supervised)
    return replace(
        rows, common=common_beginning(batch["input_ids"], supervised, image_token), tail=float(own.float().mean())
    )


def _asked(example: Example) -> Record:
    """A question as a record, whose answer is one word."""
    mark = "<image>\n" if example.image else ""
    return Record(example.id, example.image, ((f"{mark}{example.question}", "a"),))

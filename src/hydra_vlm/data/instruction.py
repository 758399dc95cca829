"""Instruction records as training examples, written out when a batch is made."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from hydra_vlm.data.preflight import Checked
from hydra_vlm.data.readers import Reader
from hydra_vlm.data.record_file import RecordFile
from hydra_vlm.data.records import Record
from hydra_vlm.errors import DataError


class InstructionDataset(Dataset[dict[str, Any]]):
    """Conversations as the model's reader takes them in: each item is what `reader.batch` makes a batch of.

    `lengths` are each record's tokens, image tokens counted. Of a large set nothing else is in memory.
    """

    def __init__(self, records: Sequence[Record], reader: Reader, max_length: int) -> None:
        """Check every record's text and length now, so that nothing stops the training later.

        Raises:
            DataError: a special mark in a text, or a conversation longer than `max_length` after image tokens.
        """
        self.records, self.reader = records, reader
        self._kept: Mapping[int, dict[str, Any]] = {i: reader.item(record) for i, record in enumerate(records)}
        self.lengths = np.array([item["length"] for item in self._kept.values()], np.int32)
        for record, length in zip(records, self.lengths, strict=True):
            if length > max_length:
                raise DataError(
                    f"record {record.id}: {length} tokens with the image exceed {max_length}: "
                    "shorten it or raise data.max_length (at most the model's max_position_embeddings)"
                )

    @classmethod
    def of_checked(cls, checked: Checked, reader: Reader) -> "InstructionDataset":
        """A file's good records after `preflight.check_reading`, read one at a time."""
        made = cls((), reader, 0)
        assert checked.lengths is not None  # check_reading
        made.records, made.lengths, made._kept = checked.records, checked.lengths, checked.items or {}
        return made

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._kept.get(index)
        if item is None:
            item = self.reader.item(self.records[index])
        return item | {"place": self.place(index)}

    def place(self, index: int) -> str:
        """Where a record stands, for messages."""
        if isinstance(self.records, RecordFile):
            return self.records.place(index)
        return f"record {self.records[index].id}"

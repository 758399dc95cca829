"""Instruction records as training examples."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from hydra_vlm.data.readers import Reader
from hydra_vlm.data.records import Record
from hydra_vlm.errors import DataError


class InstructionDataset(Dataset[dict[str, Any]]):
    """Conversations as the model's reader takes them in: each item is what `reader.batch` makes a batch of."""

    def __init__(self, records: Sequence[Record], reader: Reader, max_length: int) -> None:
        """Check every record's text and length now, so that nothing stops the training later.

        Raises:
            DataError: a special mark in a text, or a conversation longer than `max_length` after image tokens.
        """
        self.records, self.reader = records, reader
        self.items = [reader.item(record) for record in records]
        for record, item in zip(records, self.items, strict=True):
            if item["length"] > max_length:
                raise DataError(
                    f"record {record.id}: {item['length']} tokens with the image exceed {max_length}: "
                    "shorten it or raise data.max_length (at most the model's max_position_embeddings)"
                )

    @property
    def lengths(self) -> list[int]:
        """Each record's tokens, image tokens counted."""
        return [item["length"] for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

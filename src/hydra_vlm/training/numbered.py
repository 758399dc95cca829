"""Batches that know which records they hold, so that whatever goes wrong with one names them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.errors import DataError, HydraError
from hydra_vlm.faults import first_line, is_disk_full, is_out_of_memory

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, HydraError)
"""What reading an image or a text raises; PIL's SyntaxError is a broken PNG."""

NUMBERS = "record_numbers"
"""The batch's field with its records' numbers [B]; the trainer takes it out before the model sees the batch."""

SOURCE = "record_source"
"""An item's field with the `Numbered` that it comes from; it ends where a batch is made."""

Batch = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


class Numbered(Dataset[dict[str, Any]]):
    """A data set whose items carry their number, and know where they come from."""

    def __init__(self, data: InstructionDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.data[index], NUMBERS: index, SOURCE: self}

    def told(self, number: int) -> dict[str, str]:
        """What a user finds a record by: its `id` and its `place` in the file."""
        return {"id": self.data.records[number].id, "place": self.data.place(number)}


class NumberedBatch:
    """A reader's `batch` that passes the numbers on, and names the record that a batch cannot be made of.

    A class and not a function inside of one, since loading workers are given it as a copy.
    """

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The model's arguments, and the numbers of the records.

        Raises:
            DataError: an image that could be read when training began cannot be read now.
        """
        rows = [{key: value for key, value in item.items() if key not in (NUMBERS, SOURCE)} for item in items]
        try:
            made = self.batch(rows)
        except UNREADABLE as problem:
            if is_out_of_memory(problem) or is_disk_full(problem):
                raise
            raise DataError(self._culprit(rows, [_name(item) for item in items], problem)) from None
        return {**made, NUMBERS: torch.tensor([item[NUMBERS] for item in items])}

    def _culprit(self, rows: Sequence[dict[str, Any]], names: Sequence[str], problem: Exception) -> str:
        """The first record that makes no batch by itself; where each does, all of them."""
        for name, row in zip(names, rows, strict=True):
            try:
                self.batch([row])
            except UNREADABLE as own:
                image = f" with image {row['image']}" if row.get("image") else ""
                return (
                    f"{name}{image} can no longer be read: {type(own).__name__}: {first_line(own)}. Put the file right "
                    "and repeat the same command: training goes on from its last checkpoint"
                )
        return f"{', '.join(names)} cannot be made one batch: {type(problem).__name__}: {first_line(problem)}"


def _name(item: dict[str, Any]) -> str:
    told = item[SOURCE].told(item[NUMBERS])
    return f"record {told['id']} ({told['place']})"

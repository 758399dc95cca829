"""Instruction records as training examples, and their collation into batches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hydra_vlm.data.features import image_inputs
from hydra_vlm.data.records import Record
from hydra_vlm.data.templates import IGNORED, Template, encode, require_plain_text, segments
from hydra_vlm.errors import DataError


class InstructionDataset(Dataset[dict[str, Any]]):
    """Encoded conversations: each item holds `input_ids`, `labels` (equally long) and `image` (path or None)."""

    def __init__(self, records: Sequence[Record], processor: Any, form: Template, max_length: int) -> None:
        """Check every record's text and length now, so that nothing stops the training later.

        Raises:
            DataError: a special mark in a text, or a conversation longer than `max_length` after image tokens.
        """
        self.records, self.processor, self.form = records, processor, form
        self.items = [self._encode(record) for record in records]
        for record, item in zip(records, self.items, strict=True):
            if len(item["input_ids"]) > max_length:
                raise DataError(
                    f"record {record.id}: {len(item['input_ids'])} tokens with the image exceed {max_length}: "
                    "shorten it or raise data.max_length (at most the model's max_position_embeddings)"
                )

    def _encode(self, record: Record) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        for text in (part for pair in record.rounds for part in pair):
            require_plain_text(text, tokenizer, f"record {record.id}")
        ids, labels = encode(segments(self.form, record.rounds), tokenizer, self.processor.image_tokens)
        return {"input_ids": ids, "labels": labels, "image": record.image}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


@dataclass(frozen=True)
class Collate:
    """Items to a batch, padded on the right: `input_ids`, `attention_mask`, `labels` [B, L], and the images.

    Images come as `image_features` where the frozen tower's features are at hand, else as `pixel_values`.
    """

    processor: Any
    features: Mapping[str, Tensor] | None = None

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        pad = self.processor.tokenizer.pad_token_id
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        batch = {
            "input_ids": _padded([item["input_ids"] for item in items], width, pad),
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": _padded([item["labels"] for item in items], width, IGNORED),
        }
        images = [item["image"] for item in items if item["image"] is not None]
        return batch | image_inputs(images, self.features, self.processor)


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

"""Rows of one conversation each, put together as a batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hydra_vlm.data.templates import IGNORED

WORTH_PACKING = 0.97
"""Above this share of positions that stay, moving them costs what the others would (`training.packed`, plans)."""


def stack(rows: Sequence[Mapping[str, Tensor]], pad: int | None, side: str) -> dict[str, Tensor]:
    """Rows of one conversation each as a batch; `attention_mask` is added where a row has none.

    What runs along the tokens ([1, L] or [1, L, ...]) is padded on `side`; image tensors are put one after another,
    with zeros where they differ behind their first dimension (fewer patches or crops, smaller pixels).
    """
    lengths = [row["input_ids"].shape[1] for row in rows]
    width = max(lengths)
    full = [{"attention_mask": torch.ones_like(row["input_ids"]), **row} for row in rows]
    fills = {"input_ids": pad or 0, "labels": IGNORED}
    columns: dict[str, list[Tensor]] = {}
    for row, length in zip(full, lengths, strict=True):
        for name, value in row.items():
            if value.shape[:2] == (1, length):
                value = _padded(value, width, side, fills.get(name, 0))
            columns.setdefault(name, []).append(value)
    return {name: _together(values) for name, values in columns.items()}


def supervised_positions(labels: Tensor) -> Tensor:
    """Whether each position [B, L] has a label behind it."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED


def common_beginning(ids: Tensor, supervised: Tensor, image_token: int | None) -> int:
    """Positions that all rows [B, L] begin with, up to the first image and the first supervised one.

    Without an `image_token` it is not known where images begin, and there are none.
    """
    if image_token is None or len(ids) < 2:
        return 0
    same = (ids == ids[0]).all(dim=0) & (ids[0] != image_token) & ~supervised.any(dim=0)
    return int(same.cumprod(0).sum())


def needed_positions(supervised: Tensor) -> Tensor:
    """How many positions [B] of each row [B, L] its last supervised one comes to see, itself included."""
    place = torch.arange(1, supervised.shape[1] + 1, device=supervised.device)
    return (supervised * place).amax(dim=1)


def _padded(value: Tensor, width: int, side: str, fill: int) -> Tensor:
    missing = value.new_full((1, width - value.shape[1], *value.shape[2:]), fill)
    return torch.cat([value, missing] if side == "right" else [missing, value], dim=1)


def _together(values: Sequence[Tensor]) -> Tensor:
    shapes = {value.shape[1:] for value in values}
    if len(shapes) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        grown = [value.new_zeros((value.shape[0], *largest)) for value in values]
        for target, value in zip(grown, values, strict=True):
            target[tuple(slice(size) for size in value.shape)] = value
        values = grown
    return torch.cat(list(values))

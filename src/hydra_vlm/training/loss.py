"""The loss: a mean over supervised tokens, in which every token counts the same wherever it stands.

Neither the split of a global batch into device batches, nor packing, nor the number of processes changes it. A model's
own loss is a mean over whatever it is given, and some families can be told nothing else (`accepts_loss_kwargs` is false
in Qwen2-VL, Qwen3-VL, Gemma 3, ...), so the loss is made here, from logits.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from hydra_vlm.data.batches import supervised_positions
from hydra_vlm.data.templates import IGNORED
from hydra_vlm.training.processes import from_all_processes
from hydra_vlm.training.supervised import SupervisedPositions


def token_losses(logits: Tensor, labels: Tensor, positions: SupervisedPositions | None) -> Tensor:
    """The cross-entropy of each token in float32: [1, N] of gathered logits, else [B, L] with 0 where none is asked.

    `logits` are [B, L, V] or, gathered at `positions`, [1, N, V]; `labels` are [B, L].
    """
    if positions is not None and positions.rows is not None and logits.shape[:-1] == positions.following.shape:
        following = positions.following
    else:
        following = pad(labels[:, 1:], (0, 1), value=IGNORED)
    flat = logits.flatten(0, 1).float()
    losses = cross_entropy(flat, following.to(flat.device).flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(following.shape)


def mean_over_batch(positions: SupervisedPositions | None) -> Callable[..., Tensor]:
    """The Trainer's `compute_loss_func`: a device batch's part of the mean over its global batch."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if num_items_in_batch is None:
            num_items_in_batch = supervised_positions(labels).sum()
        count = torch.as_tensor(num_items_in_batch, device=outputs["logits"].device)
        return token_losses(outputs["logits"], labels, positions).sum() / count.clamp(min=1)

    return loss


@dataclass(frozen=True)
class SetLoss:
    """The mean over a data set's supervised tokens, and the numbers of the records in which a loss is no number.

    `loss` is not finite where there are such records, for a mean of the others would be the loss of another set.
    """

    loss: float
    tokens: int
    nonfinite: tuple[int, ...]


@dataclass
class Tally:
    """Token losses as they come, batch by batch; they stay on the device until `total`."""

    _losses: list[Tensor] = field(default_factory=list)
    _numbers: list[Tensor] = field(default_factory=list)

    def add(self, losses: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """One batch: what `token_losses` gave, the labels [B, L], the records' numbers [B]."""
        supervised = supervised_positions(labels)
        rows = supervised.nonzero()[:, 0]
        self._losses.append(losses[supervised] if losses.shape == labels.shape else losses.flatten())
        self._numbers.append(numbers[rows])

    def total(self) -> SetLoss:
        """Of all processes together; sums are made in float64, so that their order does not show."""
        losses, numbers = torch.cat(self._losses).cpu().double(), torch.cat(self._numbers).cpu()
        bad = numbers[~losses.isfinite()].unique().tolist()
        found = from_all_processes((float(losses.sum()), len(losses), bad))
        count = sum(part[1] for part in found)
        mean = sum(part[0] for part in found) / count if count else math.nan
        return SetLoss(mean, count, tuple(sorted(number for part in found for number in part[2])))


@contextmanager
def draws_kept(device: torch.device) -> Iterator[None]:
    """Random states are afterwards what they were: a training goes on as it would without what is in between."""
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield

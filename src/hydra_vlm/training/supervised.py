"""Only supervised positions go where the loss alone is made: through the head, and through the end of the last layer.

Of an instruction's tokens few are supervised, and none of the others has a part in the loss once its keys and values
are read by the last attention. So the last layer's queries, attention output and feed-forward block, and the head, run
on gathered rows [1, N, C] in place of [B, L, C]. Loss and gradients are those of the whole forward; only hidden states
and logits elsewhere are not computed.

It works on any model of transformers whose head is one module that is called once; a call that does not look like that
passes unchanged. The loss is made of the gathered logits outside of the model (`training.loss`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hydra_vlm.data.batches import supervised_positions
from hydra_vlm.models.structure import ModelParts

DENSE_LINEARS = {"gate_proj", "up_proj", "down_proj", "gate_up_proj", "fc1", "fc2"}
"""Linears of feed-forward blocks that treat each position by itself; what routes tokens to experts is none of them."""


class Packed(Protocol):
    """What is to be known here of a batch that the decoder computes as one row of T positions (`training.packed`)."""

    @property
    def picked(self) -> Tensor:
        """Their numbers [T] in the flattened batch, ascending; supervised ones are all among them."""
        ...


MOST = 0.75
"""Above this share of supervised positions, gathering rows costs more than it spares."""


class SupervisedPositions:
    """Which positions of the batch at hand have a label behind them; all else is as in the plain forward.

    Attributes:
        rows: numbers [N] of those positions in the flattened batch, or None for a plain forward.
        following: the labels [1, N] behind them.
        shape: (B, L) of the batch.
        plan: how a batch, and whether a position [B, L] is supervised, become a packing (`training.packed`).
        planned: that of the batch at hand, which the decoder may take; None to pack nothing.
    """

    def __init__(self) -> None:
        self.rows: Tensor | None = None
        self.following = torch.empty(0)
        self.shape: tuple[int, ...] = ()
        self.plan: Callable[[Mapping[str, Any], Tensor], Packed | None] | None = None
        self.planned: Packed | None = None

    def read(self, batch: Mapping[str, Any]) -> None:
        """Take the labels [B, L] of the batch that comes next; they hold until the next are read.

        They outlast the forward pass, for gradient checkpointing runs layers again in the backward pass.
        """
        self.rows = self.planned = None
        labels = batch.get("labels")
        if labels is None or labels.dim() != 2:
            return
        supervised = supervised_positions(labels)
        rows = supervised.flatten().nonzero().squeeze(1)
        if 0 < len(rows) <= MOST * labels.numel():
            following = labels.flatten()[rows + 1]  # no row's last position is supervised
            self.rows, self.following, self.shape = rows, following[None], tuple(labels.shape)
            self.planned = self.plan(batch, supervised) if self.plan else None

    def gather(self, hidden: Tensor) -> Tensor:
        """[B, L, C], or packed [1, T, C] -> [1, N, C]; of any other shape, as it is."""
        rows = self._rows_in(tuple(hidden.shape[:-1]))
        return hidden if rows is None else hidden.flatten(0, -2).index_select(0, rows)[None]

    def scatter(self, computed: Tensor, shape: tuple[int, ...]) -> Tensor:
        """[1, N, C] -> the shape [B, L] or [1, T] that was gathered from, with zeros at other positions."""
        rows = self._rows_in(shape)
        if rows is None:
            return computed
        blank = computed.new_zeros((shape[0] * shape[1], computed.shape[-1]))
        return blank.index_copy(0, rows, computed[0]).view(*shape, -1)

    def _rows_in(self, shape: tuple[int, ...]) -> Tensor | None:
        if self.rows is None or shape == self.shape:
            return self.rows
        if self.planned is not None and shape == (1, len(self.planned.picked)):
            return torch.searchsorted(self.planned.picked, self.rows)
        return None


@contextmanager
def supervised_only(model: Any, parts: ModelParts) -> Iterator[SupervisedPositions]:
    """While the block lasts, the (unwrapped) model computes what its loss needs, at the positions last read."""
    positions = SupervisedPositions()
    head = model.get_output_embeddings()
    with ExitStack() as undo:
        hook = head.register_forward_pre_hook(lambda _, inputs: (positions.gather(inputs[0]), *inputs[1:]))
        undo.callback(hook.remove)
        for module in _ends(model, parts):
            _compute_at(module, positions, undo)
        yield positions


def _compute_at(module: nn.Module, positions: SupervisedPositions, undo: ExitStack) -> None:
    """Have a module of the decoder compute at supervised positions alone."""
    shapes: list[tuple[int, ...]] = []

    def before(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes[:] = [tuple(inputs[0].shape[:-1])]
        return (positions.gather(inputs[0]), *inputs[1:])

    gathering = module.register_forward_pre_hook(before)
    scattering = module.register_forward_hook(lambda _, __, output: positions.scatter(output, shapes[0]))
    undo.callback(gathering.remove)
    undo.callback(scattering.remove)


def _ends(model: nn.Module, parts: ModelParts) -> list[nn.Module]:
    """The modules of the last decoder layer that treat positions one by one and whose results only the loss reads.

    Keys and values are not among them: supervised positions read those of all others.
    """
    layers = model.get_submodule(parts.layers)
    assert isinstance(layers, nn.ModuleList)
    found = []
    for name, module in layers[-1].named_children():
        if name == "self_attn":
            found += [child for part, child in module.named_children() if part in ("q_proj", "o_proj")]
        elif name == "mlp" and {part for part, _ in module.named_children()} <= DENSE_LINEARS | {
            "act_fn",
            "activation_fn",
        }:
            found.append(module)
    return found

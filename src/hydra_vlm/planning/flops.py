"""FLOPs of matrix products (a multiplication and an addition are two), from plain numbers. No torch.

A frozen linear costs 2 T in out forward and as much backward, for the gradient of its input; a trained one twice as
much backward. Attention costs 4 B H d L² forward; twice that backward, 2.5 times where fused attention computes the
scores again. LoRA of rank r costs 2 T r (in + out) forward, twice that backward. Gradient checkpointing computes each
layer's forward pass twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hydra_vlm.planning.memory import head_positions, is_end
from hydra_vlm.planning.shapes import Batch, Linear, Manner, Shape, Stack

FORMULA = (
    "FLOPs count matrix products, 2 a multiply-add. Forward: 2 T (sum of in x out + rank (in + out)) + 4 B H d L^2 a "
    "layer, 2 C V a position with logits. Backward: once more for frozen weights, twice for trained ones and attention"
)


@dataclass(frozen=True)
class Work:
    """FLOPs of one step or batch by what they are spent on."""

    layers: int
    attention: int
    adapter: int
    head: int
    projector: int
    tower: int

    @property
    def total(self) -> int:
        return self.layers + self.attention + self.adapter + self.head + self.projector + self.tower


def forward(shape: Shape, batch: Batch, positions_with_logits: int, end: int | None = None) -> Work:
    """One forward pass; `end` is the number of positions that reach the end of the last layer (None: all)."""
    stack, tokens = shape.decoder, batch.positions
    spared = (tokens - end) if end is not None else 0

    def over_layers(cost: Callable[[Linear], int]) -> int:
        last = sum(cost(p) for p in stack.layers[-1] if is_end(p))
        return 2 * (tokens * sum(cost(p) for layer in stack.layers for p in layer) - spared * last)

    return Work(
        layers=over_layers(lambda p: p.weights),
        attention=len(stack.layers) * 4 * batch.rows * stack.attention * batch.length**2,
        adapter=over_layers(lambda p: p.rank * (p.inputs + p.outputs)),
        head=2 * positions_with_logits * stack.width * shape.vocabulary,
        projector=batch.images * shape.projector.forward,
        tower=0 if shape.tower.is_cached else batch.images * shape.tower.forward,
    )


def training_step(shape: Shape, batch: Batch, how: Manner, full: bool = False, trained_projector: bool = True) -> Work:
    """Forward and backward of one batch on one device."""
    few = head_positions(batch, how)
    once = forward(shape, batch, few, few)
    again = 1 if how.checkpointing else 0
    attention = 2.5 if how.attention == "sdpa" else 2.0
    return Work(
        layers=once.layers * (1 + again + (2 if full else 1)),
        attention=int(once.attention * (1 + again + attention)),
        adapter=once.adapter * (3 + again) if not full else 0,
        head=once.head * (3 if full else 2),
        projector=once.projector + batch.images * (shape.projector.backward if trained_projector else 0),
        tower=once.tower * (1 + (_tower_backward(shape) if not full else 0)),
    )


def _tower_backward(shape: Shape) -> int:
    stack = shape.tower_stack
    return 1 if stack is not None and any(p.rank for layer in stack.layers for p in layer) else 0


def generation(shape: Shape, batch: Batch, new_tokens: int) -> Work:
    """Answers of a batch: the prompts at once, then a position a step over the keys and values so far."""
    prompt = forward(shape, batch, batch.rows)
    stack = shape.decoder
    steps = max(0, new_tokens - 1)
    each = [forward(shape, Batch(batch.rows, 1, 0, 0), batch.rows)] * (1 if steps else 0)
    seen = sum(batch.length + i for i in range(1, steps + 1))
    return Work(
        layers=prompt.layers + steps * sum(w.layers for w in each),
        attention=prompt.attention + len(stack.layers) * 4 * batch.rows * stack.attention * seen,
        adapter=prompt.adapter + steps * sum(w.adapter for w in each),
        head=prompt.head + steps * sum(w.head for w in each),
        projector=prompt.projector,
        tower=prompt.tower,
    )


def stack_forward(stack: Stack, positions: int) -> int:
    """FLOPs of a tower's layers over one image of so many positions."""
    linears = sum(p.weights for layer in stack.layers for p in layer)
    return 2 * positions * linears + len(stack.layers) * 4 * stack.attention * positions**2

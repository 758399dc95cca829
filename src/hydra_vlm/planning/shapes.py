"""Plain numbers that a plan is computed from: a model's shape, how it is computed, a batch. No torch.

Symbols in this room: C width of the residual stream, F width of the feed-forward, H heads, d width of a head, V
vocabulary, L tokens of the longest row (image tokens counted), B rows on one device, T = B L positions.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Linear:
    """One projection of a layer; `rank` of its LoRA adapter, 0 where it has none."""

    component: str
    inputs: int
    outputs: int
    rank: int = 0

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


Layer = tuple[Linear, ...]


def without_ranks(layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The same layers without an adapter."""
    return tuple(tuple(replace(p, rank=0) for p in layer) for layer in layers)


@dataclass(frozen=True)
class Stack:
    """Transformer layers with softmax attention: a decoder's, or a tower's that run."""

    layers: tuple[Layer, ...]
    width: int
    heads: int
    kv_heads: int
    head_width: int

    @property
    def attention(self) -> int:
        """H d."""
        return self.heads * self.head_width


@dataclass(frozen=True)
class Projector:
    """Of one image: what its backward pass needs in bytes, FLOPs forward and backward; `parameters` in all."""

    parameters: int = 0
    saved: int = 0
    forward: int = 0
    backward: int = 0


@dataclass(frozen=True)
class Tower:
    """Of one image: FLOPs forward, bytes that the widest moment takes (float32), bytes of the pixels and of what the
    decoder's side is given (float32)."""

    forward: int = 0
    transient: int = 0
    pixels: int = 0
    features: int = 0
    is_cached: bool = False


@dataclass(frozen=True)
class Shape:
    """A model with its adapter. `parameters` counts weights by part; `quantizable` those of the decoder's linears;
    `can_pack` says that training packs its rows (`training.packed`)."""

    name: str
    decoder: Stack
    vocabulary: int
    parameters: Mapping[str, int]
    projector: Projector = Projector()
    tower: Tower = Tower()
    tower_stack: Stack | None = None
    patches: int = 0
    head_is_tied: bool = False
    can_pack: bool = False

    @property
    def adapter(self) -> int:
        """LoRA parameters."""
        stacks = (self.decoder, *([self.tower_stack] if self.tower_stack else []))
        return sum(p.rank * (p.inputs + p.outputs) for s in stacks for layer in s.layers for p in layer)

    @property
    def bare(self) -> "Shape":
        """The model without an adapter."""
        tower = self.tower_stack and replace(self.tower_stack, layers=without_ranks(self.tower_stack.layers))
        decoder = replace(self.decoder, layers=without_ranks(self.decoder.layers))
        return replace(self, decoder=decoder, tower_stack=tower)

    @property
    def quantizable(self) -> int:
        return sum(p.weights for layer in self.decoder.layers for p in layer)


@dataclass(frozen=True)
class Manner:
    """How a model is computed: sizes in bytes, and which of the memory-saving ways are taken.

    `weight` is the size of a frozen weight; `autocast` computes products in bfloat16. With
    `supervised_only`, logits and the last layer's end are computed at supervised positions alone, with `packed`, the
    decoder leaves out what `Batch.packed` does.
    """

    weight: int = 4
    autocast: bool = False
    attention: Literal["eager", "sdpa"] = "eager"
    checkpointing: bool = False
    offload: bool = False
    optimizer: str = "adamw"
    four_bits: bool = False
    supervised_only: bool = False
    packed: bool = False

    @property
    def product(self) -> int:
        """Bytes of one value of what matrix products give."""
        return 2 if self.autocast else self.weight


@dataclass(frozen=True)
class Batch:
    """Rows of `length` positions on one device; `images` and `supervised` positions in all rows together.

    `packed` positions are computed where padding, what nobody reads and all but one of what is common are left out
    (None: all).
    """

    rows: int
    length: int
    images: int
    supervised: int
    packed: int | None = None

    @property
    def padded(self) -> int:
        """B L, which attention sees in any case."""
        return self.rows * self.length

    @property
    def positions(self) -> int:
        """What goes through the decoder's linears and norms."""
        return self.padded if self.packed is None else self.packed


@dataclass(frozen=True)
class Memory:
    """Bytes by what they hold, at the moment when most is held."""

    parts: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __add__(self, other: "Memory") -> "Memory":
        names = dict.fromkeys([*self.parts, *other.parts])
        return Memory({name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in names})

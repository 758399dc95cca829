"""Attention as plain matrix products with its gradient written out, in place of transformers' `eager` one.

Fewer passes over the scores, no copies of keys and values for grouped queries, and of what autograd would keep only the
probabilities. Same values up to the order of sums. Registered as an attention of transformers, so every family whose
attention goes through that interface can use it; masks are those of `eager`.

Shapes: B rows, H heads of queries, G of them to a head of keys, L queries, S keys, D head width.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "hydra_products"
EAGER = "eager"


class ProductAttention(torch.autograd.Function):
    """softmax(s Q K' + M) V -> [B, L, H, D]; Q [B, H, L, D], K and V [B, H / G, S, D], M as wide as the scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        rows, heads, length, width = q.shape
        shared, keys = k.shape[1:3]
        q = q.reshape(rows * shared, -1, width)
        k, v = (x.reshape(rows * shared, keys, width) for x in (k, v))
        scores = _product(q, k.transpose(1, 2), scale)
        if mask is not None:
            scores.view(rows, heads, length, keys).add_(mask)
        chances = scores.softmax(dim=-1)
        ctx.save_for_backward(q, k, v, chances)
        ctx.scale, ctx.shape = scale, (rows, heads, length, width)
        return torch.bmm(chances, v).view(rows, heads, length, width).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        q, k, v, chances = ctx.saved_tensors
        rows = ctx.shape[0]
        gradient = gradients[0].transpose(1, 2).reshape(q.shape)
        by_chance = torch.bmm(gradient, v.transpose(1, 2))
        by_score = torch.ops.aten._softmax_backward_data(by_chance, chances, -1, chances.dtype)
        by_query = _product(by_score, k, ctx.scale).view(ctx.shape)
        by_key = _product(by_score.transpose(1, 2), q, ctx.scale)
        by_value = torch.bmm(chances.transpose(1, 2), gradient)
        by_key, by_value = (x.view(rows, -1, *k.shape[1:]) for x in (by_key, by_value))
        return by_query, by_key, by_value, None, None


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale x left right, of batches, in one pass."""
    return torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)


def product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers asks of an attention; anything beyond the formula goes to the family's own eager function."""
    own = any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    exact = query.dtype == torch.float32 and not torch.is_autocast_enabled(query.device.type)
    if own or dropout or not exact or attention_mask is None or query.shape[-1] != value.shape[-1]:
        eager = sys.modules[type(module).__module__].eager_attention_forward
        given = more if scaling is None else {**more, "scaling": scaling}
        return eager(module, query, key, value, attention_mask, dropout=dropout, **given)  # type: ignore[no-any-return]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    seen = attention_mask[..., : key.shape[-2]]
    return ProductAttention.apply(query, key, value, seen, scale), None


@contextmanager
def product_attention_in(decoder: nn.Module) -> Iterator[None]:
    """While the block lasts, a decoder that was loaded with eager attention computes it by this file."""
    config: Any = getattr(decoder, "config", None)
    modules = {type(module).__module__ for module in decoder.modules()}
    if getattr(config, "_attn_implementation", None) != EAGER or not any(
        hasattr(sys.modules[name], "eager_attention_forward") for name in modules
    ):
        yield
        return
    AttentionInterface.register(NAME, product_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = EAGER

"""Only positions that the loss depends on go through the decoder: no padding, no tail, a common beginning once.

The rows of a batch lie behind one another in a single row, as sequences are packed for pretraining, and these positions
are left out:

    what comes behind a row's last supervised position     nobody reads it
    the beginning that all rows share, but in the first    a causal decoder computes the same for each row; its gradient
                                                           is the sum over rows

The common beginning is a system prompt, say; it ends before the first image. Linears, norms and rotary positions work
position by position and need not know. For attention, queries, keys and values are spread to [B, H, L', D], the
decoder's own attention (eager, sdpa, or `training.attention`) computes as ever, and its result is picked up again. Loss
and gradients are those of the plain forward, up to the order of sums.

First a decoder's packed result is compared with its plain one, so whatever mixes positions by other means than
transformers' attention interface, draws at random or sees ahead stays as it is; and a call with anything that is not
known here passes unchanged.

Shapes: B rows of L positions, L' of the longest row's need, T packed positions, C width, H heads, D head width.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from hydra_vlm.data.batches import WORTH_PACKING, common_beginning, needed_positions
from hydra_vlm.data.templates import IGNORED
from hydra_vlm.models.structure import ModelParts, image_token
from hydra_vlm.training.attention import EAGER, NAME
from hydra_vlm.training.supervised import SupervisedPositions

SPREADABLE = (EAGER, NAME, "sdpa")
"""Attention that reads [B, H, L, D]; flash attention leaves padding out by itself."""

EVEN = 1.05
"""Rows are all packed up to the longest one's need where that is no more than so many times their own lengths."""

CLOSE = 1e-4
CLOSE_IN_HALF = 3e-2
"""How far packed and plain results of a decoder may be apart, relative to their norm; the second below float32."""


@dataclass(frozen=True)
class Places:
    """Where attention finds rows that are packed at their own lengths.

    Attributes:
        own: the packed positions' numbers [T] in [B L'].
        spread: for each of [B L'] the packed position to read: its own, the first row's, or any where nobody looks.
        back: for each of [B L'] its own packed position, T where it has none.
    """

    own: Tensor
    spread: Tensor
    back: Tensor


@dataclass(frozen=True)
class Packing:
    """Which positions of a batch are packed: the common beginning, then each row's others.

    Attributes:
        picked: numbers [T] in the batch as [B L], ascending.
        shape: (B, L).
        needed: L'.
        common: positions of the common beginning.
        places: None where all rows are packed up to L', which is moved about faster than rows of their own lengths.
    """

    picked: Tensor
    shape: tuple[int, int]
    needed: int
    common: int
    places: Places | None

    @classmethod
    def plan(cls, batch: Mapping[str, Any], supervised: Tensor, image_token: int | None) -> "Packing | None":
        """Of a batch with `input_ids` [B, L], and whether [B, L] a position has a label behind it (some have).

        None where next to nothing would be spared, or rows are padded on the left. Where `image_token` is None it is
        not known where images begin, and nothing counts as common.
        """
        ids, mask = batch.get("input_ids"), batch.get("attention_mask")
        if ids is None or ids.shape != supervised.shape or not _pads_right(mask):
            return None
        rows, length = ids.shape
        place = torch.arange(length, device=ids.device)
        needs = needed_positions(supervised)
        needed = int(needs.amax())
        common = min(common_beginning(ids, supervised, image_token), needed)
        ragged = common + int((needs - common).clamp(min=0).sum())
        even = common + rows * (needed - common)
        is_even = even <= EVEN * ragged
        if (even if is_even else ragged) > WORTH_PACKING * ids.numel():
            return None
        inside = place < (needed if is_even else needs[:, None])
        inside = inside.expand(rows, length).clone()
        inside[0, :common], inside[1:, :common] = True, False
        picked = inside.flatten().nonzero().squeeze(1)
        places = None if is_even else _places(picked, (rows, length), needed, common)
        return cls(picked, (rows, length), needed, common, places)

    def pack(self, values: Tensor) -> Tensor:
        """[..., B, L] -> [..., 1, T]."""
        return values.flatten(-2).index_select(-1, self.picked).unsqueeze(-2)

    def unpack(self, hidden: Tensor) -> Tensor:
        """[1, T, C] -> [B, L, C]; where nothing was computed there may be anything, behind L' zeros."""
        spread: Tensor = Spread.apply(hidden[:, None], self)
        return nn.functional.pad(spread[:, 0], (0, 0, 0, self.shape[1] - self.needed))


def _pads_right(mask: Tensor | None) -> bool:
    return mask is None or (mask.dim() == 2 and bool((mask[:, 1:] <= mask[:, :-1]).all()))


def _places(picked: Tensor, shape: tuple[int, int], needed: int, common: int) -> Places:
    rows, length = shape
    count, numbers = len(picked), torch.arange(len(picked), device=picked.device)
    own = picked // length * needed + picked % length
    back = torch.full((rows * needed,), count, device=picked.device)
    back[own] = numbers
    spread = back.where(back < count, 0).view(rows, needed)
    spread[:, :common] = numbers[:common]
    return Places(own, spread.flatten(), back)


class Spread(torch.autograd.Function):
    """Packed [1, H, T, D] -> [B, H, L', D]; gradients at the common beginning are summed over the rows."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: Packing) -> Tensor:
        ctx.packing, ctx.by_position = packing, packed.transpose(1, 2).is_contiguous()
        rows, common = packing.shape[0], packing.common
        if packing.places is not None:
            return packed[0].index_select(1, packing.places.spread).unflatten(1, (rows, -1)).transpose(0, 1)
        others = packed[0, :, common:].unflatten(1, (rows, -1)).transpose(0, 1)
        return torch.cat((packed[:, :, :common].expand(rows, -1, -1, -1), others), dim=2)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        packing, gradient, common = ctx.packing, gradients[0], ctx.packing.common
        if packing.places is not None:
            by_head = gradient.transpose(0, 1).flatten(1, 2)
            found = by_head.index_select(1, packing.places.own)[None]
        else:
            count, (rows, heads, _, width) = len(packing.picked), gradient.shape
            # As the packed values lie: by position behind a linear, by head behind rotary positions.
            room = (1, count, heads, width) if ctx.by_position else (1, heads, count, width)
            found = gradient.new_empty(room)
            found = found.transpose(1, 2) if ctx.by_position else found
            found[0, :, common:].unflatten(1, (rows, -1)).copy_(gradient[:, :, common:].transpose(0, 1))
        if common:
            found[0, :, :common] = gradient[:, :, :common].sum(dim=0)
        return found, None


class Pick(torch.autograd.Function):
    """[B, L', H, D] -> packed [1, T, H, D]."""

    @staticmethod
    def forward(ctx: Any, spread: Tensor, packing: Packing) -> Tensor:
        ctx.packing, common = packing, packing.common
        if packing.places is not None:
            return spread.flatten(0, 1).index_select(0, packing.places.own)[None]
        return torch.cat((spread[0, :common], spread[:, common:].flatten(0, 1)))[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        packing, gradient, common = ctx.packing, gradients[0][0], ctx.packing.common
        if packing.places is not None:
            with_blank = torch.cat((gradient, gradient.new_zeros((1, *gradient.shape[1:]))))
            found = with_blank.index_select(0, packing.places.back).unflatten(0, (packing.shape[0], -1))
        else:
            found = gradient.new_empty((packing.shape[0], packing.needed, *gradient.shape[1:]))
            found[:, common:] = gradient[common:].unflatten(0, (packing.shape[0], -1))
            found[1:, :common], found[0, :common] = 0, gradient[:common]
        return found, None


@contextmanager
def packed_rows(model: Any, parts: ModelParts, positions: SupervisedPositions) -> Iterator[None]:
    """While the block lasts, the (unwrapped) model's decoder computes the batches that `positions` read packed."""
    decoder = model.get_submodule(parts.layers.rpartition(".")[0])
    config = getattr(decoder, "config", None)
    inner = getattr(config, "_attn_implementation", None)
    if config is None or inner not in SPREADABLE:
        yield
        return
    name = f"hydra_packed_{inner}"
    AttentionInterface.register(name, partial(packed_attention, inner))
    AttentionMaskInterface.register(name, partial(packed_mask, inner))
    with ExitStack() as undo:
        enter = decoder.register_forward_pre_hook(partial(_enter, positions), with_kwargs=True)
        leave = decoder.register_forward_hook(_leave, always_call=True)  # after an error, too
        undo.callback(enter.remove)
        undo.callback(leave.remove)
        undo.callback(setattr, config, "_attn_implementation_internal", inner)
        undo.callback(setattr, positions, "plan", None)
        config._attn_implementation_internal = name
        positions.plan = partial(Packing.plan, image_token=image_token(model.config, parts))
        if not _is_alike(decoder, positions):
            positions.plan = None
        yield


def packed_attention(
    inner: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of name `inner` on packed queries, keys and values [1, H, T, D] -> [1, T, H, D]."""
    eager = inner == EAGER
    attend: Callable[..., tuple[Tensor, Tensor | None]] = (
        sys.modules[type(module).__module__].eager_attention_forward if eager else AttentionInterface()[inner]
    )
    if packing is None:
        return attend(module, query, key, value, attention_mask, **more)
    spread = (Spread.apply(values, packing) for values in (query, key, value))
    result, _ = attend(module, *spread, attention_mask, **more)
    return Pick.apply(result, packing), None


_RUNNING: list[Packing] = []
"""The packing of the decoder's call that is under way; masks are made within it, and are told of nothing else."""


def packed_mask(inner: str, **asked: Any) -> Tensor | None:
    """The mask of attention `inner` for L' positions: of all rows the same, for what pads them comes behind."""
    if _RUNNING:
        needed = _RUNNING[-1].needed
        asked |= {"batch_size": 1, "q_length": needed, "kv_length": needed, "attention_mask": None}
    mask: Tensor | None = AttentionMaskInterface()[inner](**asked)
    return mask


def _enter(positions: SupervisedPositions, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Before the decoder runs: its arguments packed, where a packing was planned for a call like this one."""
    packing = positions.planned
    if not isinstance(packing, Packing) or given or not _is_known(named, packing):
        return None
    _RUNNING.append(packing)
    return (), _packed_arguments(named, packing)


def _leave(_: nn.Module, __: Any, output: Any) -> Any:
    """After the decoder ran: its result [1, T, C] as [B, L, C], so that nobody behind it need know."""
    packing = _RUNNING.pop() if _RUNNING else None
    if packing is None or output is None:
        return None
    if isinstance(output, tuple):
        return (packing.unpack(output[0]), *output[1:])
    output.last_hidden_state = packing.unpack(output.last_hidden_state)
    return output


TOKENS = ("input_ids", "inputs_embeds")
BY_PLACE = ("attention_mask", "position_ids", "visual_pos_masks")
AT_IMAGES = "deepstack_visual_embeds"
"""Of a call for rows [B, L]: tokens; what has a value for each, some [B, L], some [3, B, L]; and, for Qwen3-VL, what
deeper layers add to the images' positions, those of all rows behind one another."""


def _packed_arguments(named: Mapping[str, Any], packing: Packing) -> dict[str, Any]:
    packed = dict(named)
    for name in TOKENS:
        if (values := named.get(name)) is not None:
            packed[name] = values.flatten(0, 1).index_select(0, packing.picked)[None]
    for name in BY_PLACE:
        if (values := named.get(name)) is not None:
            packed[name] = packing.pack(values.expand(*values.shape[:-2], *packing.shape))
    if named.get("position_ids") is None:
        packed["position_ids"] = (packing.picked % packing.shape[1])[None]
    # Given no mask, transformers takes positions that start again for sequences of their own, and masks them.
    packed["attention_mask"] = torch.ones_like(packing.picked)[None]
    return packed | {"packing": packing}


def _is_known(named: Mapping[str, Any], packing: Packing) -> bool:
    """Whether a call consists of the batch as planned and of nothing else that has its shape."""
    told = {name: value for name, value in named.items() if value is not None}
    tokens = [told.pop(name) for name in TOKENS if name in told]
    by_place = {name: told.pop(name) for name in BY_PLACE if name in told}
    told.pop(AT_IMAGES, None)
    return (
        len(tokens) == 1
        and tuple(tokens[0].shape[:2]) == packing.shape
        and all(_fits(value, packing) for value in by_place.values())
        and ("attention_mask" not in by_place or by_place["attention_mask"].dim() == 2)
        and _begins_alike(by_place.get("position_ids"), packing)
        and _keeps_all(by_place.get("visual_pos_masks"), packing)
        and not any(told.get(f"output_{what}") for what in ("hidden_states", "attentions", "router_logits"))
        and all(_is_single(value) for value in told.values())
    )


def _fits(value: Any, packing: Packing) -> bool:
    """[..., B, L], or [..., 1, L]."""
    rows, length = packing.shape
    return torch.is_tensor(value) and value.dim() > 1 and value.shape[-1] == length and value.shape[-2] in (1, rows)


def _begins_alike(place: Tensor | None, packing: Packing) -> bool:
    common = packing.common
    return place is None or bool((place[..., :common] == place[..., :1, :common]).all())


def _keeps_all(chosen: Tensor | None, packing: Packing) -> bool:
    return chosen is None or int(packing.pack(chosen).sum()) == int(chosen.sum())


def _is_single(value: Any) -> bool:
    return value.dim() == 0 if torch.is_tensor(value) else isinstance(value, bool | int | float | str)


@torch.no_grad()
def _is_alike(decoder: Any, positions: SupervisedPositions) -> bool:
    """Whether the decoder, as it is when it is trained, says the same of two short drawn rows packed and plain."""
    table = decoder.get_input_embeddings().weight
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in decoder.modules())
    if drops or getattr(decoder.config, "output_router_logits", False) or not table.is_floating_point():
        return False
    ids = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 6, 7, 4, 8]], device=table.device)
    drawn = torch.linspace(-1, 1, 9 * table.shape[1], device=table.device).mul(1e3).sin().view(9, -1)
    call = {"inputs_embeds": drawn.to(table.dtype)[ids], "attention_mask": torch.ones_like(ids), "use_cache": False}
    labels = torch.full_like(ids, IGNORED)
    labels[0, 3] = labels[0, 5] = labels[1, 4] = 0
    modes = [(module, module.training) for module in decoder.modules()]
    decoder.train()
    results = []
    try:
        for batch in ({"labels": labels}, {"labels": labels, "input_ids": ids}):  # without its tokens none is packed
            positions.read(batch)
            hidden = decoder(**call).last_hidden_state
            results.append(positions.gather(hidden)[0])
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a decoder that is called in another way
        return False
    finally:
        positions.read({})
        for module, mode in modes:
            module.training = mode
    plain, packed = results
    close = CLOSE if table.dtype == torch.float32 else CLOSE_IN_HALF
    return bool((packed - plain).norm() <= close * plain.norm())

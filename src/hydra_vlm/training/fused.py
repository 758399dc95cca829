"""Parts of a decoder layer as one operation each, with gradients written out: LoRA, RMS norm, rotary positions.

Same values as the modules they stand in for, up to the order of sums; fewer passes over memory and fewer calls, which
is what a small decoder's step consists of. Before a module is replaced, its own result is compared with ours, so a
family that computes something else keeps its own. Float32 alone: under autocast and in other precisions the modules'
own forward runs.

Shapes: T positions (of all rows), C and O features in and out, R rank, B rows, H heads, L tokens, D head width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.training.attention import product_attention_in
from hydra_vlm.verification import ADAPTER

CLOSE = 1e-5


@contextmanager
def fused_layers(model: nn.Module, parts: ModelParts) -> Iterator[None]:
    """While the block lasts, the (unwrapped) model's decoder computes with the operations of this file."""
    decoder = model.get_submodule(parts.decoder)
    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, LoraLinear) and _is_plain_lora(module):
                _replace(module, lora_forward(module), undo)
        for module in decoder.modules():
            if type(module).__name__.endswith("RMSNorm"):
                forward = rms_forward(module)
                if forward is not None and _alike(module, forward):
                    _replace(module, forward, undo)
        for source in {type(module).__module__ for module in decoder.modules()}:
            _replace_rotary(sys.modules[source], undo)
        undo.enter_context(product_attention_in(decoder))
        yield


def _replace(module: nn.Module, forward: Callable[..., Tensor], undo: ExitStack) -> None:
    if "forward" in vars(module):  # somebody else's: accelerate's or a kernel's
        return
    module.forward = forward
    undo.callback(delattr, module, "forward")


def _computes_in_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type)


class LoraProduct(torch.autograd.Function):
    """x W' + b + s (x A') B', where W [O, C] and b [O] are frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        out = nn.functional.linear(flat, weight, bias).addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        flat, inner, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].reshape(-1, weight.shape[0])
        through = (gradient @ b).mul_(ctx.scale)
        x = (gradient @ weight).addmm_(through, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return x, None, None, through.t() @ flat, (inner.t() @ gradient).t() * ctx.scale, None


def lora_forward(layer: LoraLinear) -> Callable[..., Tensor]:
    """The forward of a PEFT layer in one operation; its own where the adapter is off or merged."""
    plain = type(layer).forward.__get__(layer)
    base, a, b = layer.get_base_layer(), layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or layer.merged or layer.disable_adapters or not _computes_in_float32(x):
            return plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        return LoraProduct.apply(x, base.weight, base.bias, a.weight, b.weight, layer.scaling[ADAPTER])

    return forward


def _is_plain_lora(layer: LoraLinear) -> bool:
    """Whether a layer is W x + s B A x and nothing more: no dropout, no variant of LoRA, float32, frozen W."""
    base = layer.get_base_layer()
    return (
        type(layer) is LoraLinear
        and type(base) is nn.Linear
        and layer.active_adapters == [ADAPTER]
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not any(parameter.requires_grad for parameter in base.parameters())
        and layer.lora_A[ADAPTER].bias is None
        and layer.lora_B[ADAPTER].bias is None
        and {p.dtype for p in layer.parameters()} == {torch.float32}
    )


class RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * w over the last dimension, w [C] frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, inverse = ctx.saved_tensors
        scaled = gradients[0] * weight
        along = (scaled * x).sum(dim=-1, keepdim=True).mul_(inverse.square()).div_(-x.shape[-1])
        return scaled.addcmul_(x, along).mul_(inverse), None, None


def rms_forward(norm: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """The forward of a frozen float32 RMS norm in one operation, or None where the module is not of that kind."""
    weight = getattr(norm, "weight", None)
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or weight.requires_grad or weight.dtype != torch.float32 or weight.dim() != 1:
        return None
    if not isinstance(eps, float):
        return None
    plain = type(norm).forward.__get__(norm)

    def forward(x: Tensor) -> Tensor:
        out: Tensor = RmsNorm.apply(x, norm.weight, eps) if _computes_in_float32(x) else plain(x)
        return out

    return forward


@torch.no_grad()
def _alike(module: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether module and forward say the same of one drawn vector of each of two sizes."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    drawn = torch.linspace(-1, 2, 2 * len(weight), device=weight.device).cos().view(1, 2, -1) * 3
    return torch.allclose(module(drawn), forward(drawn), rtol=CLOSE, atol=CLOSE)


class Rotation(torch.autograd.Function):
    """x cos + rotate_half(x) sin: the first half of each head's features turned against the second."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, -1, torch.empty(x.shape, dtype=x.dtype, device=x.device))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        cos, sin = ctx.saved_tensors
        gradient, half = gradients[0], sin.shape[-1] // 2
        # Features of all heads lie side by side behind this, in the linear's output.
        out = torch.empty_like(gradient.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        return _turned(gradient, cos, torch.cat((sin[..., half:], sin[..., :half]), -1), 1, out), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=-sign)
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """Queries and keys [B, H, L, D] turned by their positions; `cos` and `sin` [B, L, D]."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return Rotation.apply(q, cos, sin), Rotation.apply(k, cos, sin)


ROTARY = "apply_rotary_pos_emb"  # what transformers' decoders call it, each in its own file


def _replace_rotary(source: Any, undo: ExitStack) -> None:
    """Replace the rotary function that a decoder's file has, where it computes what ours does."""
    plain = getattr(source, ROTARY, None)
    if plain is None:
        return
    q, k = (torch.linspace(i, i + 2, 24).cos().view(1, 1, 3, 8) for i in range(2))
    cos, sin = (torch.linspace(i, i + 3, 24).sin().view(1, 3, 8) for i in range(2))
    try:
        same = all(
            torch.allclose(x, y, rtol=CLOSE, atol=CLOSE)
            for x, y in zip(plain(q, k, cos, sin), rotate(q, k, cos, sin), strict=True)
        )
    except (TypeError, ValueError, RuntimeError):  # a function of that name with other arguments
        return
    if same:

        def chosen(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            one: tuple[Tensor, Tensor] = (rotate if _computes_in_float32(q) else plain)(q, k, cos, sin, *args, **kwargs)
            return one

        setattr(source, ROTARY, chosen)
        undo.callback(setattr, source, ROTARY, plain)

"""MobileVLM by its formulas: functions of the authors' state dict, row by row, with no module of transformers or ours.

Written from the architecture's description: CLIP's vision transformer (pre-norm, quick GELU, the class token in front),
the two projectors, splicing of image tokens with the authors' mark -200, LLaMA (RMS norm, rotary positions by halves,
SwiGLU), cross entropy of the next token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

IMAGE = -200
State = Mapping[str, Tensor]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def depthwise(grid: Tensor, weight: Tensor, stride: int = 1) -> Tensor:
    """A 3 x 3 depthwise convolution as nine shifted products; grid [B, H, W, C], weight [C, 1, 3, 3]."""
    _, height, width, _ = grid.shape
    padded = functional.pad(grid, (0, 0, 1, 1, 1, 1))
    total = torch.zeros_like(grid)
    for row in range(3):
        for column in range(3):
            total += padded[:, row : row + height, column : column + width] * weight[:, 0, row, column]
    return total[:, ::stride, ::stride]


def layer_norm(x: Tensor, state: State, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: Tensor, state: State, name: str) -> Tensor:
    """A linear layer; kernels of 1 x 1 convolutions [out, in, 1, 1] will do."""
    out = x @ state[f"{name}.weight"].flatten(1).T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def ldpv2(features: Tensor, state: State) -> Tensor:
    """LDPv2: [B, side * side, D] -> [B, side * side / 4, C]."""
    hidden = linear(gelu(linear(features, state, "mlp.mlp.0")), state, "mlp.mlp.2")
    grid = _grid(hidden)
    pooled = (grid[:, ::2, ::2] + grid[:, 1::2, ::2] + grid[:, ::2, 1::2] + grid[:, 1::2, 1::2]) / 4
    return (pooled + depthwise(pooled, state["peg.peg.0.weight"]) + state["peg.peg.0.bias"]).flatten(1, 2)


def ldp(features: Tensor, state: State) -> Tensor:
    """LDP: [B, side * side, D] -> [B, side * side / 4, C]."""
    grid = _grid(linear(gelu(linear(features, state, "model.mlp.1")), state, "model.mlp.3"))
    grid = grid + _inverted_residual(grid, state, "model.mb_block.1.block", stride=1)
    return _inverted_residual(grid, state, "model.mb_block.2.block", stride=2).flatten(1, 2)


def _grid(tokens: Tensor) -> Tensor:
    side = int(tokens.shape[1] ** 0.5)
    return tokens.unflatten(1, (side, side))


def _inverted_residual(grid: Tensor, state: State, block: str, stride: int) -> Tensor:
    x = layer_norm(depthwise(grid, state[f"{block}.0.0.weight"], stride), state, f"{block}.0.1")
    x = x * (x + 3).clamp(0, 6) / 6
    gate = linear(linear(x.mean(dim=(1, 2)), state, f"{block}.1.fc1").clamp(min=0), state, f"{block}.1.fc2")
    x = x * ((gate + 3).clamp(0, 6) / 6)[:, None, None]
    return layer_norm(linear(x, state, f"{block}.2.0"), state, f"{block}.2.1")


def part(state: State, prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def tower(pixels: Tensor, state: State, config: Mapping[str, Any]) -> Tensor:
    """Patch features of the last but one hidden state: [n, 3, H, W] -> [n, N, D]."""
    size, heads = config["patch_size"], config["num_attention_heads"]
    patches = pixels.unfold(2, size, size).unfold(3, size, size)  # [n, 3, rows, columns, size, size]
    x = torch.einsum("nchwij,dcij->nhwd", patches, state["embeddings.patch_embedding.weight"]).flatten(1, 2)
    x = torch.cat([state["embeddings.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = layer_norm(x + state["embeddings.position_embedding.weight"], state, "pre_layrnorm")
    for layer in range(config["num_hidden_layers"] - 1):
        name = f"encoder.layers.{layer}"
        normed = layer_norm(x, state, f"{name}.layer_norm1")
        q, k, v = (_heads(linear(normed, state, f"{name}.self_attn.{p}_proj"), heads) for p in "qkv")
        mixed = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), state, f"{name}.self_attn.out_proj")
        inner = linear(layer_norm(x, state, f"{name}.layer_norm2"), state, f"{name}.mlp.fc1")
        x = x + linear(inner * torch.sigmoid(1.702 * inner), state, f"{name}.mlp.fc2")
    return x[:, 1:]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def decoder(x: Tensor, state: State, config: Mapping[str, Any]) -> Tensor:
    """Logits of one unpadded row of embeddings: [L, C] -> [L, V]."""
    heads, length = config["num_attention_heads"], len(x)
    width = x.shape[1] // heads
    turns = torch.arange(0, width, 2, dtype=x.dtype) / width
    angles = torch.arange(length, dtype=x.dtype)[:, None] * config["rope_theta"] ** -turns
    cos, sin = torch.cat([angles, angles], 1).cos(), torch.cat([angles, angles], 1).sin()
    later = torch.ones(length, length, dtype=torch.bool).triu(1)

    def turned(q: Tensor) -> Tensor:
        first, second = q.chunk(2, -1)
        return q * cos + torch.cat([-second, first], -1) * sin

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * state[f"{name}.weight"]

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        normed = rms(x, f"{name}.input_layernorm")
        q, k, v = (_heads(linear(normed, state, f"{name}.self_attn.{p}_proj")[None], heads)[0] for p in "qkv")
        scores = (turned(q) @ turned(k).mT / width**0.5).masked_fill(later, -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + linear(mixed, state, f"{name}.self_attn.o_proj")
        normed = rms(x, f"{name}.post_attention_layernorm")
        gate = linear(normed, state, f"{name}.mlp.gate_proj")
        up = linear(normed, state, f"{name}.mlp.up_proj")
        x = x + linear(gate * torch.sigmoid(gate) * up, state, f"{name}.mlp.down_proj")
    return linear(rms(x, "model.norm"), state, "lm_head")


def project(pixels: Tensor, state: State, config: Mapping[str, Any], vision: Mapping[str, Any]) -> Tensor:
    """Images as decoder positions: [n, 3, 336, 336] -> [n, 144, C]."""
    features = tower(pixels, part(state, "model.vision_tower.vision_tower.vision_model."), vision)
    projector = ldpv2 if config["mm_projector_type"] == "ldpnetv2" else ldp
    return projector(features, part(state, "model.mm_projector."))


def splice(ids: Sequence[int], labels: Sequence[int], images: list[Tensor], table: Tensor) -> tuple[Tensor, list[int]]:
    """One row: each -200 becomes the next image's vectors, unlabelled; images are taken off the list as used."""
    vectors, targets = [], []
    for token, label in zip(ids, labels, strict=True):
        if token == IMAGE:
            image = images.pop(0)
            vectors += list(image)
            targets += [-100] * len(image)
        else:
            vectors.append(table[token])
            targets.append(label)
    return torch.stack(vectors), targets


def forward(
    state: State,
    config: Mapping[str, Any],
    vision: Mapping[str, Any],
    rows: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]],
    pixels: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """Logits of each row alone, and the mean loss over the labelled next tokens of all rows."""
    images = list(project(pixels, state, config, vision))
    logits, losses = [], []
    for ids, marks in zip(rows, labels, strict=True):
        x, targets = splice(ids, marks, images, state["model.embed_tokens.weight"])
        logits.append(decoder(x, state, config))
        chances = logits[-1].log_softmax(-1)
        losses += [-chances[at, target] for at, target in enumerate(targets[1:]) if target != -100]
    return logits, torch.stack(losses).mean()

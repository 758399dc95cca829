"""The plain numbers of a saved model, read from its configuration: a model without weights on the meta device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from hydra_vlm.errors import ConfigError
from hydra_vlm.graph import DECODER
from hydra_vlm.models.held import without_weights
from hydra_vlm.models.loading import model_class, model_configuration
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.towers import grid_side
from hydra_vlm.models.structure import TOWER, ModelParts, find_parts
from hydra_vlm.planning.flops import stack_forward
from hydra_vlm.planning.shapes import Linear, Projector, Shape, Stack, Tower
from hydra_vlm.schedule import RankSchedule

FLOAT = 4
PACKED = {
    "mobilevlm",
    "llava",
    "llava_onevision",
    "smolvlm",
    "idefics3",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "llama",
}
"""Kinds of models whose rows training packs; of one that is not listed here a plan says what it takes unpacked."""


@dataclass(frozen=True)
class Outline:
    """A model on the meta device: its modules without weights, and its parts."""

    model: Any
    config: PreTrainedConfig
    parts: ModelParts


def outline(folder: Path, decoder_pattern: str | None = None, adapt: Sequence[str] = (DECODER,)) -> Outline:
    """The model of a folder without its weights; nothing but config.json is read.

    Raises:
        ConfigError: as loading it would.
    """
    config = model_configuration(folder)
    model = without_weights(model_class(config), config, folder, dtype=torch.float32, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    return Outline(model, config, find_parts(model, decoder_pattern, adapt))


def shape_of(source: Outline, schedule: RankSchedule | None = None) -> Shape:
    """The numbers of a model with the schedule's adapter (None: without one)."""
    model, parts, text = source.model, source.parts, source.config.get_text_config()
    ranks = dict(zip(parts.names(), schedule.ranks, strict=True)) if schedule is not None else {}
    decoder = _stack(model, text, _modules(model, parts, DECODER), ranks)
    vision = _vision_config(source.config)
    tower_stack = _tower_stack(model, vision, ranks) if parts.tower and vision is not None else None
    tower, projector = _images(source, tower_stack, vision)
    return Shape(
        name=parts.graph.name,
        decoder=decoder,
        vocabulary=text.vocab_size,
        parameters=_counts(model, parts),
        projector=projector,
        tower=tower,
        tower_stack=tower_stack,
        patches=_patches(vision),
        head_is_tied=bool(getattr(source.config, "tie_word_embeddings", False)),
        can_pack=source.config.model_type in PACKED,
    )


def _vision_config(config: PreTrainedConfig) -> Any:
    return getattr(config, "vision_config", None)


def _modules(model: nn.Module, parts: ModelParts, part: str) -> Mapping[tuple[int, str], str]:
    """(layer, component) -> module of one part, whether LoRA may reach it or not."""
    if part in parts.graph.part_layers:
        own = parts.graph.part_layers[part]
        return {(layer - own.start, c): name for (layer, c), name in parts.modules.items() if layer in own}
    try:
        return find_parts(model, None, (part,)).modules
    except ConfigError:  # a convolutional tower has no layers of linears
        return {}


def _stack(model: nn.Module, config: Any, modules: Mapping[tuple[int, str], str], ranks: Mapping[str, int]) -> Stack:
    layers: dict[int, list[Linear]] = {}
    for (layer, component), name in modules.items():
        linear: Any = model.get_submodule(name)
        wide, out = (linear.nx, linear.nf) if hasattr(linear, "nf") else (linear.in_features, linear.out_features)
        layers.setdefault(layer, []).append(Linear(component, int(wide), int(out), ranks.get(name, 0)))
    width = int(config.hidden_size if hasattr(config, "hidden_size") else config.embed_dim)
    heads = int(getattr(config, "num_attention_heads", None) or config.num_heads)
    return Stack(
        layers=tuple(tuple(layers[i]) for i in sorted(layers)),
        width=width,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_width=int(getattr(config, "head_dim", None) or width // heads),
    )


def _tower_stack(model: nn.Module, config: Any, ranks: Mapping[str, int]) -> Stack | None:
    try:
        modules = find_parts(model, None, (TOWER,)).modules
    except ConfigError:
        return None
    return _stack(model, config, modules, ranks)


def _patches(vision: Any) -> int:
    """Positions of one image in a tower of fixed size, with a class token; 0 where it has another form."""
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size is None or patch is None:
        return 0
    first = [value[0] if isinstance(value, list | tuple) else value for value in (size, patch)]
    return int((first[0] // first[1]) ** 2 + 1)


def _counts(model: Any, parts: ModelParts) -> dict[str, int]:
    """Parameters by part, each counted once."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    places = {id(p): "embeddings" for p in table.parameters()}
    if head is not None:
        places = {id(p): "head" for p in head.parameters()} | places  # a tied head is the embeddings
    counts = dict.fromkeys(("tower", "projector", "embeddings", "decoder", "head"), 0)
    for name, parameter in model.named_parameters():
        part = places.get(id(parameter))
        if part is None:
            inside = {"projector": parts.projector, "tower": parts.tower}
            part = next((p for p, path in inside.items() if path and name.startswith(f"{path}.")), "decoder")
        counts[part] += parameter.numel()
    return counts


def _images(source: Outline, stack: Stack | None, vision: Any) -> tuple[Tower, Projector]:
    """What one image costs: traced for a MobileVLM, from the linears' sizes for other models."""
    model, parts = source.model, source.parts
    if parts.projector is None or vision is None:
        return Tower(), Projector()
    projector: nn.Module = model.get_submodule(parts.projector)
    count = sum(p.numel() for p in projector.parameters())
    if isinstance(source.config, MobileVLMConfig):
        side, grid = _image_side(vision), grid_side(vision)
        pixels = torch.empty(1, 3, side, side, device="meta")
        forward, widest = _traced(lambda: model.encode_images(pixels), model.get_submodule(parts.tower))
        features = torch.empty(1, grid * grid, vision.hidden_size, device="meta")
        tower = Tower(forward, max(widest, _attention_bytes(stack, grid * grid + 1)), pixels.numel() * FLOAT,
                      features.numel() * FLOAT)  # fmt: skip
        return tower, _traced_projector(projector, features, count)
    positions = _patches(vision)
    linears: list[Any] = [m for m in projector.modules() if isinstance(m, nn.Linear)]
    each = 2 * positions * sum(m.in_features * m.out_features for m in linears)
    saved = FLOAT * positions * sum(m.in_features + m.out_features for m in linears)
    pixels_bytes = FLOAT * 3 * _image_side(vision) ** 2
    layers = stack_forward(stack, positions) if stack else 0
    widest = _attention_bytes(stack, positions)
    return Tower(layers, widest, pixels_bytes, 0), Projector(count, saved, each, 2 * each)


def _image_side(vision: Any) -> int:
    size = getattr(vision, "image_size", 0) or 0
    return int(size[0] if isinstance(size, list | tuple) else size)


def _attention_bytes(stack: Stack | None, positions: int) -> int:
    """The widest moment of a tower's layer for one image, float32: scores and probabilities, or the feed-forward."""
    if stack is None or not stack.layers:
        return 0
    wide = max(p.outputs for p in stack.layers[-1])
    return FLOAT * max(2 * stack.heads * positions**2, 3 * wide * positions) + 3 * FLOAT * stack.width * positions


def _traced(run: Callable[[], Tensor], module: nn.Module) -> tuple[int, int]:
    """FLOPs of a forward pass on the meta device, and three times its widest module's output in bytes."""
    widest = 0

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        nonlocal widest
        if isinstance(output, Tensor):
            widest = max(widest, output.numel() * FLOAT)

    hooks = [m.register_forward_hook(watch) for m in module.modules()]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops(), 3 * widest


def _traced_projector(projector: nn.Module, features: Tensor, count: int) -> Projector:
    """FLOPs and saved bytes of a projector over one image's features."""
    own = {p.untyped_storage()._cdata for p in projector.parameters()}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
            held.append(tensor)
        return tensor

    held: list[Tensor] = []
    projector.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with FlopCounterMode(display=False) as forward:
            output = projector(features)
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    projector.requires_grad_(False)
    for parameter in projector.parameters():
        parameter.grad = None
    return Projector(count, sum(saved.values()), forward.get_total_flops(), backward.get_total_flops())

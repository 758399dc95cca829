"""Vision towers behind one small protocol: pixels in, a square grid of patch features out.

A tower is a transformers model; what differs between kinds (class token, first layer norm, convolutions) is said here
and nowhere else. Towers are frozen unless somebody opens their parameters.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


class VisionTower(Protocol):
    """One kind of tower; `layer` indexes hidden states: 0 is the embedding, -1 the last block."""

    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    layer: int  # the hidden state that a new model takes its features from

    def features(self, tower: Any, pixel_values: Tensor, layer: int) -> Tensor:
        """Patch features of that hidden state, rows of the grid one after another: [n, 3, H, W] -> [n, N, D].

        Raises:
            ValueError: the tower has no such layer.
        """


class ClipTower:
    """CLIP's vision transformer; the class token is dropped since it holds no place on the grid."""

    image_mean, image_std = CLIP_MEAN, CLIP_STD
    layer = -2  # what LLaVA and MobileVLM take

    def features(self, tower: Any, pixel_values: Tensor, layer: int) -> Tensor:
        blocks = _blocks_up_to(tower.encoder.layers, layer)
        return _run(blocks, tower.pre_layrnorm(tower.embeddings(pixel_values)))[:, 1:]


class SiglipTower:
    """SigLIP's vision transformer: no class token, no layer norm before the blocks."""

    image_mean, image_std = HALF, HALF
    layer = -2

    def features(self, tower: Any, pixel_values: Tensor, layer: int) -> Tensor:
        blocks = _blocks_up_to(tower.encoder.layers, layer)
        return _run(blocks, tower.embeddings(pixel_values))


class ConvTower:
    """A convolutional tower, whose patches are the cells of its last map; it has no other layer to select."""

    # (x - 127) / 128 for pixels of 0-255, the normalisation of the ImageNet weights
    image_mean, image_std = (127 / 255,) * 3, (128 / 255,) * 3
    layer = -1

    def features(self, tower: Any, pixel_values: Tensor, layer: int) -> Tensor:
        if layer != -1:
            raise ValueError(f"vision_feature_layer {layer} does not exist: a convolutional tower has the last, -1.")
        hidden: Tensor = tower(pixel_values).last_hidden_state
        return hidden


TOWERS: dict[str, VisionTower] = {
    "clip_vision_model": ClipTower(),
    "siglip_vision_model": SiglipTower(),
    "efficientnet_lite": ConvTower(),
}


def tower_kind(config: PreTrainedConfig) -> VisionTower:
    """How to read the tower of that configuration.

    Raises:
        ValueError: no tower of that model type is known.
    """
    if config.model_type not in TOWERS:
        raise ValueError(f"vision tower of type {config.model_type!r} is unknown: use one of {', '.join(TOWERS)}.")
    return TOWERS[config.model_type]


PIXELS_AT_ONCE = 2**15
"""Of the images that a core takes through a tower at once: 8 of 64 x 64 pixels, 1 of 224 x 224 (`docs/log.md`)."""


def images_at_once(pixel_values: Tensor) -> int:
    """How many of the images [n, 3, H, W] go through a tower together where nothing is kept for a backward pass.

    On a CPU no more than a core's cache holds the activations of; elsewhere all.
    """
    count, _, height, width = pixel_values.shape
    if pixel_values.device.type != "cpu":
        return max(1, count)
    return max(1, PIXELS_AT_ONCE * torch.get_num_threads() // (height * width))


def grid_side(config: PreTrainedConfig) -> int:
    """Patches along one side of the tower's square grid.

    Raises:
        ValueError: the grid is not square.
    """
    sides = {size // config.patch_size for size in _sides(config.image_size)}
    if len(sides) != 1:
        raise ValueError(f"The tower's images of {config.image_size} pixels do not give a square grid of patches.")
    return sides.pop()


def _sides(size: Any) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else tuple(size)


def _blocks_up_to(blocks: nn.ModuleList, layer: int) -> Iterable[nn.Module]:
    """The blocks before the selected hidden state."""
    count = len(blocks)
    selected = layer if layer >= 0 else count + 1 + layer
    if not 0 <= selected <= count:
        raise ValueError(
            f"vision_feature_layer {layer} does not exist: the tower has {count} blocks, "
            f"so choose from {-count - 1} to {count}."
        )
    return blocks[:selected]


def _run(blocks: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    for block in blocks:
        hidden = block(hidden, None)
    return hidden

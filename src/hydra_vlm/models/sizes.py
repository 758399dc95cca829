"""Sizes that a model's files ask for, checked by arithmetic before anything is built. No torch.

Each bound is some ten times what the largest published models have; it tells a damaged or hostile number from a large
model, not what fits into a machine, which `hydra-vlm plan` says. Whole configurations are walked, so a text or vision
part is checked wherever it stands.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hydra_vlm.errors import ConfigError


class Bound(NamedTuple):
    """Keys (their last parts as a pattern of this file's), and the least and the largest whole number they may have."""

    keys: re.Pattern[str]
    least: int
    largest: int


BOUNDS = (
    Bound(re.compile(r"(num_(hidden_|encoder_|decoder_)?layers|n_layers?|(encoder|decoder)_layers|depths?)"), 1, 512),
    Bound(re.compile(r"(num_(key_value_|attention_)?heads|n_heads?|.*attention_heads)"), 1, 4096),
    Bound(re.compile(r"vocab_size"), 1, 2**22),
    Bound(re.compile(r"image_seq_length|.*image_tokens|query_length"), 0, 2**16),
    Bound(re.compile(r"patch_size|num_channels|in_channels"), 1, 2**12),
    Bound(re.compile(r"image_size|input_size"), 1, 2**14),
    Bound(re.compile(r".*experts(_per_tok)?"), 0, 2**15),
    Bound(
        re.compile(r"max_position_embeddings|n_positions|n_ctx|.*(seq|max|min)_length|sliding_window|.*_ids?"),
        -1,
        2**40,
    ),
    Bound(
        re.compile(r".*(_size|_dim|_dims|_sizes|_width|_channels|_features|_rank|n_embd|n_inner|d_model|d_ff)"),
        -1,
        2**22,
    ),
    Bound(re.compile(r"(num|n)_.*|.*_(tokens|length|latents|queries|tiles|crops)"), -1, 2**20),
)
"""In this order: the first whose keys fit says what holds. -1 stands for "none" in some configurations."""

WHOLE = re.compile(
    r"hidden_size|intermediate_size|num_hidden_layers|num_attention_heads|num_key_value_heads|vocab_size|image_size|"
    r"patch_size|num_channels|head_dim"
)
"""Keys whose numbers are whole ones: 128.0, "128" and true are mistakes."""

PIXELS = 2**26
"""Pixels of the largest image that a processor may make, 8192 x 8192: in float32 it takes 0.8 GB."""

PATCHES = 2**16
"""Patches of one image: attention over more takes 17 GB a head."""

MIXTURE = 2**20
"""Experts of all layers together."""


EVEN_HEADS = ("llama", "mistral", "qwen2", "clip_vision_model")
"""Kinds of models whose heads share their width evenly unless `head_dim` says otherwise."""


def require_possible(config: Mapping[str, Any], where: str | Path) -> None:
    """Check the sizes in a model's config.json, those of its text and vision parts included.

    Raises:
        ConfigError: naming file, key and number, and what it may be.
    """
    for path, section in _sections(config):
        for key, value in section.items():
            _check_number(f"{path}{key}", key, value, where)
        _check_together(path, section, where)


def _sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The configuration and every one in it (JSON as it is read here nests 64 deep at most)."""
    yield path, config
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _sections(value, f"{path}{key}.")


def _check_number(name: str, key: str, value: Any, where: str | Path) -> None:
    for number in value if isinstance(value, list) else [value]:
        if WHOLE.fullmatch(key) and (isinstance(number, bool | float | str)):
            raise ConfigError(f"{where} says {name} = {number!r}: a size is a whole number above 0")
        if isinstance(number, bool) or not isinstance(number, int):
            continue
        bound = next((bound for bound in BOUNDS if bound.keys.fullmatch(key)), None)
        if bound is not None and not bound.least <= number <= bound.largest:
            raise ConfigError(
                f"{where} says {name} = {number}, and no model has that: from {bound.least:,} to {bound.largest:,} is "
                "read. Is the file damaged? Put the model's own in its place"
            )


def _check_together(path: str, section: Mapping[str, Any], where: str | Path) -> None:
    """Numbers that are possible one by one and not with one another."""

    def number(*keys: str) -> int | None:
        found = next((section[key] for key in keys if section.get(key) is not None), None)
        return found if isinstance(found, int) else None

    layers, experts = number("num_hidden_layers"), number("num_experts", "num_local_experts", "n_routed_experts")
    if layers and experts and layers * experts > MIXTURE:
        raise ConfigError(
            f"{where} says {path}num_hidden_layers = {layers} with {experts} experts each: more than {MIXTURE:,} in "
            "all are not built"
        )
    heads, groups, width = number("num_attention_heads"), number("num_key_value_heads"), number("hidden_size")
    if heads and groups and heads % groups:
        raise ConfigError(
            f"{where} says {path}num_attention_heads = {heads} and {path}num_key_value_heads = {groups}: the first "
            "must be a multiple of the second"
        )
    if heads and width and width % heads and section.get("model_type") in EVEN_HEADS and not section.get("head_dim"):
        raise ConfigError(
            f"{where} says {path}hidden_size = {width} and {path}num_attention_heads = {heads}: without a head_dim the "
            "first must be a multiple of the second"
        )
    sides, patches = (_pair(section.get(key)) for key in ("image_size", "patch_size"))
    if sides and patches and all(patches):
        count = math.prod(side // patch for side, patch in zip(sides, patches, strict=True))
        if not 1 <= count <= PATCHES:
            raise ConfigError(
                f"{where} says {path}image_size = {section['image_size']} and {path}patch_size = "
                f"{section['patch_size']}: that makes {count:,} patches of an image, and 1 to {PATCHES:,} are read"
            )


def _pair(value: Any) -> tuple[int, int] | None:
    pair = value if isinstance(value, list) and len(value) == 2 else (value, value)
    return (pair[0], pair[1]) if all(isinstance(side, int) for side in pair) else None


def require_images_possible(settings: Mapping[str, Any], where: str | Path) -> None:
    """Check the sizes to which a processor's settings bring images, in its file or in a section of it.

    Raises:
        ConfigError: naming file, key and number.
    """
    for path, section in _sections(settings):
        in_pixels = "merge_size" in section or "min_pixels" in section  # Qwen's `size` counts pixels, not edges
        for key in ("size", "crop_size", "pad_size", "max_image_size", "max_pixels", "min_pixels"):
            pixels = _pixels(key, section.get(key), in_pixels)
            if pixels is not None and not 1 <= pixels <= PIXELS:
                raise ConfigError(
                    f"{where} says {path}{key} = {section[key]}: that makes images of {pixels:,} pixels, and 1 to "
                    f"{PIXELS:,} are made. Is the file damaged? Put the model's own in its place"
                )
        for pair in section.get("image_grid_pinpoints") or []:
            if isinstance(pair, list) and all(isinstance(side, int) for side in pair) and math.prod(pair) > PIXELS:
                raise ConfigError(f"{where} says {path}image_grid_pinpoints with {pair}: more than {PIXELS:,} pixels")
        for key, value in section.items():
            _check_number(f"{path}{key}", key, value, where)


def _pixels(key: str, value: Any, in_pixels: bool) -> int | None:
    """What an image of this size has; None where it is not said."""
    if isinstance(value, Mapping):
        edges = [side for side in value.values() if isinstance(side, int) and not isinstance(side, bool)]
        if not edges:
            return None
        if min(edges) < 1:
            return min(edges)
        if {"height", "width"} <= value.keys():
            return math.prod(edges)
        return max(edges) if in_pixels else max(edges) ** 2
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if key.endswith("pixels") or value < 1 else value**2

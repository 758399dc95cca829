"""Features of a frozen vision tower, computed once per image and kept: in memory, on disk, or both.

A frozen tower gives the same features at every step, epoch and trial, so a data set that fits is encoded once.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hydra_vlm.data.digests import contents_of
from hydra_vlm.data.feature_store import FeatureStore, Place, fingerprint
from hydra_vlm.data.image_files import decode
from hydra_vlm.errors import DataError

Features = Mapping[tuple[str, str], Tensor]
"""Tower features by image path and squaring (see `feature_key`)."""

BATCH, CPU_BATCH = 64, 8
"""Images that go through the tower at once; more of them overflow a CPU's caches."""

BLOCK = 512
"""Images that are written to disk together; a stopped run encodes at most so many again."""


def load_image(path: str) -> Image.Image:
    """Open and fully decode an image as RGB.

    Raises:
        DataError: naming the file and the reason.
    """
    return decode(path)


def feature_bytes(model: Any, images: int) -> int:
    """What the features of that many images take in memory, in bytes; 0 where there is no image."""
    if not images:
        return 0
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    return images * patches * vision.hidden_size * next(model.parameters()).element_size()


def encode_once(
    model: Any, processor: Any, paths: Iterable[str], batch: int | None = None, progress: Any = iter
) -> dict[tuple[str, str], Tensor]:
    """Tower features by image and squaring, each [patches, width] on the CPU in the model's dtype.

    `progress` wraps the iterator over batches (tqdm, for instance); `batch` defaults to what suits the device.
    """
    features: dict[tuple[str, str], Tensor] = {}
    for chunk, encoded in encoded_batches(model, processor, sorted(set(paths)), batch, progress):
        features.update(zip((feature_key(path, processor) for path in chunk), encoded, strict=True))
    return features


def encode_into(
    store: FeatureStore, model: Any, processor: Any, paths: Iterable[str], progress: Any = iter
) -> dict[tuple[str, str], Place]:
    """Where `store` keeps the features of each image, by image and squaring; what it lacks is encoded and added.

    Equal images are encoded once, whatever their names.

    Raises:
        DataError: the store is too small to hold them all.
    """
    digests = {path: digest for path, (_, digest) in contents_of(sorted(set(paths))).items()}
    mark = fingerprint(model, processor)
    known = store.places(mark)
    store.use({known[digest][0] for digest in digests.values() if digest in known})
    names = {path: digest for digest, path in {d: p for p, d in digests.items() if d not in known}.items()}
    block: list[str] = []
    parts: list[Tensor] = []
    for chunk, encoded in encoded_batches(model, processor, list(names), None, progress):
        block += [names[path] for path in chunk]
        parts.append(encoded)
        if len(block) >= BLOCK or chunk[-1] == next(reversed(names)):
            store.add(mark, block, torch.cat(parts))
            block, parts = [], []
    places = store.places(mark)
    lost = [path for path, digest in digests.items() if digest not in places]
    if lost:
        raise DataError(
            f"{store.folder} holds {store.gigabytes} GB, too little for the features of {len(digests):,} images "
            f"({lost[0]} had to go): raise training.disk_cache_gigabytes, or set it to 0"
        )
    return {feature_key(path, processor): places[digest] for path, digest in digests.items()}


def encoded_batches(
    model: Any, processor: Any, paths: Sequence[str], batch: int | None, progress: Any
) -> Iterator[tuple[list[str], Tensor]]:
    """Batches of images and their features [batch, patches, width] on the CPU."""
    tower = next(model.parameters())
    batch = batch or (CPU_BATCH if tower.device.type == "cpu" else BATCH)
    for chunk in progress([list(paths[i : i + batch]) for i in range(0, len(paths), batch)]):
        pixels = processor.pixels([load_image(path) for path in chunk])
        with torch.no_grad():
            encoded = model.encode_images(pixels.to(tower.device, tower.dtype)).cpu()
        yield chunk, encoded


def feature_key(path: str, processor: Any) -> tuple[str, str]:
    """What an image's features depend on, model and pixels apart: the file, and how it is made square."""
    return path, processor.image_aspect_ratio


def image_inputs(
    paths: Sequence[str], features: Mapping[tuple[str, str], Tensor] | None, processor: Any
) -> dict[str, Tensor]:
    """The model's image argument for these images in order: stored features if all are there, else pixels."""
    if not paths:
        return {}
    keys = [feature_key(path, processor) for path in paths]
    if features is not None and all(key in features for key in keys):
        return {"image_features": torch.stack([features[key] for key in keys])}
    return {"pixel_values": processor.pixels([load_image(path) for path in paths])}

"""Tower features kept on disk, so that each image goes through a frozen tower once in the life of a run.

<folder>/<fingerprint>/<name>.safetensors, a block of images each: `features` [images, patches, width], and in the
metadata the SHA-256 of every image file. The fingerprint is that of all that features depend on beside the image:
tower weights, their settings and dtype, preprocessing. Workers may share a folder: blocks are written under a name of
their own and renamed.
"""

import hashlib
import json
import uuid
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_vlm.data.cache import CacheWarning
from hydra_vlm.files import as_umask_says

Place = tuple[Path, int]
"""A block and a row of it."""

Key = tuple[str, str]
"""What features are asked for by: an image's path, and how it is made square."""


@dataclass(frozen=True)
class FeatureStore:
    """A folder of features that takes at most `gigabytes`; the oldest blocks go first."""

    folder: Path
    gigabytes: float

    def places(self, fingerprint: str) -> dict[str, Place]:
        """Where the features of each image are, by the SHA-256 of its file; a damaged block is named and removed."""
        found: dict[str, Place] = {}
        for block in sorted((self.folder / fingerprint).glob("*.safetensors")):
            try:
                images = _whole_block(block)
            except FileNotFoundError:  # another worker made room
                continue
            except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
                reason = f"{type(problem).__name__}: {problem}"
                warnings.warn(f"{block} is damaged ({reason}): its features are made anew", CacheWarning, stacklevel=2)
                with suppress(OSError):
                    block.unlink()
                continue
            found |= {image: (block, row) for row, image in enumerate(images)}
        return found

    def add(self, fingerprint: str, images: Sequence[str], features: Tensor) -> None:
        """Keep a block: [images, patches, width] with the SHA-256 of each image; then make room."""
        folder = self.folder / fingerprint
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{uuid.uuid4().hex}.part"
        told = {"images": json.dumps(list(images)), "sum": _sum(features)}
        save_file({"features": features.contiguous()}, written, metadata=told)
        as_umask_says(written)
        written.replace(written.with_suffix(".safetensors"))
        self._make_room()

    def use(self, blocks: Iterable[Path]) -> None:
        """Say that these blocks are needed now: others go before them."""
        for block in blocks:
            block.touch()

    def _make_room(self) -> None:
        blocks = [(block.stat().st_mtime, block.stat().st_size, block) for block in self.folder.glob("*/*.safetensors")]
        taken = sum(size for _, size, _ in blocks)
        for _, size, block in sorted(blocks):
            if taken <= self.gigabytes * 1e9:
                return
            block.unlink(missing_ok=True)
            taken -= size


def _whole_block(block: Path) -> list[str]:
    """The images of a block whose features are what was written.

    Raises:
        ValueError: they are not.
    """
    with safe_open(block, "pt") as file:
        told, features = file.metadata() or {}, file.get_tensor("features")
    images = json.loads(told["images"])
    if told["sum"] != _sum(features) or len(images) != len(features):
        raise ValueError("another check sum")
    return list(map(str, images))


def _sum(features: Tensor) -> str:
    """CRC-32 of the numbers: a gigabyte a second, and what may have happened to a disk is no forgery."""
    return f"{zlib.crc32(features.contiguous().view(-1).view(torch.uint8).numpy().tobytes()):08x}"


def read_rows(places: Mapping[Key, Place]) -> dict[Key, Tensor]:
    """Features [patches, width] by the same keys, each block opened once."""
    by_block: dict[Path, dict[Key, int]] = {}
    for key, (block, row) in places.items():
        by_block.setdefault(block, {})[key] = row
    found: dict[Key, Tensor] = {}
    for block, rows in by_block.items():
        features = load_file(block)["features"]
        found |= {key: features[row].clone() for key, row in rows.items()}
    return found


@dataclass(frozen=True)
class StoredFeatures(Mapping[Key, Tensor]):
    """Features that stay on disk and are read one at a time, each [patches, width]."""

    places: Mapping[Key, Place]

    def __getitem__(self, key: Key) -> Tensor:
        block, row = self.places[key]
        with safe_open(block, "pt") as file:
            one: Tensor = file.get_slice("features")[row : row + 1]
        return one[0]

    def __iter__(self) -> Iterator[Key]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def fingerprint(model: Any, processor: Any) -> str:
    """SHA-256 of what features depend on beside the image: the tower's weights and settings, dtype, preprocessing."""
    tower = model.model.vision_tower
    settings = {
        "tower": model.config.vision_config.to_dict(),
        "layer": model.config.vision_feature_layer,
        "pixels": processor.image_processor.to_dict(),
        "square": processor.image_aspect_ratio,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, value in sorted(tower.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""`hydra-vlm init`: a model folder composed from a language model, a vision tower and a new projector."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra_vlm.errors import ConfigError
from hydra_vlm.files import require_free, whole_folder
from hydra_vlm.models.compose import Parts, compose, load_decoder, load_tower
from hydra_vlm.models.mobilevlm.projector import PROJECTORS
from hydra_vlm.models.smol import smol_parts
from hydra_vlm.models.weights import write_model

PRESETS: dict[str, Callable[[], Parts]] = {"smol": smol_parts}


@dataclass(frozen=True)
class Composed:
    """What was written: parameters by part, positions that one image takes, bytes of the weights."""

    folder: str
    parameters: dict[str, int]
    image_tokens: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def summary(self) -> str:
        parts = ", ".join(f"{part} {count:,}" for part, count in self.parameters.items())
        return f"{self.folder}: {parts} parameters, {self.image_tokens} tokens an image, {self.bytes / 1e6:,.0f} MB"


def init_model(
    folder: Path,
    llm: Path | None = None,
    vision: Path | None = None,
    projector: str = "ldpnetv2",
    preset: str | None = None,
    seed: int = 42,
) -> Composed:
    """Compose a model from `llm` and `vision`, or from a preset's parts, and save it with its processor.

    Raises:
        ConfigError: parts that do not go together, or both a preset and a part of one's own.
        RunFolderError: the folder holds something.
    """
    if projector not in PROJECTORS:
        raise ConfigError(f"--projector {projector!r} does not exist: choose one of {', '.join(PROJECTORS)}")
    require_free(folder)
    model, processor = compose(_parts(llm, vision, preset), projector, seed)
    with whole_folder(folder) as draft:
        write_model(draft, model, processor)
    return Composed(
        folder=str(folder),
        parameters={
            "decoder": sum(p.numel() for p in {*model.model.language_model.parameters(), *model.lm_head.parameters()}),
            "tower": sum(p.numel() for p in model.model.vision_tower.parameters()),
            "projector": sum(p.numel() for p in model.model.mm_projector.parameters()),
        },
        image_tokens=model.config.image_tokens,
        bytes=sum(path.stat().st_size for path in folder.glob("*.safetensors")),
    )


def _parts(llm: Path | None, vision: Path | None, preset: str | None) -> Parts:
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"--preset {preset!r} does not exist: choose one of {', '.join(PRESETS)}")
        if llm is not None or vision is not None:
            raise ConfigError(f"--preset {preset} brings both parts: leave --llm and --vision out")
        return PRESETS[preset]()
    if llm is None or vision is None:
        raise ConfigError("a model needs a language model and a vision tower: give --llm and --vision, or --preset")
    tower, settings = load_tower(vision)  # the smaller part first: its errors come sooner
    return Parts(*load_decoder(llm), tower, settings)

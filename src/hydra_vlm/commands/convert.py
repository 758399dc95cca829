"""`hydra-vlm convert`: MobileVLM checkpoints in and out of the authors' layout."""

from pathlib import Path

from hydra_vlm.errors import ConfigError
from hydra_vlm.models.mobilevlm.conversion import Conversion, to_hydra, to_original


def convert(
    source: Path,
    target: Path,
    to: str,
    vision: Path | None = None,
    projector: Path | None = None,
    base: Path | None = None,
) -> Conversion:
    """Convert a checkpoint folder; `to` is "hydra" or "original".

    Raises:
        HydraError: unreadable or unfitting weights, contradicting options, a target that holds something.
    """
    if to == "hydra":
        return to_hydra(source, target, vision=vision, projector=projector, base=base)
    for option, value in (("--vision", vision), ("--projector", projector), ("--base", base)):
        if value is not None:
            raise ConfigError(f"{option} is for reading the authors' layout: leave it out with --to original")
    return to_original(source, target)

"""A configuration asks for about as much as its folder's weights hold: compared before memory is taken for it.

transformers makes room for all that a configuration asks for, whether it is stored or not, so a single wrong number can
take a machine's memory before anybody notices that nothing fits.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.faults import as_size, first_line
from hydra_vlm.models.weights import read_header

PER_BYTE = 8
"""Weights in a byte at the very least: models of one bit a weight."""

SPARE = 2**24
"""Weights that need not be stored: a tied head is, tables of positions may not be."""

FEW_LAYERS = 64
"""Layers that are built on the meta device, in seconds, whatever is stored: what is missing is then named."""

BUFFERS = 2**30
"""Bytes of tables that are computed, not stored: masks, positions."""

_NO_MODEL = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_held: set[tuple[str, int, int]] = set()  # configurations that were compared, as their files were then


def require_held(kind: Any, config: Any, folder: Path, files: Sequence[Path]) -> None:
    """Compare what a configuration asks for, on the meta device, with what the files of its weights can hold.

    `kind` is the model's class, or one of transformers' Auto classes.

    Raises:
        CheckpointError: it asks for more than could be there.
    """
    seen = (folder / "config.json").stat()
    key = (str((folder / "config.json").resolve()), seen.st_size, seen.st_mtime_ns)
    if key in _held or not files:
        return
    stored, layers = _tensors(files), _layers(config.to_dict())
    if stored is not None and layers > FEW_LAYERS + 2 * stored:
        raise CheckpointError(
            f"model {folder}: config.json asks for {layers:,} layers, its weights are {stored:,} tensors in all: the "
            "two are not of one model. Put the model's own config.json beside its weights"
        )
    size = sum(path.stat().st_size for path in files)
    model = without_weights(kind, config, folder)
    asked = sum(parameter.numel() for parameter in model.parameters())
    tables = sum(buffer.nbytes for buffer in model.buffers())
    if asked > PER_BYTE * size + SPARE:
        raise CheckpointError(
            f"model {folder}: config.json asks for {asked:,} weights, its files hold {as_size(size)}: the two are not "
            "of one model. Put the model's own config.json beside its weights"
        )
    if tables > BUFFERS + 4 * size:
        raise CheckpointError(
            f"model {folder}: config.json asks for tables of {as_size(tables)} beside weights of {as_size(size)}: it "
            "is damaged. Put the model's own config.json beside its weights"
        )
    _held.add(key)


def without_weights(kind: Any, config: Any, folder: Path, **how: Any) -> Any:
    """The model of a configuration on the meta device; `kind` is its class or an Auto class.

    Raises:
        ConfigError: no model can be built of it.
    """
    try:
        with torch.device("meta"):
            return kind.from_config(config, **how) if hasattr(kind, "from_config") else kind._from_config(config, **how)
    except _NO_MODEL as problem:
        told = f"{type(problem).__name__}: {first_line(problem)}"
        raise ConfigError(
            f"model {folder}: no model can be built of its config.json ({told}). Put the model's own in its place"
        ) from None


def _layers(config: Mapping[str, Any]) -> int:
    """The layers that a configuration and those in it ask for by the usual name."""
    own = config.get("num_hidden_layers")
    inner = [value for value in config.values() if isinstance(value, Mapping)]
    return (own if isinstance(own, int) else 0) + sum(map(_layers, inner))


def _tensors(files: Sequence[Path]) -> int | None:
    """How many tensors the headers of safetensors files list; None for other files, or headers that do not read."""
    count = 0
    for path in files:
        if path.suffix != ".safetensors":
            return None
        try:
            count += len(json.loads(read_header(path)))
        except (ValueError, RecursionError):
            return None
    return count

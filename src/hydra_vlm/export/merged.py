"""`merged`: full weights in the model's own format, the adapter added in and the projector in place."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hydra_vlm.errors import ConfigError
from hydra_vlm.export.comparison import EXACT, MERGED, adapted_logits, compare, logits, make_probe
from hydra_vlm.export.outcome import Outcome
from hydra_vlm.export.source import Source
from hydra_vlm.lora import load_adapter, merge
from hydra_vlm.models.loading import resolve_model
from hydra_vlm.models.quantization import NONE, require_bitsandbytes
from hydra_vlm.models.weights import write_model

COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Endings of the files of tokenizers and processors."""


def export_merged(source: Source, draft: Path) -> Outcome:
    """Merge in float32, store in the model's own dtype with its processor, then load the folder as a model.

    Rounding to a half-precision dtype moves the logits, within `MERGED`; storing and loading may add nothing to that.

    Raises AdapterError when the folder does not give what the adapter gives.
    """
    dtype = stored_dtype(source)
    _, before, probe = adapted_logits(source)
    loaded = source.base()
    peft_model = load_adapter(loaded.model, source.folder, loaded.parts, other_base=source.other_base)
    compare(before, logits(peft_model, probe), MERGED[torch.float32], probe)
    merged: Any = merge(peft_model, probe.inputs, MERGED[torch.float32])
    cast_parameters(merged, dtype)
    write_model(draft, merged, loaded.processor)
    copy_companions(resolve_model(source.model), draft)
    cast_parameters(merged, torch.float32)
    rounded = logits(merged, probe)
    del loaded, peft_model, merged
    again = replace(source, model=str(draft), quantization=NONE).base()
    after = logits(again.model, make_probe(again))
    compare(rounded, after, EXACT, probe)
    seen = compare(before, after, MERGED[dtype], probe)
    return Outcome(f"loaded again as a model with its processor; {_name(dtype)} weights", seen, merged_notes(source))


def merged_notes(source: Source) -> tuple[str, ...]:
    """What has to be said of weights that were four-bit ones."""
    if source.quantization == NONE:
        return ()
    return (f"the adapter is merged into the {source.quantization} values of the base on which it was trained",)


def require_quantized_base(source: Source) -> None:
    """Raises ConfigError where the base cannot be had as the adapter was trained on it: in four bits."""
    if source.quantization != NONE:
        require_bitsandbytes(f"merging an adapter that was trained with quantization={source.quantization}")


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters alone: what a model computes for itself, such as rotary frequencies, keeps its precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def copy_companions(folder: Path, draft: Path) -> None:
    """What else lies beside a model's weights and saving does not write, such as SentencePiece's tokenizer.model."""
    for path in sorted(folder.iterdir()):
        wanted = path.suffix in COMPANIONS and not path.name.endswith(".index.json")
        if path.is_file() and wanted and not (draft / path.name).exists():
            shutil.copyfile(path, draft / path.name)


def stored_dtype(source: Source) -> torch.dtype:
    """The dtype in which the model's weights are stored, by its configuration; float32 where it names none."""
    config = source.model_config()
    halves = (config, config.get("text_config") or {})
    name = str(next((half[key] for half in halves for key in ("dtype", "torch_dtype") if half.get(key)), "float32"))
    dtype = {_name(dtype): dtype for dtype in MERGED}.get(name)
    if dtype is None:
        raise ConfigError(
            f"model {source.model!r} is stored as {name}: merged weights need one of {', '.join(map(_name, MERGED))}."
        )
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""`original`: a LoRA folder in the layout of MobileVLM's authors, for their merge script and loader.

    config.json               the authors' keys
    adapter_config.json       PEFT, as 0.4.0 wrote it (the version that the authors pin)
    adapter_model.bin         LoRA matrices; the decoder lies directly under `model.`
    non_lora_trainables.bin   the projector, under `base_model.model.model.mm_projector.`; always, since they load it

PEFT 0.4.0 knows neither rank_pattern, alpha_pattern nor use_rslora and drops keys that it does not know, so a schedule
of several ranks could not be loaded from them. Such an adapter is written with one rank, its largest: scales folded
into B, ranks padded with zeros, lora_alpha = r, which every version of PEFT reads alike.
"""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hydra_vlm.errors import AdapterError, ConfigError
from hydra_vlm.export.comparison import Comparison, Probe, adapted_logits, quantization_notes
from hydra_vlm.export.outcome import Outcome
from hydra_vlm.export.plain_peft import check_peft_folder
from hydra_vlm.export.source import Source
from hydra_vlm.export.uniform import uniform_config, uniform_tensors
from hydra_vlm.files import write_json
from hydra_vlm.lora import CONFIG, PROJECTOR, WEIGHTS, WRAPPED
from hydra_vlm.models.loading import resolve_model
from hydra_vlm.models.mobilevlm.configuration import MobileVLMConfig
from hydra_vlm.models.mobilevlm.original_layout import CLIP_LARGE_336, is_clip_large, their_config, their_name
from hydra_vlm.models.mobilevlm.original_layout import PROJECTOR as PROJECTOR_PREFIX
from hydra_vlm.models.mobilevlm.original_lora import TRAINED_WHOLE, read_lora
from hydra_vlm.models.weights import write_tensors
from hydra_vlm.reading import read_json

BIN_WEIGHTS = "adapter_model.bin"


def export_original(source: Source, draft: Path) -> Outcome:
    """Write the authors' LoRA folder, then read it back as `hydra-vlm convert` does and load that with PEFT alone.

    Raises AdapterError when PEFT does not give what the adapter gives.
    """
    theirs = original_config(source)
    loaded, before, probe = adapted_logits(source)
    parts, scales = loaded.parts, source.scales(loaded.parts)
    names = {name: their_name(name) for name in scales}
    projector = loaded.model.get_submodule(str(parts.projector)).state_dict()
    del loaded
    write_json(draft / "config.json", theirs)
    tensors, config, form = one_rank(source, scales)
    renamed = {_lora_key(names[name], matrix): tensors[_lora_key(name, matrix)] for name in scales for matrix in "AB"}
    torch.save(renamed, draft / BIN_WEIGHTS)
    write_json(draft / CONFIG, original_adapter_config(source, config, names))
    state = {f"{WRAPPED}{their_name(PROJECTOR_PREFIX + key)}": value.cpu() for key, value in projector.items()}
    torch.save(state, draft / TRAINED_WHOLE)
    seen = _check(source, draft, before, probe)
    base = f"its base in the same layout: hydra-vlm convert {source.model} BASE --to original"
    notes = (base, *quantization_notes(source))
    return Outcome(f"read back by the authors' names and loaded in PEFT; {form}", seen, notes)


def original_config(source: Source) -> dict[str, Any]:
    """The model's config.json by the authors' keys; no weights are read.

    Raises ConfigError for a model that is no MobileVLM or has parts for which their layout has no place, AdapterError
    for a schedule that reaches beyond the decoder.
    """
    kind = source.model_config().get("model_type")
    if kind != MobileVLMConfig.model_type:
        raise ConfigError(
            f"the original format is the layout of MobileVLM's authors, model {source.model!r} is a {kind}: "
            "export it as peft, uniform or merged."
        )
    beyond = source.beyond_decoder()
    if beyond:
        raise AdapterError(
            f"the authors' scripts adapt the decoder only, schedule {source.schedule.name!r} has ranks in the "
            f"{beyond[0]}: export it merged."
        )
    config = MobileVLMConfig.from_pretrained(resolve_model(source.model))
    return their_config(config, CLIP_LARGE_336 if is_clip_large(config) else "vision_tower")


def one_rank(
    source: Source, scales: Mapping[str, tuple[int, float]]
) -> tuple[dict[str, Tensor], dict[str, object], str]:
    """The adapter's tensors under one rank and one alpha, the keys that say so, and in words what was done.

    Nothing is changed where the schedule has one rank and alpha / r is its scale.
    """
    tensors = load_file(source.folder / WEIGHTS)
    ranks, scaling = {rank for rank, _ in scales.values()}, source.schedule.scaling
    top = max(ranks)
    config = uniform_config(scales, top)
    if len(ranks) == 1 and scaling.rule != "rslora":
        return tensors, config | {"lora_alpha": scaling.alpha(top)}, f"rank {top}, tensors as they are"
    return uniform_tensors(tensors, scales, top), config, f"scales folded into B, ranks padded to {top}"


def original_adapter_config(
    source: Source, config: Mapping[str, object], names: Mapping[str, str]
) -> dict[str, object]:
    """adapter_config.json with the keys that PEFT 0.4.0 wrote, by the authors' names."""
    return {
        "auto_mapping": None,
        "base_model_name_or_path": source.adapter_config().get("base_model_name_or_path"),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": source.dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": config["r"],
        "revision": None,
        "target_modules": list(names.values()),
        "task_type": "CAUSAL_LM",
    }


def _check(source: Source, folder: Path, before: Tensor, probe: Probe) -> Comparison:
    """Read the folder by the authors' names, write what was read by ours, and load that with PEFT alone."""
    config, read = read_json(folder / CONFIG), read_lora(folder)
    updates = {name.removesuffix(".weight"): update for name, update in read.updates.items()}
    with TemporaryDirectory() as scratch:
        again = Path(scratch)
        pairs = {_lora_key(name, "A"): update.a for name, update in updates.items()}
        pairs |= {_lora_key(name, "B"): update.b for name, update in updates.items()}
        write_tensors(again / WEIGHTS, pairs)
        projector = {name.removeprefix(PROJECTOR_PREFIX): value for name, value in read.trained.items()}
        write_tensors(again / PROJECTOR, projector)
        write_json(again / CONFIG, config | {"target_modules": list(updates), "task_type": None})
        wanted = {name: (update.a.shape[0], update.scale) for name, update in updates.items()}
        return check_peft_folder(source, again, wanted, before, probe)


def _lora_key(module: str, matrix: str) -> str:
    return f"{WRAPPED}{module}.lora_{matrix}.weight"

"""`snippet`: the schedule for other trainers, as an axolotl YAML and as the keyword arguments of PEFT's LoraConfig.

No weights are read; the model is built without them, on the meta device, to have its names. axolotl hands
lora_r, lora_alpha, lora_target_modules, lora_rank_pattern, lora_alpha_pattern, lora_dropout, lora_fan_in_fan_out and
peft_use_rslora to LoraConfig as they are (docs/lora.qmd, loaders/adapter.py); it takes whole numbers as alphas.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, PreTrainedModel

from hydra_vlm.export.outcome import Outcome
from hydra_vlm.export.source import Source
from hydra_vlm.files import write_json, write_text
from hydra_vlm.lora import lora_config
from hydra_vlm.models.loading import model_class, resolve_model
from hydra_vlm.reading import read_json
from hydra_vlm.verification import require_modules, strictly

LORA_CONFIG, AXOLOTL = "lora_config.json", "axolotl.yaml"

AXOLOTL_KEYS = {
    "r": "lora_r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "target_modules": "lora_target_modules",
    "rank_pattern": "lora_rank_pattern",
    "alpha_pattern": "lora_alpha_pattern",
    "fan_in_fan_out": "lora_fan_in_fan_out",
    "use_rslora": "peft_use_rslora",
}
"""LoraConfig's keyword -> axolotl's key."""


def export_snippet(source: Source, draft: Path) -> Outcome:
    """Write both forms of the schedule, then build each on the model and compare modules, ranks and scales.

    Raises GraphMismatchError for a schedule of another model, AdapterError when PEFT builds something else.
    """
    model = bare_model(source)
    parts, schedule = source.parts(model), source.schedule
    keywords = lora_keywords(lora_config(schedule, parts, source.dropout))
    write_json(draft / LORA_CONFIG, keywords)
    _check(source, read_json(draft / LORA_CONFIG), LORA_CONFIG)
    checked = f"LoraConfig(**{LORA_CONFIG}) built on the model, {len(source.schedule.graph.projections)} ranks as asked"
    if broken_alphas(keywords):
        stabilised = replace(schedule, scaling=schedule.scaling.stabilised())
        keywords = lora_keywords(lora_config(stabilised, parts, source.dropout))
    broken = broken_alphas(keywords)
    if broken:
        note = f"no {AXOLOTL}: axolotl takes whole numbers as alphas, this schedule needs {broken[0]:g}"
        return Outcome(checked, notes=(note,))
    write_text(draft / AXOLOTL, axolotl_text(source, keywords))
    _check(source, from_axolotl(yaml.safe_load((draft / AXOLOTL).read_text())), AXOLOTL)
    return Outcome(f"{checked}; {AXOLOTL} likewise", notes=(f"add the keys of {AXOLOTL} to your axolotl YAML",))


def lora_keywords(config: LoraConfig) -> dict[str, Any]:
    """The keyword arguments that make an equal LoraConfig, JSON-ready."""
    return {keyword: getattr(config, keyword) for keyword in AXOLOTL_KEYS}


def broken_alphas(keywords: dict[str, Any]) -> list[float]:
    """The alphas that are no whole numbers."""
    return [alpha for alpha in (keywords["lora_alpha"], *keywords["alpha_pattern"].values()) if alpha != int(alpha)]


def axolotl_text(source: Source, keywords: dict[str, Any]) -> str:
    """The keys of an axolotl configuration that this schedule decides."""
    keys = {"adapter": "lora"} | {key: keywords[keyword] for keyword, key in AXOLOTL_KEYS.items()}
    head = f"# Ranks of schedule {source.schedule.name!r} for {source.schedule.graph.name}: {source.schedule.usage()}\n"
    text: str = yaml.safe_dump(keys, sort_keys=False, width=2**20)
    return head + text


def from_axolotl(keys: dict[str, Any]) -> dict[str, Any]:
    """LoraConfig's keyword arguments as axolotl makes them of its keys."""
    return {keyword: keys[key] for keyword, key in AXOLOTL_KEYS.items()}


def bare_model(source: Source) -> PreTrainedModel:
    """The model without weights, on the meta device."""
    config = AutoConfig.from_pretrained(resolve_model(source.model), trust_remote_code=False)
    with torch.device("meta"):
        return model_class(config)(config)


def _check(source: Source, keywords: dict[str, Any], file: str) -> None:
    model = bare_model(source)
    wanted = source.scales(source.parts(model))
    with strictly(file):
        peft_model = get_peft_model(model, LoraConfig(**keywords))
    require_modules(peft_model, wanted, file)

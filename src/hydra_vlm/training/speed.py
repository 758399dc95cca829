"""Everything that makes a step cheaper and changes no result, put on a model for the time of its training."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import is_liger_kernel_available

from hydra_vlm.config import TrainingConfig
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.processes import shards_model
from hydra_vlm.training.fused import fused_layers
from hydra_vlm.training.packed import packed_rows
from hydra_vlm.training.supervised import SupervisedPositions, supervised_only


@contextmanager
def sped_up(model: nn.Module, parts: ModelParts, settings: TrainingConfig) -> Iterator[SupervisedPositions | None]:
    """The model (PEFT's or bare) with what `settings` asks for; the positions are to be told each batch.

    A model that FSDP or DeepSpeed take apart is left as it is: they hook on the modules that would be replaced.
    """
    if shards_model():
        yield None
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with ExitStack() as undo:
        undo.enter_context(without_key_cache(base))
        if settings.fused_layers and not (settings.compile or settings.liger):
            undo.enter_context(fused_layers(base, parts))
        if not settings.supervised_only:
            yield None
            return
        positions = undo.enter_context(supervised_only(base, parts))
        if settings.packed_rows and not settings.compile:
            undo.enter_context(packed_rows(base, parts, positions))
        yield positions


@contextmanager
def without_key_cache(model: Any) -> Iterator[None]:
    """No copies of keys and values, which only generation needs; the Trainer tells the outer configuration alone."""
    text = model.config.get_text_config()
    before = text.use_cache
    text.use_cache = False
    try:
        yield
    finally:
        text.use_cache = before


def engine(settings: TrainingConfig, device: torch.device) -> dict[str, Any]:
    """What the Trainer's own engines are asked: workers that read ahead, torch.compile, Liger kernels.

    Raises:
        ConfigError: Liger kernels without their package, or without a GPU.
    """
    if settings.liger and not (is_liger_kernel_available() and device.type != "cpu"):
        lack = f"they do not run on {device.type}" if device.type == "cpu" else "the package is missing"
        raise ConfigError(f"training.liger=true: {lack}: leave it out, or pip install 'hydra-vlm[liger]' beside a GPU")
    workers = settings.workers if settings.workers is not None else _spare_cores(device)
    return {
        "dataloader_num_workers": workers,
        "dataloader_prefetch_factor": 2 if workers else None,
        "dataloader_persistent_workers": bool(workers),
        "torch_compile": settings.compile,
        "use_liger_kernel": settings.liger,
    }


def _spare_cores(device: torch.device) -> int:
    """Processes for reading ahead: on a CPU the cores are busy with training itself."""
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(4, cores - 1)

"""Everything that makes a step cheaper and changes no result, put on a model for the time of its training."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from peft import PeftModel
from torch import nn

from hydra_vlm.config import TrainingConfig
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.processes import shards_model
from hydra_vlm.training.fused import fused_layers
from hydra_vlm.training.supervised import SupervisedPositions, supervised_only


@contextmanager
def sped_up(model: nn.Module, parts: ModelParts, settings: TrainingConfig) -> Iterator[SupervisedPositions | None]:
    """The model (PEFT's or bare) with what `settings` asks for; the positions are to be told each batch's labels.

    A model that FSDP or DeepSpeed take apart is left as it is: they hook on the modules that would be replaced.
    """
    if shards_model():
        yield None
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with ExitStack() as undo:
        undo.enter_context(without_key_cache(base))
        if settings.fused_layers:
            undo.enter_context(fused_layers(base, parts))
        yield undo.enter_context(supervised_only(base, parts)) if settings.supervised_only else None


@contextmanager
def without_key_cache(model: Any) -> Iterator[None]:
    """No copies of keys and values for a generation that never comes; the Trainer sets the outer settings alone."""
    text = model.config.get_text_config()
    before = text.use_cache
    text.use_cache = False
    try:
        yield
    finally:
        text.use_cache = before

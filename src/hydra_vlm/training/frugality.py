"""Less memory for a training run through the libraries: gradient checkpointing, eight-bit optimizers, a 4-bit base."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra_vlm.config import Config, TrainingConfig
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.quantization import NONE, require_bitsandbytes
from hydra_vlm.processes import shards_model

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
"""transformers' names of what `training.optimizer` offers."""


def require_frugality(config: Config, trains_base: bool) -> None:
    """Check what can be known of the memory-saving keys before a model is loaded.

    `trains_base`: the run trains or writes the base's own weights, as full fine-tuning and stage I do.

    Raises:
        ConfigError: bitsandbytes is needed and missing, or four-bit weights would be trained, written or taken apart.
    """
    if config.training.optimizer != "adamw":
        require_bitsandbytes(f"training.optimizer={config.training.optimizer}")
    if config.quantization != NONE:
        require_bitsandbytes(f"quantization={config.quantization}")
        if shards_model():
            raise ConfigError(
                f"quantization={config.quantization} with FSDP or DeepSpeed: the pieces of a base in four bits "
                "cannot be put together again here: use DDP (`hydra-vlm devices ddp`), or set quantization=none"
            )
        if trains_base:
            raise ConfigError(
                f"quantization={config.quantization} leaves the base in four bits, which can be neither trained nor "
                "written as a model: leave `full` out of schedules, and train stage I with quantization=none"
            )


@contextmanager
def checkpointing(model: Any, settings: TrainingConfig) -> Iterator[None]:
    """Gradient checkpointing of a transformers model while the block lasts, where `settings` ask for it.

    The kind without re-entrance needs no input that requires a gradient, so the hooks by which transformers makes the
    embeddings (and a frozen tower's) require one are taken off again: they would have the tower keep its activations.

    Raises:
        ConfigError: the model cannot.
    """
    if not settings.gradient_checkpointing:
        yield
        return
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"{type(model).__name__} knows no gradient checkpointing: set training.gradient_checkpointing=false"
        )
    model.activation_checkpointing_enable(
        {"use_reentrant": False}, offload=settings.offload_activations and model.device.type != "cpu"
    )
    model.disable_input_require_grads()
    try:
        yield
    finally:
        model.activation_checkpointing_disable()

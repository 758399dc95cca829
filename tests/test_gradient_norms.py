"""The profile's norms against a recomputation in plain PyTorch on the same batches."""

from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import read_records
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.gradient_norms import GradientNormCallback
from hydra_vlm.training.recipe import InstructionData, finetune, prepare
from tiny import toy_config

STEPS, BATCH = 3, 4


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1e-3])
def test_norms_equal_a_plain_recomputation(
    tiny_model: Path, toy_data: Path, tmp_path: Path, accumulation: int, max_grad_norm: float
) -> None:
    config = toy_config(
        tiny_model,
        toy_data,
        f"training.steps={STEPS}",
        f"training.batch_size={BATCH * accumulation}",
        f"training.device_batch_size={BATCH}",
        f"training.max_grad_norm={max_grad_norm}",
    )
    loaded = load_model(str(tiny_model), "cpu")
    records = read_records(toy_data / "train.json")
    seen = _Seen(open_reader(loaded.processor, "v1-short"))
    data = InstructionDataset(records * 2, seen.reader, 512)
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 4)))
    model = prepare(loaded, schedule, config.training, seed=3)
    callback = GradientNormCallback(model, loaded.parts)
    steps = _Steps(model)
    finetune(model, loaded, InstructionData(data, None, seen), config.training, 3, tmp_path / "run", [callback, steps])
    assert len(callback.norms) == STEPS
    assert len(seen.batches) >= STEPS * accumulation  # the loader looks one batch ahead

    # The same batches again, without the Trainer: the sum over micro-batches of the token-summed loss, divided by
    # the supervised tokens of the whole batch, from the parameters as they were before each step.
    again = prepare(load_model(str(tiny_model), "cpu"), schedule, config.training, seed=3).train()
    names = dict(again.named_parameters())
    for step in range(STEPS):
        again.load_state_dict(steps.before[step])
        again.zero_grad()
        micro = seen.batches[step * accumulation : (step + 1) * accumulation]
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in micro)
        for batch in micro:
            logits = again(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
            summed = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
            )
            (summed / tokens).backward()
        expected = torch.tensor(
            [
                [names[f"base_model.model.{name}.lora_{side}.default.weight"].grad.norm().item() for side in ("A", "B")]
                for name in loaded.parts.names()
            ]
        )
        torch.testing.assert_close(callback.norms[step], expected, rtol=1e-6, atol=1e-9)
    profile = callback.profile(skip=1)
    assert profile.steps == STEPS - 1
    kept = torch.stack(callback.norms[1:]).double()
    torch.testing.assert_close(torch.tensor(profile.mean).double(), kept.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(profile.spread).double(), kept.std(0, correction=0), rtol=1e-5, atol=1e-9)
    assert float(callback.norms[0][:, 0].max()) == 0.0  # B starts at zero, so A has no gradient at step one


class _Seen:
    """A reader that remembers its batches."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.batches = reader, []

    def batch(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = self.reader.batch(items)
        self.batches.append({key: value.clone() for key, value in batch.items()})
        return batch


class _Steps(TrainerCallback):
    """Remembers the parameters before each optimizer step."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.before = model, []

    def on_pre_optimizer_step(self, *args: object, **kwargs: object) -> None:
        self.before.append({k: v.detach().clone() for k, v in self.model.state_dict().items()})

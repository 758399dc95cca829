"""The profile's norms against a recomputation in plain PyTorch on the same batches."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import steps_without_a
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import read_records
from hydra_vlm.errors import TrainingError
from hydra_vlm.graph import ComputationGraph, Projection
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.recipe import InstructionData, finetune, prepare
from hydra_vlm.training.recording import Recording
from hydra_vlm.training.signals.gradient_norm import Recorder
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
    recorder = Recorder(model, loaded.parts)
    steps = _Steps(model)
    callbacks = [Recording([recorder]), steps]
    finetune(model, loaded, InstructionData(data, None, seen), config.training, 3, tmp_path / "run", callbacks)
    assert len(recorder.norms) == STEPS
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
        torch.testing.assert_close(recorder.norms[step], expected, rtol=1e-6, atol=1e-9)
    assert steps_without_a(config.training.warmup_ratio) == 2
    said: list[str] = []
    profile = recorder.profile(skip=1, say=said.append)
    assert (profile.steps, profile.skipped) == (STEPS - 2, 2)  # the warm-up's first rate is 0: B is zero at step 2, too
    assert said == ["profile: 1 more steps left out, in which B was still zero and A had no gradient"]
    kept = torch.stack(recorder.norms[2:]).double()
    torch.testing.assert_close(torch.tensor(profile.mean).double(), kept.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.tensor(profile.spread).double(), kept.std(0, correction=0), rtol=1e-5, atol=1e-9)
    assert [float(norms[:, 0].max()) > 0 for norms in recorder.norms] == [False, False, True]
    assert all(float(norms[:, 1].min()) > 0 for norms in recorder.norms)


def recorded(*steps: list[list[float]]) -> Recorder:
    """A recorder with these norms, (A, B) by projection, of a graph of as many projections."""
    recorder = Recorder.__new__(Recorder)
    graph = ComputationGraph("g", tuple(Projection(i, "q_proj", 4, 4) for i in range(len(steps[0]))))
    recorder.parts = SimpleNamespace(graph=graph)  # type: ignore[assignment]
    recorder.norms = [torch.tensor(step) for step in steps]
    return recorder


def test_zeros_are_not_averaged_silently() -> None:
    asleep, nan = [[0.0, 2.0], [0.0, 2.0]], [[math.nan, 1.0], [1.0, 1.0]]
    half = [[0.0, 4.0], [3.0, 5.0]]  # the first projection's B moves later
    unreached = [[0.0, 0.0], [5.0, 7.0]]
    said: list[str] = []
    profile = recorded(asleep, asleep, nan, half, [[2.0, 6.0], [5.0, 7.0]]).profile(1, said.append)
    assert profile.mean == ((2.0, 5.0), (4.0, 6.0))
    assert profile.spread == ((0.0, 1.0), (1.0, 1.0))
    assert (profile.steps, profile.skipped, len(said)) == (2, 2, 1)
    said.clear()
    profile = recorded([[2.0, 6.0], [5.0, 7.0]], unreached).profile(0, said.append)
    assert profile.mean == ((1.0, 3.0), (5.0, 7.0))
    assert said == [
        "profile: 1 of 2 steps did not reach 1 projections (records without an image?): their norm there is 0"
    ]
    for steps in ((asleep, asleep), (asleep, nan), (asleep, half)):
        with pytest.raises(TrainingError, match=r"too few for a profile: .* raise profile.steps"):
            recorded(*steps).profile(1)


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

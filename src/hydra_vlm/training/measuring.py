"""What forward passes alone tell of an adapter: its loss on some records, and what its layers read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.batches import supervised_positions
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.training.loss import draws_kept, token_losses
from hydra_vlm.training.moments import input_moments
from hydra_vlm.training.recipe import resolve_bf16
from hydra_vlm.training.sharding import on_training_device, training_device
from hydra_vlm.training.speed import sped_up
from hydra_vlm.training.supervised import SupervisedPositions


@dataclass
class Measure:
    """A model that is read by forward passes; `passes` counts the records that went through it."""

    model: PeftModel
    reader: Reader
    size: int
    positions: SupervisedPositions | None
    passes: int = 0

    def loss(self, data: InstructionDataset, numbers: Sequence[int]) -> float:
        """The mean over the supervised tokens of these records, in this process alone."""
        losses: list[Tensor] = []
        for inputs in self._batches(data, numbers):
            labels = inputs.pop("labels")
            if self.positions is not None:
                self.positions.read({**inputs, "labels": labels})
            found = token_losses(self.model(**inputs)["logits"], labels, self.positions)
            losses.append(found[supervised_positions(labels)] if found.shape == labels.shape else found.flatten())
        return float(torch.cat(losses).double().mean())

    def moments(self, parts: ModelParts, data: InstructionDataset, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The second moment of each adapted module's inputs over these records, as `resizing` takes it.

        A module that read nothing is not among them.
        """
        with input_moments(self.model, parts) as found:
            self.loss(data, numbers)
        return dict(found)

    def _batches(self, data: InstructionDataset, numbers: Sequence[int]) -> Iterator[dict[str, Tensor]]:
        device = training_device(self.model)
        for start in range(0, len(numbers), self.size):
            chosen = numbers[start : start + self.size]
            self.passes += len(chosen)
            batch = self.reader.batch([data[number] for number in chosen])
            yield {name: value.to(device) for name, value in batch.items()}


@contextmanager
def measuring(model: PeftModel, parts: ModelParts, reader: Reader, settings: TrainingConfig) -> Iterator[Measure]:
    """The model in evaluation mode on its device, with what makes its passes cheaper, while the block lasts.

    A training goes on afterwards as it would without.
    """
    device = training_device(model)
    was_training = model.training
    size = 2 * (settings.device_batch_size or settings.batch_size)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=resolve_bf16(settings, device))
    with on_training_device(model), draws_kept(device), torch.no_grad(), autocast:
        model.eval()
        try:
            with sped_up(model, parts, settings) as positions:
                yield Measure(model, reader, size, positions)
        finally:
            model.train(was_training)

"""transformers' Trainer with what HyDRA's recipes need and it lacks, no more.

* a learning rate of its own for the projector,
* batches by length whose order follows from the seed and the epoch alone (the Trainer's draws on the global generator,
  which schedules use up differently),
* checkpoints that hold the projector beside the adapter (PEFT's hold the adapter alone), or the projector alone in
  stage I,
* gradient norms taken before clipping.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.training.gradient_norms import GradientNormCallback

PROJECTOR_FILE = "projector.safetensors"


class VLMTrainer(Trainer):
    """Trainer for LoRA (or the whole decoder) plus projector over a frozen tower."""

    def __init__(
        self,
        *args: Any,
        parts: ModelParts,
        projector_learning_rate: float | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.parts = parts
        self.projector_learning_rate = projector_learning_rate
        self.lengths = lengths

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.lengths, batch * self.args.world_size, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The arguments' optimizer over two groups, each with its learning rate: projector, everything else."""
        if self.optimizer is None:  # type: ignore[has-type]
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            inside, outside = split_projector(model, self.parts)
            rate = self.projector_learning_rate or self.args.learning_rate
            decay = {"weight_decay": self.args.weight_decay}
            groups = [{"params": outside, **decay}, {"params": inside, "lr": rate, **decay}]
            self.optimizer = optimizer_class([g for g in groups if g["params"]], **options)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, GradientNormCallback):
                callback.record()
        return super()._clip_grad_norm(model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        projector, alone = self._projector(), self._projector_alone()
        if not alone:
            super()._save(output_dir, state_dict)
        if self.args.should_save and projector is not None and (alone or isinstance(self.model, PeftModel)):
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            state = {k: v.detach().cpu().contiguous() for k, v in projector.state_dict().items()}
            save_file(state, folder / PROJECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._projector_alone():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        projector, stored = self._projector(), Path(resume_from_checkpoint) / PROJECTOR_FILE
        if projector is not None and stored.exists():
            projector.load_state_dict(load_file(stored))

    def _projector_alone(self) -> bool:
        """Whether nothing but the projector is trained: then nothing else need be stored."""
        inside, outside = split_projector(self.model, self.parts)
        return bool(inside) and not outside

    def _projector(self) -> nn.Module | None:
        if self.parts.projector is None:
            return None
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        return base.get_submodule(self.parts.projector)


WINDOW = 8
"""So many batches are drawn together and sorted by length; then batches are shuffled, so that length is no schedule."""


class ByLength(Sampler[int]):
    """Record numbers in an order whose batches hold records of about one length, anew for every epoch.

    `lengths` in tokens, image tokens counted. The order depends on nothing but lengths, batch size, seed and epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """What accelerate calls at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        numbers = draw.sample(range(len(self.lengths)), len(self.lengths))
        window = WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(numbers), window):
            alike = sorted(numbers[start : start + window], key=self.lengths.__getitem__)
            batches += [alike[i : i + self.batch_size] for i in range(0, len(alike), self.batch_size)]
        rest = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # the only short one comes last
        draw.shuffle(batches)
        return iter([number for batch in batches + rest for number in batch])


def split_projector(model: nn.Module, parts: ModelParts) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters trained in the projector itself, and all others: LoRA's too, wherever they lie."""
    inside: list[nn.Parameter] = []
    outside: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            place = name.removeprefix("base_model.model.")
            own = parts.projector is not None and place.startswith(f"{parts.projector}.") and ".lora_" not in place
            (inside if own else outside).append(parameter)
    return inside, outside

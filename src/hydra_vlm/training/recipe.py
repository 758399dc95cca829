"""Stage II, read from top to bottom: adapter (or the whole decoder) plus projector, frozen tower, one Trainer run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.instruction import Collate, InstructionDataset
from hydra_vlm.errors import ConfigError
from hydra_vlm.lora import attach
from hydra_vlm.models.loading import LoadedModel
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.training.checkpoints import last_whole_checkpoint
from hydra_vlm.training.progress import LossProgress
from hydra_vlm.training.trainer import VLMTrainer, split_projector

FULL = "full"  # the name of the baseline that trains the whole decoder


@dataclass(frozen=True)
class InstructionData:
    """What a recipe trains and validates on; `features` are the frozen tower's, by image path (None: not cached)."""

    train: InstructionDataset
    validation: InstructionDataset | None
    features: Mapping[str, Tensor] | None


@dataclass(frozen=True)
class Finetuned:
    """A finished run: the model as trained, the loss by step, the validation loss (nan without validation data)."""

    model: nn.Module
    trained: dict[str, int]
    train_losses: tuple[tuple[int, float], ...]
    validation_loss: float


def prepare(loaded: LoadedModel, schedule: RankSchedule | None, settings: TrainingConfig, seed: int) -> nn.Module:
    """Freeze all, then open what is trained: the schedule's adapter, or (None) the whole decoder; the projector."""
    model, parts = loaded.model, loaded.parts
    model.requires_grad_(False)
    if schedule is None:
        model.get_submodule(parts.decoder).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        model = attach(model, schedule, parts, seed=seed, dropout=settings.dropout)
    if parts.projector is not None:
        loaded.model.get_submodule(parts.projector).float().requires_grad_(True)
    return model


def finetune(
    model: nn.Module,
    loaded: LoadedModel,
    data: InstructionData,
    settings: TrainingConfig,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> Finetuned:
    """Train what `prepare` opened; a run that was stopped goes on from its last whole checkpoint in `folder`.

    The data order follows from `seed` alone, so schedules are compared on the same batches.
    """
    trainer = VLMTrainer(
        model=model,
        parts=loaded.parts,
        projector_learning_rate=settings.projector_learning_rate,
        args=training_arguments(settings, seed, folder, loaded.model.device),
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=Collate(loaded.processor, data.features),
        callbacks=[*callbacks, LossProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
    validation_loss = trainer.evaluate()["eval_loss"] if data.validation else math.nan
    return Finetuned(
        model=model.eval(),
        trained=count_trained(model, loaded.parts),
        train_losses=tuple((e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e),
        validation_loss=validation_loss,
    )


def training_arguments(settings: TrainingConfig, seed: int, folder: Path, device: torch.device) -> TrainingArguments:
    """The recipe in transformers' words; the global batch holds whatever the number of devices."""
    devices = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    on_one, accumulation = split_batch(settings, devices)
    steps = settings.steps or -1
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=on_one,
        per_device_eval_batch_size=2 * on_one,
        gradient_accumulation_steps=accumulation,
        max_steps=steps,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim="adamw_torch",
        seed=seed,
        bf16=resolve_bf16(settings, device),
        use_cpu=device.type == "cpu",
        logging_steps=max(1, (settings.steps or 1000) // 40),
        save_steps=settings.save_steps,
        save_total_limit=2,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
    )


def split_batch(settings: TrainingConfig, devices: int) -> tuple[int, int]:
    """(batch per device, accumulation steps) whose product with `devices` is the global batch.

    Raises:
        ConfigError: the global batch does not divide that way.
    """
    per_device = settings.device_batch_size or settings.batch_size // devices
    accumulation, rest = divmod(settings.batch_size, max(1, per_device * devices))
    if rest or not accumulation:
        raise ConfigError(
            f"training.batch_size {settings.batch_size} is not a multiple of device_batch_size {per_device} x "
            f"{devices} device(s): change one of them"
        )
    return per_device, accumulation


def resolve_bf16(settings: TrainingConfig, device: torch.device) -> bool:
    """Whether to compute in bfloat16: `auto` says yes on CUDA devices that do; on a CPU it gains nothing here."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def count_trained(model: nn.Module, parts: ModelParts) -> dict[str, int]:
    """Trained parameters by part: "lora" or "decoder", and "projector"."""
    inside, outside = split_projector(model, parts)
    kind = "lora" if isinstance(model, PeftModel) else "decoder"
    return {kind: sum(p.numel() for p in outside), "projector": sum(p.numel() for p in inside)}

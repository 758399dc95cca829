"""Stage II, read from top to bottom: adapter (or the whole decoder) plus projector, frozen tower, one Trainer run.

Stage I is the same run with nothing but the projector opened.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from hydra_vlm.config import BEST, TrainingConfig
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader
from hydra_vlm.errors import ConfigError
from hydra_vlm.lora import attach, detach
from hydra_vlm.models.loading import LoadedModel
from hydra_vlm.models.structure import PROJECTOR, ModelParts
from hydra_vlm.processes import count
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.starting import Start, begin, read_start
from hydra_vlm.training.best import KeepBest, load_best, require_validation
from hydra_vlm.training.checkpoints import Losses, best_step, validation_losses
from hydra_vlm.training.even_batches import WithBlanks, blanking
from hydra_vlm.training.frugality import OPTIMIZERS, checkpointing
from hydra_vlm.training.guarded import Estimate, train_guarded
from hydra_vlm.training.legs import WHOLE, EndOfLeg, Leg
from hydra_vlm.training.nonfinite import FiniteSteps
from hydra_vlm.training.numbered import Numbered, NumberedBatch
from hydra_vlm.training.progress import LastLoss, LossProgress, ValidationWatch, Watch
from hydra_vlm.training.rates import Rates
from hydra_vlm.training.sharding import Unreached, bring_back, to_take_apart, training_device
from hydra_vlm.training.speed import engine, sped_up
from hydra_vlm.training.trackers import report_arguments, tracked
from hydra_vlm.training.trainer import VLMTrainer, split_projector

FULL = "full"  # the name of the baseline that trains the whole decoder


@dataclass(frozen=True)
class InstructionData:
    """What a recipe trains and validates on, and how the model reads it."""

    train: InstructionDataset
    validation: InstructionDataset | None
    reader: Reader


@dataclass(frozen=True)
class Finetuned:
    """A finished run: the model with the weights that are kept, and its losses by step.

    `validation_loss` is that of the kept weights, nan without validation data or where it is no number;
    `validation_losses` are all that were taken; `kept_step` is the best weights' step where `training.keep` is best.
    """

    model: nn.Module
    trained: dict[str, int]
    train_losses: Losses
    validation_loss: float
    validation_losses: Losses = ()
    kept_step: int | None = None


def prepare(loaded: LoadedModel, schedule: RankSchedule | None, settings: TrainingConfig, seed: int) -> nn.Module:
    """Freeze all, then open what is trained: the schedule's adapter, or (None) the whole decoder; the projector.

    With `settings.start_from`, adapter and projector begin as that adapter's, brought to the schedule's ranks.
    """
    model, parts = loaded.model, loaded.parts
    model.requires_grad_(False)
    start = start_of(loaded, settings) if schedule is not None else None
    if schedule is None:
        model.get_submodule(parts.decoder).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    else:
        model = attach(model, schedule, parts, seed=seed, dropout=settings.dropout)
    if parts.projector is not None and (schedule is None or trains_projector(parts)):
        train_in_float32(loaded.model.get_submodule(parts.projector))
    if start is not None and schedule is not None:
        begin(start, cast(PeftModel, model), schedule, parts)
    return model


def start_of(loaded: LoadedModel, settings: TrainingConfig) -> Start | None:
    """The adapter that training starts from, read and checked; None where there is none."""
    if settings.start_from is None:
        return None
    return read_start(settings.start_from, loaded.model, loaded.parts, trains_projector(loaded.parts))


@contextmanager
def adapting(loaded: LoadedModel, schedule: RankSchedule, settings: TrainingConfig, seed: int) -> Iterator[PeftModel]:
    """The model with the schedule's adapter, open for training, while the block lasts.

    Then it is what it was, to the bit: without the adapter, its own projector in place, frozen, in evaluation mode.
    """
    opened: PeftModel | None = None
    try:
        opened = cast(PeftModel, prepare(loaded, schedule, settings, seed))
        yield opened
    finally:
        if opened is not None:
            detach(opened)
        loaded.model.requires_grad_(False).eval()


def trains_projector(parts: ModelParts) -> bool:
    """Whether the projector is trained whole beside the adapter: where there is one that LoRA does not reach."""
    return parts.projector is not None and PROJECTOR not in parts.graph.part_layers


def prepare_projector(loaded: LoadedModel) -> nn.Module:
    """Stage I: freeze all, then open the projector.

    Raises:
        ConfigError: the model has no projector.
    """
    if loaded.parts.projector is None:
        raise ConfigError(f"{type(loaded.model).__name__} has no projector to train: stage I is for image-text models")
    loaded.model.requires_grad_(False)
    train_in_float32(loaded.model.get_submodule(loaded.parts.projector))
    return loaded.model


def train_in_float32(module: nn.Module) -> None:
    """Open a module's parameters in float32, whatever the precision of what it reads; it answers in that precision."""
    if all(parameter.dtype == torch.float32 for parameter in module.parameters()):
        module.requires_grad_(True)
        return
    given = next(module.parameters()).dtype

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in inputs)

    module.float().requires_grad_(True)
    module.register_forward_pre_hook(widen)
    module.register_forward_hook(lambda _, __, output: output.to(given) if torch.is_tensor(output) else output)


def finetune(
    model: nn.Module,
    loaded: LoadedModel,
    data: InstructionData,
    settings: TrainingConfig,
    seed: int,
    folder: Path,
    callbacks: Sequence[TrainerCallback] = (),
    watch: Watch | None = None,
    estimate: Estimate = str,
    leg: Leg = WHOLE,
) -> Finetuned:
    """Train what `prepare` opened; a run that was stopped goes on from its last whole checkpoint in `folder`.

    The data order follows from `seed` alone, so schedules are compared on the same batches. `watch` is told step and
    validation loss at `settings.watch_steps`; training goes on as it would without. Where `settings.keep` is best, the
    model ends with the weights of the lowest validation loss of these. `estimate` is asked for what the
    run was expected to take, should memory run out. `leg` is the part of the run that is to be done now.

    Raises:
        HydraError: a loss that is no number, a record that no longer reads, no memory, no room on the disk; the best
            weights asked for without validation data.
        Interrupted: SIGTERM or SIGINT came; a checkpoint of the step just done is there.
    """
    require_validation(settings, validated=bool(data.validation))
    settings = settings.model_copy(update={"steps": settings.total_steps(len(data.train))})
    keeping = [KeepBest(folder, settings.patience)] if settings.keep == BEST and leg.until is None else []
    numbered, validation = Numbered(data.train), Numbered(data.validation) if data.validation else None
    watched = [ValidationWatch(watch)] if watch is not None and validation is not None else []
    opened, several = to_take_apart(model), count() > 1
    batch = NumberedBatch(data.reader.batch)
    with sped_up(opened, loaded.parts, settings) as positions:
        trainer = VLMTrainer(
            model=opened,
            parts=loaded.parts,
            positions=positions,
            rates=Rates.of(settings),
            leg=leg,
            lengths=data.train.lengths if settings.group_by_length else None,
            finite=FiniteSteps(
                folder.parent, settings.skip_spikes, numbered.told, validation.told if validation else None
            ),
            args=training_arguments(settings, seed, folder, training_device(loaded.model), bool(watched or keeping)),
            train_dataset=WithBlanks(numbered) if several else numbered,
            eval_dataset=WithBlanks(validation) if several and validation else validation,
            data_collator=blanking(batch) if several else batch,
            callbacks=[
                *callbacks,
                *watched,
                *([Unreached(loaded.parts)] if several else []),
                LastLoss(),
                *keeping,
                *([EndOfLeg(leg.until)] if leg.until is not None else []),
                LossProgress(),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        with tracked(trainer, settings.trackers, folder.parent):
            with checkpointing(loaded.model, settings):
                train_guarded(trainer, folder, settings, estimate)
            losses = validation_losses(trainer.state.log_history)
            if validation and leg.validates and trainer.state.global_step not in dict(losses):
                trainer.evaluate()
                losses = validation_losses(trainer.state.log_history)
    bring_back(opened, model)
    kept = best_step(losses) if keeping else None
    if kept is not None:
        load_best(model, folder, kept)
    return Finetuned(
        model=model.eval(),
        trained=count_trained(model, loaded.parts),
        train_losses=tuple((e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e),
        validation_loss=dict(losses).get(kept or trainer.state.global_step, math.nan),
        validation_losses=losses,
        kept_step=kept,
    )


def training_arguments(
    settings: TrainingConfig, seed: int, folder: Path, device: torch.device, watched: bool = False
) -> TrainingArguments:
    """The recipe in transformers' words; the global batch holds whatever the number of devices."""
    on_one, accumulation = split_batch(settings, _devices())
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
        warmup_steps=settings.warmup_ratio if steps != 1 else 0,  # whose first step has rate 0
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        seed=seed,
        bf16=resolve_bf16(settings, device),
        use_cpu=device.type == "cpu",
        logging_steps=max(1, (settings.steps or 1000) // 40),
        save_steps=settings.save_steps,
        save_total_limit=2,
        eval_strategy="steps" if watched else "no",
        eval_steps=settings.watch_steps,
        **report_arguments(settings.trackers, folder.parent),
        logging_nan_inf_filter=False,  # a step with such a loss is left out or ends the training: none is ever logged
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=False,
        **engine(settings, device),
    )


def batch_arithmetic(settings: TrainingConfig) -> str:
    """How the global batch comes about here: "global batch 128 = 16 per device x 8 accumulation x 1 device(s)"."""
    devices = _devices()
    on_one, accumulation = split_batch(settings, devices)
    parts = f"{on_one} per device x {accumulation} accumulation x {devices} device(s)"
    return f"global batch {settings.batch_size} = {parts}"


def _devices() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def split_batch(settings: TrainingConfig, devices: int) -> tuple[int, int]:
    """(batch per device, accumulation steps) whose product with `devices` is the global batch.

    Raises:
        ConfigError: the global batch does not divide that way.
    """
    per_device = settings.device_batch_size or settings.batch_size // devices
    accumulation, rest = divmod(settings.batch_size, max(1, per_device * devices))
    if rest or not accumulation or not per_device:
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

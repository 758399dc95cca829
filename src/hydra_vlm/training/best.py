"""The weights of the lowest validation loss, kept on the way, and the end of a training that has stopped improving.

Both follow from the validation losses in the Trainer's own history, which every checkpoint holds, so a resumed run
keeps and ends as an undisturbed one does. Weights lie beside the checkpoints as `best-<step>.safetensors`, for as long
as the run or one of its checkpoints may come back to them.
"""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.config import BEST, TrainingConfig
from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.faults import disk_full_told, first_line
from hydra_vlm.files import as_umask_says
from hydra_vlm.processes import by_first
from hydra_vlm.training.checkpoints import Losses, best_step, best_weights, checkpoints, history_of, validation_losses
from hydra_vlm.training.sharding import trained_state


def require_validation(settings: TrainingConfig, validated: bool) -> None:
    """Raises ConfigError where the best weights are asked for and nothing tells which they are."""
    if settings.keep == BEST and not validated:
        raise ConfigError(
            "training.keep=best takes the weights of the lowest validation loss, and there are no validation records: "
            "name a file as data.validation, or leave training.keep at last"
        )


class KeepBest(TrainerCallback):
    """Writes the weights of each new lowest validation loss into `folder`, and stops after `patience` others in a row.

    `patience` None: it never stops. Each validation loss has a training loss logged beside it.
    """

    def __init__(self, folder: Path, patience: int | None) -> None:
        self.folder, self.patience = folder, patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._stop_without_hope(state, control)  # where a stopped run was to end anyway

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= control.should_evaluate

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if best_step(validation_losses(state.log_history)) == state.global_step:
            weights = trained_state(kwargs["model"])  # every process takes part
            by_first(partial(_write, weights, best_weights(self.folder, state.global_step)))
        self._stop_without_hope(state, control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Weights that nothing comes back to are removed."""
        if state.is_world_process_zero:
            histories = [state.log_history, *(history_of(path) for path in checkpoints(self.folder).values())]
            kept = {best_weights(self.folder, step) for step in map(_best_in, histories) if step is not None}
            for path in set(self.folder.glob("best-*.safetensors")) - kept:
                path.unlink(missing_ok=True)

    def _stop_without_hope(self, state: TrainerState, control: TrainerControl) -> None:
        losses = validation_losses(state.log_history)
        if self.patience is not None and worse_in_a_row(losses) >= self.patience:
            control.should_training_stop = True


def worse_in_a_row(losses: Losses) -> int:
    """How many validation losses there are since the lowest."""
    best = best_step(losses)
    return sum(best is None or step > best for step, _ in losses)


def load_best(model: nn.Module, folder: Path, step: int) -> None:
    """Give the (whole) model's trained parameters the weights that were kept at `step`.

    Raises:
        CheckpointError: they do not read any more, or are not this model's.
    """
    path = best_weights(folder, step)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    try:
        weights = load_file(path)
        if {name: value.shape for name, value in weights.items()} != {name: p.shape for name, p in trained.items()}:
            raise ValueError("it holds other weights than are trained here")
    except (OSError, ValueError, SafetensorError) as problem:
        raise CheckpointError(
            f"{path}, the weights of the lowest validation loss, does not read ({first_line(problem)}): repeat the "
            "same command, which goes on from a checkpoint before them"
        ) from None
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def _best_in(history: Iterable[Mapping[str, Any]]) -> int | None:
    return best_step(validation_losses(history))


def _write(weights: Mapping[str, Tensor], path: Path) -> None:
    draft = path.with_suffix(".tmp")
    size = sum(value.numel() * value.element_size() for value in weights.values())
    with disk_full_told(path, lambda: "The last checkpoint is kept.", needed=size):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in weights.items()}, draft)
        as_umask_says(draft)
        os.replace(draft, path)

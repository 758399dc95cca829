"""What is seen of a training run: one progress bar with the loss beside it, and validation losses on the way."""

import math
from collections.abc import Callable
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Watch = Callable[[int, float], None]
"""Told an optimizer step and the validation loss after it."""


class LossProgress(ProgressCallback):
    """transformers' progress bar; logged losses go into the bar, not between the lines of the terminal."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class LastLoss(TrainerCallback):
    """Has the last step's loss logged, however many steps there are."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps


class ValidationWatch(TrainerCallback):
    """Tells someone the validation loss of each evaluation during training."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if metrics and state.global_step < state.max_steps:
            self.watch(state.global_step, metrics.get("eval_loss", math.nan))

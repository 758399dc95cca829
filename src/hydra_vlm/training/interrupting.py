"""A signal during training: a checkpoint at the end of the step, then the end."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.interruption import Request
from hydra_vlm.training.processes import any_process


class StopOnRequest(TrainerCallback):
    """Saves and stops after the step in which a signal came to any of the processes.

    `began` says whether a step was begun. A validation loss that is due waits until the run goes on.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.step: int | None = None
        self.began = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.began = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if any_process(self.request.number is not None, args.device):
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
            self.step = state.global_step

"""What happens when a loss or a gradient is no number: the step is not applied, its records are written down.

So are those of a validation loss that is no number; training goes on, since it does not depend on it. An isolated spike
may be left out (`training.skip_spikes`); otherwise, or with too many in a row, training stops.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.errors import TrainingError
from hydra_vlm.files import write_json
from hydra_vlm.streams import say
from hydra_vlm.training.processes import any_process, from_all_processes

Told = Callable[[int], dict[str, str]]


class FiniteSteps(TrainerCallback):
    """Looks at each optimizer step before it is applied; one look at the device a step.

    `folder` is where steps are written down; `allowed` is how many in a row may be left out; `told` says which record a
    number stands for, its `id` and its `place`, and `validation` the same of the validation's. It must come after every
    callback that reads gradients.
    """

    def __init__(self, folder: Path, allowed: int, told: Told, validation: Told | None = None) -> None:
        self.folder, self.allowed, self.told, self.validation = folder, allowed, told, validation
        self.in_a_row = 0
        self._numbers: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._left_out = False

    @property
    def is_new_step(self) -> bool:
        """Whether nothing was seen of the optimizer step yet."""
        return not self._losses

    def saw(self, numbers: Tensor | None, loss: Tensor) -> None:
        """Take down one part of an optimizer step: its records [B] and its loss, which stay on the device."""
        if numbers is not None:
            self._numbers.append(numbers)
        self._losses.append(loss)

    def applies(self, state: TrainerState, gradient_norm: Any, rate: float, undone: bool = True) -> bool:
        """Whether the step may be applied; `undone` False means that it was applied already and cannot be left out.

        Raises:
            TrainingError: it may not, and may not be left out either.
        """
        numbers, losses = self._numbers, self._losses
        self._numbers, self._losses = [], []
        seen = torch.stack([loss.float() for loss in losses])
        if hasattr(gradient_norm, "full_tensor"):  # of sharded gradients
            gradient_norm = gradient_norm.full_tensor()
        norm = torch.as_tensor(gradient_norm, dtype=torch.float32, device=seen.device)
        fine = bool(torch.isfinite(seen).all() & torch.isfinite(norm))
        self._left_out = any_process(not fine, seen.device)
        if not self._left_out:
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        stops = self.in_a_row > self.allowed or not undone
        self._write_down(state, from_all_processes((seen.tolist(), _listed(numbers))), float(norm), rate, stops)
        return False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self._left_out:  # an optimizer passes over parameters without a gradient: weights and moments stay
            model.zero_grad(set_to_none=True)

    def in_validation(self, state: TrainerState, numbers: Sequence[int]) -> None:
        """Write down the validation records whose loss is no number, and say so."""
        if not state.is_world_process_zero or self.validation is None:
            return
        records = [self.validation(number) for number in numbers]
        path = self.folder / f"nonfinite-validation-{state.global_step}.json"
        write_json(path, {"step": state.global_step, "records": records})
        ids = _some([record["id"] for record in records])
        say(f"step {state.global_step}: the validation loss is no number, for that of {ids} is none; records: {path}")

    def _write_down(self, state: TrainerState, seen: list[Any], norm: float, rate: float, stops: bool) -> None:
        """One step's file; then the error, or a line."""
        step = state.global_step + 1
        losses = [loss for part, _ in seen for loss in part]
        records = [self.told(number) for _, part in seen for number in part]
        path = self.folder / f"nonfinite-step-{step}.json"
        if state.is_world_process_zero:
            write_json(
                path,
                {
                    "step": step,
                    "losses": [_plain(loss) for loss in losses],
                    "gradient_norm": _plain(norm),
                    "learning_rate": rate,
                    "in_a_row": self.in_a_row,
                    "stopped": stops,
                    "records": records,
                },
            )
        bad = next((loss for loss in losses if not math.isfinite(loss)), None)
        what = f"the gradient norm is {norm}" if bad is None else f"the loss is {bad}"
        if stops:
            raise TrainingError(self._message(step, what, rate, [record["id"] for record in records], path))
        if state.is_world_process_zero:
            say(f"step {step}: {what}: left out ({self.in_a_row} in a row of at most {self.allowed}); records: {path}")

    def _message(self, step: int, what: str, rate: float, ids: list[str], path: Path) -> str:
        row = f", the last of {self.in_a_row} such steps in a row" if self.in_a_row > 1 else ""
        return (
            f"step {step}: {what}{row}, at learning rate {rate:.3g}; the step was not applied. Its records are "
            f"{_some(ids)}, all in {path}. Look at them, or lower training.learning_rate; training.skip_spikes="
            f"{max(1, 2 * self.allowed)} leaves out that many steps in a row. The last checkpoint is kept."
        )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:4]) + (f" and {len(ids) - 4} more" if len(ids) > 4 else "")


def _listed(numbers: list[Tensor]) -> list[int]:
    return [int(number) for part in numbers for number in part]


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no nan

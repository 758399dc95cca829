"""A leg: the part of a training that one call does. A run of one leg is a whole training.

Legs follow one another over checkpoints: a leg ends with one, the next goes on from it, or from what was made of it.
The schedule of rates is that of the whole run, whatever its legs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

RAMP = 5
"""Steps over which rates rise where an optimizer's moments were restarted."""


@dataclass(frozen=True)
class Leg:
    """`until` is its last optimizer step, None for the run's last.

    Over its last `cooling` steps rates fall to zero, on top of what the run's schedule says. `ramp_from`: after this
    step they rise from a small share within `RAMP` steps. `validates`: the loss at its end is taken.
    """

    until: int | None = None
    cooling: int = 0
    ramp_from: int | None = None
    validates: bool = True

    def pace(self, step: int) -> float:
        """What the rates of the step after `step` are multiplied with."""
        factor = 1.0
        if self.cooling and self.until is not None:
            factor = min(1.0, max(0.0, (self.until - step) / self.cooling))
        if self.ramp_from is not None and step >= self.ramp_from:
            factor *= min(1.0, (step - self.ramp_from + 1) / RAMP)
        return factor

    @property
    def is_plain(self) -> bool:
        """Whether rates are those of the run's schedule."""
        return not self.cooling and self.ramp_from is None


WHOLE = Leg()
"""The whole run."""


class EndOfLeg(TrainerCallback):
    """Ends a training after the leg's last step, with a checkpoint of it."""

    def __init__(self, until: int) -> None:
        self.until = until

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        control.should_training_stop |= state.global_step >= self.until  # was stopped after its last step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.global_step >= self.until:
            control.should_save = control.should_training_stop = True


def paced(schedule: Callable[[int], float], leg: Leg) -> Callable[[int], float]:
    """A run's schedule of rates in this leg."""
    return lambda step: schedule(step) * leg.pace(step)

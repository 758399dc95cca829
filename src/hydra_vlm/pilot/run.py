"""The pilot run: candidates begin the whole run, are cooled on a copy and measured; the winner is gone on from.

`pilot.json` has what was tried and, in the end, what won. A candidate that was stopped goes on from its checkpoint.
"""

import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.errors import ConfigError, TrainingError
from hydra_vlm.files import read_value, write_json
from hydra_vlm.pilot.candidates import Length, Pilot, Tried, Tuned, following, tried_from_json, tried_to_json, winner
from hydra_vlm.processes import by_first
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.training.checkpoints import last_whole_checkpoint
from hydra_vlm.training.job import Job, Say
from hydra_vlm.training.legs import Leg
from hydra_vlm.training.rates import Rates
from hydra_vlm.training.recipe import adapting

DONE = "pilot.json"
TRIED = "tried.json"
REMEDY = "remove it, and the pilot is made anew"


def piloted(job: Job, schedule: RankSchedule, first: Path, say: Say) -> tuple[Job, Pilot]:
    """The job with the rates that won, and the pilot; the winner's checkpoint is in `first` when this returns.

    `schedule` is what the run begins with, and `first` the folder of its first checkpoints.

    Raises:
        ConfigError: there is no validation data to measure candidates on.
        TrainingError: no candidate had a finite loss.
    """
    require_measurable(validated=bool(job.data.validation))
    stored = job.folder / DONE
    pilot = by_first(lambda: read_value(stored, Pilot.from_json, REMEDY) if stored.is_file() else None)
    if pilot is None:
        pilot = _search(job, schedule, first)
        by_first(lambda: write_json(stored, pilot.to_json()))
    say(pilot.summary())
    return replace(job, settings=pilot.chosen.settings(job.settings)), pilot


def require_measurable(validated: bool) -> None:
    """Raises ConfigError where nothing tells which rates are better."""
    if not validated:
        raise ConfigError(
            "training.pilot chooses rates by their validation loss, and there are no validation records: name a file "
            "as data.validation, or set training.pilot=false"
        )


def _search(job: Job, schedule: RankSchedule, first: Path) -> Pilot:
    guess, folder = Tuned.of(job.settings, Rates.of(job.settings).projector), job.folder / "pilot"
    length = Length.of(job.settings.total_steps(len(job.data.train)))
    if not length.is_worthwhile:
        return Pilot((), guess, 0)
    tried = by_first(lambda: _so_far(folder / TRIED))
    while length.affords(tried) and (rates := following(guess, tried)) is not None:
        one = _try(
            replace(job, settings=rates.settings(job.settings)), schedule, folder / str(len(tried)), length, rates
        )
        tried = (*tried, one)
        by_first(partial(_keep, tried, folder))
    if all(math.isnan(one.loss) for one in tried):
        raise TrainingError(
            f"no rate of the pilot gave a finite loss ({', '.join(f'{one.rates.learning_rate:g}' for one in tried)}): "
            "lower training.learning_rate, or look at the data"
        )
    chosen = winner(tried)
    number = next(number for number, one in enumerate(tried) if one.rates == chosen)
    by_first(lambda: _hand_over(folder, number, first))
    return Pilot(tried, chosen, sum(one.steps for one in tried) - length.trunk)


def _try(job: Job, schedule: RankSchedule, folder: Path, length: Length, rates: Tuned) -> Tried:
    """One candidate: its trunk, which is kept, and the loss of a cooled copy."""
    trunk, copy = folder / "trunk", folder / "cooled"
    with adapting(job.loaded, schedule, job.settings, job.seed) as opened:
        try:
            job.finetune(opened, trunk, Leg(until=length.trunk, validates=False), EndIfDoubled())
            by_first(lambda: _copy(trunk, copy))
            cooled = Leg(until=length.trunk + length.cooling, cooling=length.cooling)
            loss = job.finetune(opened, copy, cooled, EndIfDoubled()).validation_loss
        except TrainingError:  # a loss that is no number, or doubled
            loss = math.nan
    return Tried(rates, loss, length.trunk + length.cooling)


class EndIfDoubled(TrainerCallback):
    """Ends a training whose loss is twice that of its beginning."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        if losses and losses[-1] > 2 * losses[0]:
            raise TrainingError(
                f"step {state.global_step}: the loss has doubled from {losses[0]:.3f} to {losses[-1]:.3f}"
            )


def _copy(trunk: Path, copy: Path) -> None:
    """The trunk's last checkpoint, to be cooled; a copy that was begun goes on."""
    found = last_whole_checkpoint(trunk)
    if found is not None and last_whole_checkpoint(copy) is None:
        whole_copy(Path(found), copy)


def whole_copy(checkpoint: Path, folder: Path) -> None:
    """A checkpoint in another folder, which has no other; it appears whole or not at all."""
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(checkpoint, draft / checkpoint.name)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _so_far(stored: Path) -> tuple[Tried, ...]:
    return read_value(stored, tried_from_json, REMEDY) if stored.is_file() else ()


def _keep(tried: tuple[Tried, ...], folder: Path) -> None:
    """Write down what was tried; only the trunk of the best so far is kept on the disk."""
    write_json(folder / TRIED, tried_to_json(tried))
    best = winner(tried)
    for number, one in enumerate(tried):
        shutil.rmtree(folder / str(number) / "cooled", ignore_errors=True)
        if one.rates != best:
            shutil.rmtree(folder / str(number), ignore_errors=True)


def _hand_over(folder: Path, number: int, first: Path) -> None:
    """Make the winner's checkpoint the run's first one."""
    found = last_whole_checkpoint(folder / str(number) / "trunk")
    first.parent.mkdir(parents=True, exist_ok=True)
    if found is not None and last_whole_checkpoint(first) is None:
        whole_copy(Path(found), first)

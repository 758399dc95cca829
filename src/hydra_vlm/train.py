"""One trial by itself, and a signal by itself: what `train` and `profile` do."""

from pathlib import Path

from hydra_vlm.config import Config
from hydra_vlm.measuring import Measured, measure
from hydra_vlm.records import TrialRecord
from hydra_vlm.run_folder import owning
from hydra_vlm.schedules import schedule_for
from hydra_vlm.trials import MOVING, Say, prepare_study, run_trial


def train(config: Config, out: Path, wish: str, seed: int, say: Say = print) -> TrialRecord:
    """One trial in a run folder; `wish` is what `schedule_for` takes."""
    with owning(out, say):
        study = prepare_study(config, out, say)
        name, schedule = schedule_for(study, wish, say)
        return run_trial(study, name, schedule, seed, say, moving=name == MOVING)


def profile(config: Config, out: Path, say: Say = print) -> Measured:
    """The signal of kind `profile.signal` alone; of gradient norms, the profile."""
    kind = config.profile.signal
    with owning(out, say):
        return measure(prepare_study(config, out, say), [kind], say)[kind]

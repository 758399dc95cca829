"""The best adapter that a budget buys, and the evidence: check, pilot, one training whose ranks move, scores, report.

Beside it uniform LoRA is trained with the same seed and a pilot of its own, so that nobody has to believe us. Every
step leaves a file in the run folder and is skipped when its file is there; a training that was stopped goes on from its
last checkpoint. Killed at any moment and started again with the same command, a run ends with the same result: to the
bit on the same machine with the same number of threads, elsewhere but for the order of sums.
"""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.config import Config
from hydra_vlm.errors import TrainingError
from hydra_vlm.files import whole_folder, write_json
from hydra_vlm.moving.phases import require_evidence
from hydra_vlm.moving.plan import plan_of
from hydra_vlm.pilot.run import require_measurable
from hydra_vlm.processes import by_first
from hydra_vlm.records import TrialRecord
from hydra_vlm.run_folder import RunFolder, owning
from hydra_vlm.schedules import first_ranks
from hydra_vlm.trials import ZERO_SHOT, Say, Study, prepare_study, run_trial, scaling_of

UNIFORM = "uniform"


@dataclass(frozen=True)
class Tuned:
    """What `tune` found: the run folder, the trial of the lowest validation loss, all trials by name and seed."""

    folder: RunFolder
    best: TrialRecord
    trials: tuple[TrialRecord, ...]

    @property
    def uniform(self) -> TrialRecord | None:
        """Uniform LoRA with the seed of the best, where it was trained."""
        return next((one for one in self.trials if (one.name, one.seed) == (UNIFORM, self.best.seed)), None)

    @property
    def cost(self) -> float | None:
        """Seconds of training the best, its pilot included, over those of uniform LoRA without one."""
        uniform = self.uniform
        if uniform is None or not uniform.training_seconds:
            return None
        steps = uniform.train_losses[-1][0]
        thrown = uniform.pilot.thrown_away if uniform.pilot else 0
        return self.best.training_seconds / (uniform.training_seconds * steps / (steps + thrown))

    def summary(self) -> str:
        """A few lines: which adapter is best, and what it is measured against."""
        lines = [f"best: {self.best.summary()}", f"adapter: {self.folder.path / 'best' / 'adapter'}"]
        uniform = self.uniform
        if uniform is not None and uniform is not self.best:
            change = self.best.validation_loss / uniform.validation_loss - 1
            lines.append(f"uniform LoRA, tuned alike: validation loss {uniform.validation_loss:.4f} ({change:+.1%})")
        if self.cost is not None:
            lines.append(f"cost: {self.cost:.2f} uniform runs")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """`best` and `uniform`, each with what it is and what it took, and `cost_in_uniform_runs`."""
        uniform = self.uniform
        return {
            "best": _told(self.best, self.folder.path / "best" / "adapter"),
            "uniform": _told(uniform, self.folder.trial(uniform.key) / "adapter") if uniform else None,
            "cost_in_uniform_runs": self.cost,
        }


def tune(config: Config, out: Path, say: Say = print) -> Tuned:
    """Train what `config` asks for with every seed; the best adapter is then in `best/adapter` of the run folder.

    Raises:
        HydraError: before anything is trained where the configuration is at fault; no loss is a number.
    """
    with owning(out, say):
        study = prepare_study(config, out, say)
        _require_evidence(study)
        if config.evaluation.zero_shot and study.tasks:
            run_trial(study, ZERO_SHOT, None, 0, say)
        found = [record for seed in config.seeds for record in _trials(study, seed, say)]
        best = best_of(found)
        by_first(lambda: _keep_best(study, best))
        tuned = Tuned(study.folder, best, tuple(found))
        by_first(lambda: write_json(study.folder.path / "tune.json", tuned.to_json()))
    return tuned


def best_of(records: Sequence[TrialRecord]) -> TrialRecord:
    """Of the schedule with the lowest mean validation loss over seeds, the trial with the lowest.

    Raises:
        TrainingError: no validation loss is a number.
    """
    by_name: dict[str, list[TrialRecord]] = {}
    for record in records:
        by_name.setdefault(record.name, []).append(record)
    means = {name: fmean(record.validation_loss for record in found) for name, found in by_name.items()}
    sound = {name: mean for name, mean in means.items() if math.isfinite(mean)}
    if not sound:
        raise TrainingError("no validation loss is a number, so nothing tells which adapter is best: look at the data")
    return min(by_name[min(sound, key=sound.__getitem__)], key=lambda record: record.validation_loss)


def _require_evidence(study: Study) -> None:
    """Raises ConfigError where pilot or decider would find nothing to go by."""
    settings, validated = study.config.training, bool(study.data.validation)
    if settings.pilot:
        require_measurable(validated)
    steps = settings.total_steps(len(study.data.train))
    plan = plan_of(study.graph, study.budget, scaling_of(study.config), settings, steps)
    require_evidence(plan, settings, validated)


def _trials(study: Study, seed: int, say: Say) -> list[TrialRecord]:
    """The run whose ranks move, where they do, and uniform LoRA beside it."""
    config = study.config
    found = []
    if config.training.ranks != "fixed":
        ranks = config.training.ranks
        found.append(run_trial(study, ranks, first_ranks(study), seed, say, moving=True, pilot=config.training.pilot))
    if config.baseline or not found:
        request = AllocationRequest(study.graph, study.budget, scaling=scaling_of(config))
        uniform = allocate(UNIFORM, request)
        found.append(run_trial(study, UNIFORM, uniform, seed, say, pilot=config.training.pilot))
    return found


def _keep_best(study: Study, best: TrialRecord) -> None:
    """The best adapter and its record in a place of their own; of an earlier session's, another takes the place."""
    shutil.rmtree(study.folder.path / "best", ignore_errors=True)
    with whole_folder(study.folder.path / "best") as draft:
        shutil.copytree(study.folder.trial(best.key) / "adapter", draft / "adapter")
        write_json(draft / "record.json", best.to_json())


def _told(record: TrialRecord, adapter: Path) -> dict[str, Any]:
    schedule = record.schedule
    assert schedule is not None
    return {
        "name": record.name,
        "seed": record.seed,
        "adapter": str(adapter),
        "parameters": schedule.parameters,
        "budget": schedule.budget,
        "most_trainable": record.most_trainable,
        "learning_rates": dict(record.learning_rates),
        "validation_loss": record.validation_loss,
        "scores": {score.benchmark: score.value for score in record.scores},
        "seconds": record.seconds,
    }

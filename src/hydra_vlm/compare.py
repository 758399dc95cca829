"""Schedules side by side: measure, allocate, fine-tune each under the same budget, score, compare, report.

Every step leaves a file in the run folder and is skipped when its file is there; a training that was stopped goes on
from its last checkpoint. Killed at any moment and started again with the same command, a run ends with the same result:
to the bit on the same machine with the same number of threads, elsewhere but for the order of sums.
"""

from pathlib import Path

from hydra_vlm.allocation import STAGED, require_stages
from hydra_vlm.config import Config
from hydra_vlm.measuring import measure
from hydra_vlm.run_folder import RunFolder, owning
from hydra_vlm.schedules import allocate_all, needed_kinds
from hydra_vlm.trials import MOVING, ZERO_SHOT, Say, prepare_study, run_trial


def compare(config: Config, out: Path, say: Say = print) -> RunFolder:
    """Train every schedule that `config` names, with every seed; return the run folder, of which the report is made."""
    with owning(out, say):
        study = prepare_study(config, out, say)
        if STAGED & set(config.schedules):
            require_stages(study.graph, study.budget, config.allocation.n_stages)
        measured = measure(study, [config.profile.signal, *needed_kinds(study)], say)
        schedules = allocate_all(study, measured, say)
        if config.evaluation.zero_shot and study.tasks:
            run_trial(study, ZERO_SHOT, None, 0, say)
        for seed in config.seeds:
            for name in config.schedules:
                run_trial(study, name, schedules.get(name), seed, say, moving=name == MOVING)
    return study.folder

"""Measuring signals of a study's model: one short run with uniform LoRA, shown to a recorder for each kind.

What was measured before is read back from the run folder. The gradient-norm profile is `profile.json`, as it holds more
than its signal; any other kind is `signals/<kind>.json`.
"""

import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import cast

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.files import read_value, write_json
from hydra_vlm.interruption import Interrupted
from hydra_vlm.models.audit import adaptation_summary
from hydra_vlm.processes import by_first
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.signals import GRADIENT_NORM, Signal
from hydra_vlm.training.recipe import adapting, finetune
from hydra_vlm.training.recording import Recorder, Recording, recorder_of
from hydra_vlm.training.sharding import require_gradients
from hydra_vlm.training.signals import gradient_norm
from hydra_vlm.trials import Say, Study, scaling_of

Measured = GradientNormProfile | Signal


def measure_profile(study: Study, say: Say = print) -> GradientNormProfile:
    """The gradient-norm profile of a short uniform LoRA run (Eq. 1), read back if it was measured before."""
    return cast(GradientNormProfile, measure(study, [GRADIENT_NORM], say)[GRADIENT_NORM])


def measure(study: Study, kinds: Iterable[str], say: Say = print) -> dict[str, Measured]:
    """What was measured of each kind, by kind; what is missing is measured in one run.

    Raises:
        HydraError: a stored file is damaged or of another model, the run's own faults, too few steps.
        Interrupted: a signal came; the run begins anew next time.
    """
    found = {kind: by_first(lambda kind=kind: _read(study, kind)) for kind in dict.fromkeys(kinds)}  # type: ignore[misc]
    for measured in found.values():
        if measured is not None:
            require_same_graph(measured, study.graph)
    missing = [kind for kind, measured in found.items() if measured is None]
    if missing:
        found |= _run(study, missing, say)
    return {kind: measured for kind, measured in found.items() if measured is not None}


def _read(study: Study, kind: str) -> Measured | None:
    stored = study.folder.signal(kind)
    if not stored.is_file():
        return None
    advice = "remove it, and it is measured again"
    if kind == GRADIENT_NORM:
        return read_value(stored, GradientNormProfile.from_json, advice)
    return read_value(stored, Signal.from_json, advice)


def _run(study: Study, kinds: list[str], say: Say) -> dict[str, Measured]:
    require_gradients()
    settings, parts = study.config.profile, study.base.parts
    rank = settings.rank or study.budget.rank
    of = f" of {', '.join(kinds)}" if kinds != [GRADIENT_NORM] else ""
    say(f"profile{of}: uniform LoRA of rank {rank} for {settings.steps} steps")
    # A run of some steps does not repay compilation, which would not look at hooks either.
    short = {"steps": settings.steps, "save_steps": 10**9, "trackers": (), "keep": "last", "patience": None}
    training = study.config.training.model_copy(update={**short, "compile": False})
    scratch = study.folder.path / "profile-run"
    unvalidated = replace(study.data, validation=None)
    by_first(lambda: shutil.rmtree(scratch, ignore_errors=True))
    with adapting(study.base, _uniform(study, rank), training, settings.seed) as model:
        say(adaptation_summary(model, parts))
        recorders = {kind: recorder_of(kind, model, parts) for kind in kinds}
        try:
            with Recording(list(recorders.values())) as recording:
                finetune(
                    model,
                    study.base,
                    unvalidated,
                    training,
                    settings.seed,
                    scratch,
                    [recording],
                    estimate=study.estimate("profile"),
                )
        except Interrupted as stop:
            raise Interrupted(stop.number, "the same command measures the profile anew") from None
        measured = {kind: _end(recorder, settings.skip, say) for kind, recorder in recorders.items()}
    study.require_unchanged(scratch)
    by_first(lambda: _keep(study, measured, scratch))
    return measured


def _uniform(study: Study, rank: int) -> RankSchedule:
    budget = Budget.of_rank(study.graph, rank)
    return allocate("uniform", AllocationRequest(study.graph, budget, scaling=scaling_of(study.config)))


def _end(recorder: Recorder, skip: int, say: Say) -> Measured:
    if isinstance(recorder, gradient_norm.Recorder):
        return recorder.profile(skip, say)
    return recorder.signal(skip, say)


def _keep(study: Study, measured: dict[str, Measured], scratch: Path) -> None:
    shutil.rmtree(scratch)
    for kind, value in measured.items():
        write_json(study.folder.signal(kind), value.to_json())

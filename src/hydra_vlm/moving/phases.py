"""A training whose ranks move: phases of one schedule each, and between them a decision.

A phase ends with a checkpoint. The decision is made of it and of what forward passes tell; then the checkpoint is made
anew at the decided ranks, and the next phase goes on from there. Everything is in files before the next step is taken,
so a run that is killed at any moment goes on as an undisturbed one: `ranks.json` has the decisions, `phase-<n>/` the
checkpoints after n of them.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from peft import PeftModel

from hydra_vlm.allocation import AllocationRequest
from hydra_vlm.config import TrainingConfig, steps_without_a
from hydra_vlm.data.records import sample_numbers
from hydra_vlm.errors import ConfigError
from hydra_vlm.faults import disk_full_told
from hydra_vlm.files import read_value, write_json
from hydra_vlm.moving.deciding import DECIDERS, Evidence
from hydra_vlm.moving.plan import Move, Plan, Point
from hydra_vlm.moving.resized import resize_all, write_resized
from hydra_vlm.moving.wide import cut_by, spectra
from hydra_vlm.processes import by_first
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.training.checkpoints import last_whole_checkpoint
from hydra_vlm.training.job import Job, Say
from hydra_vlm.training.legs import Leg
from hydra_vlm.training.measuring import measuring
from hydra_vlm.training.norms_so_far import NormsSoFar
from hydra_vlm.training.rates import Rates
from hydra_vlm.training.recipe import Finetuned, adapting

MOVES = "ranks.json"
LOOKED_AT = 256
"""Records of the training set whose inputs make the metric."""

SLICE = 128
"""Records of the validation set on which probes and the losses on both sides of a move are taken."""


@contextmanager
def trained_moving(
    job: Job, plan: Plan, request: AllocationRequest, say: Say
) -> Iterator[tuple[Finetuned, RankSchedule, tuple[Move, ...]]]:
    """The trained model while the block lasts, the schedule that it ended with, and the decisions on the way.

    `request` says of what the deciders make schedules; budget and gradient norms come from the run.

    Raises:
        HydraError: as `finetune` does; ranks that move under DeepSpeed, or without validation data where the decider
            probes.
    """
    require_evidence(plan, job.settings, validated=bool(job.data.validation))
    moves = by_first(lambda: _moves_so_far(job.folder))
    while len(moves) < len(plan.points):
        move = _phase(job, plan, moves, request)
        say(move.summary())
        moves = (*moves, move)
        by_first(partial(_keep, moves, job.folder))
    schedule = moves[-1].after if moves else plan.wide
    with adapting(job.loaded, schedule, job.settings, job.seed) as opened:
        folder = phase_folder(job.folder, len(moves)) if plan.points else job.folder
        done = job.finetune(opened, folder, _leg(job, plan, len(moves)))
        yield done, schedule, moves


def _phase(job: Job, plan: Plan, moves: tuple[Move, ...], request: AllocationRequest) -> Move:
    """Train up to the next point and decide there."""
    number, schedule = len(moves), moves[-1].after if moves else plan.wide
    point, folder = plan.points[number], phase_folder(job.folder, number)
    with adapting(job.loaded, schedule, job.settings, job.seed) as opened:
        norms = NormsSoFar(opened, job.loaded.parts)
        job.finetune(opened, folder, _leg(job, plan, number), norms)
        evidence = replace(request, budget=point.budget, profile=norms.so_far())
        return by_first(lambda: _move(job, opened, schedule, point, evidence, folder))


def require_evidence(plan: Plan, settings: TrainingConfig, validated: bool) -> None:
    """Raises ConfigError where a decider would find nothing to decide by."""
    if plan.points and settings.decide == "phi" and not validated:
        raise ConfigError(
            "training.decide=phi probes schedules on the validation data, and there is none: name a file as "
            "data.validation, or choose uniform, spectral or hydra"
        )
    blind = steps_without_a(settings.warmup_ratio)
    if plan.points and settings.decide == "hydra" and plan.points[0].step <= blind:
        raise ConfigError(
            f"training.decide=hydra reads gradient norms, and in the first {blind} steps LoRA's A has none, while the "
            f"first decision comes after step {plan.points[0].step}: train for more steps, or choose another decider"
        )


def _leg(job: Job, plan: Plan, number: int) -> Leg:
    restarted = number > 0 and job.settings.moments == "restart"
    return Leg(
        until=plan.points[number].step if number < len(plan.points) else None,
        ramp_from=plan.points[number - 1].step if restarted else None,
        validates=number == len(plan.points),
    )


def first_folder(job: Job, plan: Plan) -> Path:
    """Where the first checkpoints of a job lie."""
    return phase_folder(job.folder, 0) if plan.points else job.folder


def phase_folder(folder: Path, number: int) -> Path:
    """Where checkpoints after so many decisions lie."""
    return folder / f"phase-{number}"


def _moves_so_far(folder: Path) -> tuple[Move, ...]:
    """Those of an earlier session that left a checkpoint from which the next phase goes on."""
    stored = folder / MOVES
    if not stored.is_file():
        return ()
    moves = read_value(stored, lambda data: tuple(Move.from_json(move) for move in data), "remove this trial's folder")
    while moves and last_whole_checkpoint(phase_folder(folder, len(moves))) is None:
        moves = moves[:-1]
    return moves


def _keep(moves: Sequence[Move], folder: Path) -> None:
    """Write the decisions; the checkpoints of the phase before the last one are needed no more."""
    write_json(folder / MOVES, [move.to_json() for move in moves])
    for number in range(len(moves) - 1):
        shutil.rmtree(phase_folder(folder, number), ignore_errors=True)


def _move(
    job: Job, model: PeftModel, before: RankSchedule, point: Point, request: AllocationRequest, folder: Path
) -> Move:
    """Decide at a point, and make the next phase's checkpoint. Done by one process."""
    started, parts, settings = time.monotonic(), job.loaded.parts, job.settings
    train, validation = job.data.train, job.data.validation
    with measuring(model, parts, job.data.reader, settings) as measure:
        metrics = measure.moments(parts, train, sample_numbers(len(train), LOOKED_AT))
        found = spectra(model, parts, metrics)
        with cut_by(model, parts, metrics) as cut:

            def loss(schedule: RankSchedule) -> float:
                if validation is None:
                    return math.nan
                cut(schedule)
                return measure.loss(validation, sample_numbers(len(validation), SLICE))

            evidence = Evidence(request, found, seed=job.seed)
            decision = DECIDERS[settings.decide](evidence, loss)
            losses = loss(before), loss(decision.schedule)
    checkpoint = last_whole_checkpoint(folder)
    assert checkpoint is not None  # of the leg just done
    made = resize_all(model, parts, decision.schedule, metrics, job.seed)
    following = phase_folder(job.folder, int(folder.name.rpartition("-")[2]) + 1)
    with disk_full_told(following, lambda: "The last checkpoint is kept."):
        write_resized(Path(checkpoint), following, model, parts, Rates.of(settings), made, settings.moments)
    return Move(
        step=point.step,
        decider=settings.decide,
        before=before.ranks,
        after=decision.schedule,
        loss_before=losses[0],
        loss_after=losses[1],
        spectra=tuple(tuple(float(f"{value:.4g}") for value in values) for values in found),
        probed=decision.probed,
        passes=measure.passes,
        seconds=time.monotonic() - started,
    )

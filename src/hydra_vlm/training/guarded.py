"""One training run among the faults of its machine: signals, memory, disk, damaged checkpoints."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra_vlm.config import BEST, TrainingConfig
from hydra_vlm.errors import CheckpointError, DataError, HydraError
from hydra_vlm.faults import disk_full_told, first_line, is_disk_full, is_out_of_memory, out_of_memory_told
from hydra_vlm.interruption import Interrupted, held_back
from hydra_vlm.processes import by_first
from hydra_vlm.streams import say
from hydra_vlm.training.checkpoints import kept, last_whole_checkpoint
from hydra_vlm.training.interrupting import StopOnRequest
from hydra_vlm.training.sharding import require_resumable

Estimate = Callable[[], str]
"""A sentence on how much memory the run was expected to take."""

UNFIT = (RuntimeError, ValueError, KeyError, TypeError, AttributeError, OSError)
"""What libraries raise that are given a checkpoint of something else, before the first step."""

IN_WORKER = "Caught "  # how torch begins the message of an error that a loading process had


def train_guarded(trainer: Any, folder: Path, settings: TrainingConfig, estimate: Estimate = str) -> None:
    """Train from the last whole checkpoint in `folder`.

    `estimate` is asked for a sentence when memory runs out.

    Raises:
        OutOfMemoryError, DiskFullError, CheckpointError, DataError: with what is kept and what to do.
        Interrupted: after a checkpoint at the end of the step in which a signal came.
    """
    whole = require_resumable(by_first(lambda: last_whole_checkpoint(folder, say, settings.keep == BEST)))

    def doing() -> str:
        return f"in optimizer step {trainer.state.global_step + 1}"

    def remedy() -> str:
        return " ".join(filter(None, [doing().capitalize() + ".", estimate(), what_to_lower(trainer, settings)]))

    with held_back() as request:
        stopping = StopOnRequest(request)
        trainer.add_callback(stopping)
        with (
            out_of_memory_told("training", remedy, lambda: kept(folder)),
            disk_full_told(folder, lambda: kept(folder)),
        ):
            try:
                trainer.train(resume_from_checkpoint=whole)
            except pickle.UnpicklingError as problem:
                raise CheckpointError(
                    f"{whole} holds something else than tensors and is not read, since reading it could run foreign "
                    f"code ({first_line(problem)}): remove it, and the run starts anew"
                ) from None
            except HydraError as problem:
                raise _own_words(problem) from None
            except UNFIT as problem:
                if whole is None or stopping.began or is_out_of_memory(problem) or is_disk_full(problem):
                    raise
                raise CheckpointError(
                    f"{whole} does not fit this run ({type(problem).__name__}: {first_line(problem)}): it was written "
                    "with another model, schedule or version. Remove it, and the run starts anew"
                ) from None
    if request.number is not None:
        raise Interrupted(request.number, f"{kept(folder)} The same command goes on from there.")


def what_to_lower(trainer: Any, settings: TrainingConfig) -> str:
    """What makes a step smaller and leaves its result alone, as keys of the configuration."""
    on_one, accumulation = trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps
    together = on_one * accumulation
    smaller = max((n for n in range(1, on_one // 2 + 1) if together % n == 0), default=None)
    if smaller is None:
        return (
            "One record at a time is on a device already: set training.gradient_checkpointing=true, shorten "
            "data.max_length, choose dtype=bfloat16, or a device with more memory."
        )
    return (
        f"Lower training.device_batch_size, now {on_one} (x {accumulation} accumulation): with "
        f"training.device_batch_size={smaller} the same command goes on with the same global batch of "
        f"{settings.batch_size}."
    )


def _own_words(problem: HydraError) -> HydraError:
    """An error of a loading process without torch's report of where it was caught."""
    text = str(problem)
    if not text.startswith(IN_WORKER):
        return problem
    own = [line for line in text.splitlines() if "Error: " in line]
    return DataError(own[-1].partition("Error: ")[2] if own else text)

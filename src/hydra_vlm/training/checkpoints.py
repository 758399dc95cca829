"""Which checkpoint a stopped run goes on from, and how one comes whole onto the disk.

A checkpoint is whole when every file of it reads to its end: the Trainer writes `trainer_state.json` after weights,
optimizer, schedule and random states, but after a power cut the last file may be there and an earlier one torn.
Nothing is unpickled to find out: the archives' own checksums are compared. What the state says is checked as well: the
Trainer takes any number for the step.
"""

import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import TrainerState

from hydra_vlm.errors import DiskFullError, HydraError
from hydra_vlm.faults import disk_full_told
from hydra_vlm.models.weights import read_header
from hydra_vlm.reading import read_json

LAST_WRITTEN = "trainer_state.json"
ARCHIVES = (".pt", ".pth", ".bin")  # of torch.save: zip archives with checksums
NEEDED = (  # each by one of these names; global_step<k> holds the first three under DeepSpeed
    ("*.safetensors", "pytorch_model*", "global_step*"),
    ("optimizer*", "global_step*"),
    ("scheduler.pt", "global_step*"),
    ("rng_state*.pth",),
)


UNLOGGED = "unlogged_losses"
"""In a state, among those of callbacks: the sum of the losses that were not logged yet, and since which step."""

EVALUATED = ("eval_loss", "eval_nonfinite")
"""What an entry of the history has where a validation loss was taken: the loss, or that it is no number."""

Losses = tuple[tuple[int, float], ...]
"""Optimizer steps and the losses after them."""


def last_whole_checkpoint(
    folder: Path, say: Callable[[str], None] = lambda line: None, keeps_best: bool = False
) -> str | None:
    """The newest checkpoint whose files are whole, or None; damaged ones are removed, and `say` is told.

    `keeps_best`: the best weights until then belong to a checkpoint (`training.best`).
    """
    steps = checkpoints(folder)
    for step in sorted(steps, reverse=True):
        damage = damage_of(steps[step], keeps_best)
        if damage is None:
            return str(steps[step])
        say(f"checkpoint of step {step} is damaged ({damage}): removed; the one before it is used, if there is one")
        shutil.rmtree(steps[step], ignore_errors=True)
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """Every checkpoint folder by its step, whole or not."""
    found = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match[1]): path for match, path in found if match}


def damage_of(checkpoint: Path, keeps_best: bool = False) -> str | None:
    """What is wrong with a checkpoint's files; None where all of them are there and read to their ends."""
    try:
        state = read_json(checkpoint / LAST_WRITTEN)
    except (OSError, ValueError):
        return f"{LAST_WRITTEN} is missing or cut off"
    if not _is_sound(state, int(checkpoint.name.rpartition("-")[2])):
        return f"{LAST_WRITTEN} does not say what one of this step does"
    for names in NEEDED:
        if not any(any(checkpoint.glob(name)) for name in names):
            return f"{names[0]} is missing"
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if not _reads(path):
            return f"{path.name} does not read"
    best = best_step(validation_losses(state["log_history"])) if keeps_best else None
    if best is not None and not _reads(best_weights(checkpoint.parent, best)):
        return f"{best_weights(checkpoint.parent, best).name}, the best weights until then, does not read"
    return None


def _is_sound(state: Any, step: int) -> bool:
    """Whether a state is one that the Trainer would have written after `step` steps."""
    try:
        TrainerState(**state)
        history, unlogged = state["log_history"], state["stateful_callbacks"].get(UNLOGGED)
        counts = [entry["step"] for entry in history]
        numbers = [state["epoch"], *(value for _, value in validation_losses(history))]
        if unlogged is not None:
            counts.append(unlogged["since"])
            numbers.append(unlogged["sum"])
        counted = all(type(count) is int and 0 <= count <= step for count in counts)
        return state["global_step"] == step and counted and all(isinstance(number, int | float) for number in numbers)
    except (TypeError, KeyError, AttributeError):
        return False


def history_of(checkpoint: Path) -> list[dict[str, Any]]:
    """What was logged until then; nothing where the state does not read."""
    try:
        return list(read_json(checkpoint / LAST_WRITTEN)["log_history"])
    except (OSError, ValueError, TypeError, KeyError):
        return []


def validation_losses(history: Iterable[Mapping[str, Any]]) -> Losses:
    """Those in a Trainer's history, nan where one is no number."""
    found = (entry for entry in history if any(name in entry for name in EVALUATED))
    return tuple((entry["step"], entry.get("eval_loss", math.nan)) for entry in found)


def best_step(losses: Losses) -> int | None:
    """The first step of the lowest loss; None where none is a number."""
    known = [(loss, step) for step, loss in losses if math.isfinite(loss)]
    return min(known)[1] if known else None


def best_weights(folder: Path, step: int) -> Path:
    """Where the weights after `step` lie while they are the best."""
    return folder / f"best-{step}.safetensors"


def _reads(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            read_header(path)
            with safe_open(path, framework="pt") as opened:  # which compares the header with the file's size
                opened.keys()
                return True
        if path.suffix in ARCHIVES:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
    except (OSError, HydraError, SafetensorError, zipfile.BadZipFile, EOFError, ValueError):
        return False
    return True


def write_whole(folder: Path, step: int, write: Callable[[], None], estimate: int) -> None:
    """Let a checkpoint be written into `folder` and forced onto the disk; one that cannot be is removed.

    `estimate` is a checkpoint's size in bytes where there is no earlier one to tell.

    Raises:
        DiskFullError: there is no room; earlier checkpoints are as they were.
    """
    mine = folder / f"checkpoint-{step}"
    known = [_size(path) for number, path in checkpoints(folder).items() if number != step]
    try:
        with disk_full_told(mine, lambda: _kept(folder, step), needed=max(known, default=estimate)):
            write()
            for path in [*mine.rglob("*"), mine]:
                _force(path)
    except DiskFullError:
        shutil.rmtree(mine, ignore_errors=True)
        raise


def kept(folder: Path) -> str:
    """Which work survives, in words."""
    return _kept(folder, None)


def _kept(folder: Path, but: int | None) -> str:
    steps = [step for step in checkpoints(folder) if step != but]
    return f"The checkpoint of step {max(steps)} is kept." if steps else "There is no checkpoint yet."


def _size(checkpoint: Path) -> int:
    return sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())


def _force(path: Path) -> None:
    with suppress(OSError):  # some file systems force no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

"""TensorBoard, Weights & Biases and trackio through the Trainer's own integrations: names, places, and an end."""

import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.integrations import TensorBoardCallback

from hydra_vlm.errors import ConfigError

PROJECT = "hydra-vlm"


def require_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker whose package is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.trackers names {name}, which is not installed: pip install {name}, or "
                f"'hydra-vlm[trackers]' for all of them"
            )


def report_arguments(names: Sequence[str], folder: Path) -> dict[str, Any]:
    """The Trainer's arguments for these trackers; a run goes by the names of run folder and trial."""
    return {"report_to": list(names) or "none", "run_name": run_name(folder), "project": PROJECT}


def run_name(folder: Path) -> str:
    """run/trial for the folder run/trials/trial, its own name for any other."""
    folder = folder.absolute()
    return f"{folder.parents[1].name}/{folder.name}" if folder.parent.name == "trials" else folder.name


@contextmanager
def tracked(trainer: Any, names: Sequence[str], folder: Path) -> Iterator[None]:
    """While the block lasts the trackers write, TensorBoard and wandb into `folder`; then each of them is closed.

    Of several processes the first alone is heard. A resumed run goes on in the same run of wandb, by its folder.
    """
    first = trainer.is_world_process_zero()
    if "tensorboard" in names:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")
    if "wandb" in names and first:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        known = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        wandb.init(project=PROJECT, name=run_name(folder), dir=folder, id=known, resume="allow")
    try:
        yield
    finally:
        if first:
            _close(trainer, names)


def _close(trainer: Any, names: Sequence[str]) -> None:
    """What the integrations open again for a validation loss after the training stays open otherwise."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.on_train_end(trainer.args, trainer.state, trainer.control)
    if "wandb" in names:
        import wandb

        wandb.finish()
    if "trackio" in names:
        import trackio

        trackio.finish()

"""How a tiny run is struck in tests: a place to run in, and faults that come at a chosen moment."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hydra_vlm import trials
from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.errors import HydraError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.records import TrialRecord
from hydra_vlm.training.trainer import VLMTrainer
from tiny import toy_config

OPTIONS = ("training.steps=5", "training.save_steps=2", "training.batch_size=4", "evaluation.batch_size=4")


@dataclass
class Place:
    """One run folder of a tiny model, and what it takes to run and strike it."""

    model: Path
    toy: Path
    path: Path
    patch: pytest.MonkeyPatch
    given: Any = None

    @property
    def run(self) -> Path:
        return self.path / "run"

    @property
    def trial(self) -> Path:
        return self.run / "trials/it-seed0"

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.trial / "checkpoints").glob("checkpoint-*"))

    def train(self, *overrides: str, say: trials.Say | None = None) -> TrialRecord:
        """One trial of uniform LoRA, from wherever the folder has got to."""
        config = toy_config(self.model, self.toy, *OPTIONS, *overrides)
        study = trials.prepare_study(config, self.run, say or quiet)
        schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
        return trials.run_trial(study, "it", schedule, 0, quiet)

    def message(self, *overrides: str) -> str:
        """What the user is told when the trial ends early."""
        return told(lambda: self.train(*overrides))

    def said(self, *overrides: str) -> str:
        """What is said before a trial that goes well."""
        lines: list[str] = []
        self.train(*overrides, say=lines.append)
        return "\n".join(lines)

    def at_step(self, step: int, act: Callable[[VLMTrainer], None]) -> None:
        """Do something at the start of optimizer step `step`, once."""
        real, done = VLMTrainer.training_step, []

        def acting(trainer: VLMTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            if trainer.state.global_step + 1 == step and not done:
                done.append(step)
                act(trainer)
            return real(trainer, *args, **kwargs)

        self.patch.setattr(VLMTrainer, "training_step", acting)

    def spoil_loss(self, steps: set[int], value: float) -> None:
        """The loss of these optimizer steps is multiplied by `value`, so that its gradient is no number either."""
        real = VLMTrainer.compute_loss

        def spoilt(trainer: VLMTrainer, *args: Any, **kwargs: Any) -> Any:
            loss = real(trainer, *args, **kwargs)
            here = trainer.model.training and trainer.state.global_step + 1 in steps
            return loss * value if here else loss

        self.patch.setattr(VLMTrainer, "compute_loss", spoilt)

    def recovers(self) -> None:
        """Struck no more, the same command ends."""
        self.patch.undo()
        assert self.train().validation_loss > 0
        assert (self.trial / "adapter/adapter_model.safetensors").is_file()


def start(config: Path, run: Path) -> subprocess.Popen[bytes]:
    """The real `compare` command; what it says is kept beside the run."""
    command = [sys.executable, "-m", "hydra_vlm.cli", "compare", str(config), "--out", str(run)]
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def quiet(_: str) -> None:
    """Say nothing."""


def told(act: Callable[[], Any]) -> str:
    """The message of the error, or of the interruption, that `act` ends with."""
    with pytest.raises((HydraError, Interrupted)) as caught:
        act()
    return str(caught.value)


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def raising(problem: BaseException) -> Callable[[Any], None]:
    def act(_: Any) -> None:
        raise problem

    return act


def killing(number: int) -> Callable[[Any], None]:
    def act(_: Any) -> None:
        signal.raise_signal(number)

    return act


@contextmanager
def own_handlers() -> Iterator[None]:
    """Assert that signals are handled after the block as they were before."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before

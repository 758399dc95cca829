"""Activation spectrum: over how many directions spreads what a projection reads.

The effective rank of its inputs' second moment C, that is exp of the entropy of C's eigenvalues as shares of their sum.
Of layers with more features than `moments.FULL_UP_TO` only C's diagonal is kept, whose entropy is an upper bound: the
number of features that carry the inputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.signals import Signal
from hydra_vlm.training.moments import InputMoments, input_moments
from hydra_vlm.training.recording import Say, effective_rank, require_reached
from hydra_vlm.training.sharding import training_device


class Recorder:
    """Records the second moments of every adapted projection's inputs."""

    enough = False

    def __init__(self, model: PeftModel, parts: ModelParts) -> None:
        self.parts = parts
        self.moments = InputMoments()
        self.steps = 0
        self._device = training_device(model)

    @contextmanager
    def watching(self, model: PeftModel) -> Iterator[None]:
        with input_moments(model, self.parts) as self.moments:
            yield

    def step(self) -> None:
        self.steps += 1

    def signal(self, skip: int, say: Say) -> Signal:
        moments = self.moments.over_processes(self._device)
        values = tuple(_spread(moments[name]) if name in moments else 0.0 for name in self.parts.names())
        require_reached("activation spectrum", values, say)
        about = "Effective number of directions in a projection's inputs (of wide ones: of features)."
        return Signal(self.parts.graph, "activation_spectrum", values, self.steps, about)


def _spread(moment: Tensor) -> float:
    exact = moment.cpu().double()
    return effective_rank(exact if exact.dim() == 1 else torch.linalg.eigvalsh(exact))

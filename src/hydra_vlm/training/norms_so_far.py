"""Gradient norms while a training goes on: sums that its checkpoints hold."""

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.training.recording import Recording
from hydra_vlm.training.signals.gradient_norm import Recorder

NORMS = "gradient_norms"
"""In a state, among those of callbacks: sums over the steps so far."""


class NormsSoFar(Recording):
    """Sums of the gradient norms of A and B and of their squares, over all steps in which A had a gradient."""

    def __init__(self, model: PeftModel, parts: ModelParts) -> None:
        self._recorder = Recorder(model, parts)
        super().__init__([self._recorder])
        self.parts = parts
        self._sum = torch.zeros((len(parts.graph.projections), 2), dtype=torch.float64)
        self._squares = self._sum.clone()
        self._counted = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        stored = state.stateful_callbacks.get(NORMS)
        if stored is not None:
            self._sum, self._squares = (torch.tensor(stored[name], dtype=torch.float64) for name in ("sum", "squares"))
            self._counted = stored["steps"]

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._recorder.norms:  # the trainer records before clipping; without clipping, here
            self.record()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for norms in self._recorder.norms:
            found = norms.double()
            if bool(found.isfinite().all()) and bool((found[:, 0] > 0).any()):
                self._sum += found
                self._squares += found.square()
                self._counted += 1
        self._recorder.norms.clear()
        sums = {"sum": self._sum.tolist(), "squares": self._squares.tolist(), "steps": self._counted}
        state.stateful_callbacks[NORMS] = sums

    def so_far(self) -> GradientNormProfile | None:
        """The profile until now; None where no step had a gradient in A."""
        if not self._counted:
            return None
        mean = self._sum / self._counted
        spread = (self._squares / self._counted - mean.square()).clamp(min=0).sqrt()
        pairs = [tuple((float(a), float(b)) for a, b in values) for values in (mean, spread)]
        return GradientNormProfile(self.parts.graph, pairs[0], pairs[1], self._counted, 0)

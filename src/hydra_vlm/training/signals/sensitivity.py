"""Sensitivity: how much the loss would change if LoRA's weights were zero, to first order: |w · ∂L/∂w|.

The mean over A's entries plus the mean over B's, as AdaLoRA has it (arXiv 2303.10512) but without its smoothing; then
the mean over optimizer steps, gradients taken before clipping.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.errors import TrainingError
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.signals import Signal
from hydra_vlm.training.recording import Say, gradient_of, lora_tensors, require_reached
from hydra_vlm.training.sharding import whole


class Recorder:
    """Records the sensitivity of every adapted projection, step by step: `steps` holds a tensor [projections] each."""

    enough = False

    def __init__(self, model: PeftModel, parts: ModelParts) -> None:
        self.parts = parts
        self.steps: list[Tensor] = []
        self._tensors = list(lora_tensors(model, parts))

    def watching(self, model: PeftModel) -> AbstractContextManager[None]:
        self._tensors = list(lora_tensors(model, self.parts))  # sharding has put others in their place
        return nullcontext()

    @torch.no_grad()
    def step(self) -> None:
        means = [_mean_product(tensor) for pair in self._tensors for tensor in pair]
        self.steps.append(torch.stack(means).view(-1, 2).sum(dim=1).cpu())

    def signal(self, skip: int, say: Say) -> Signal:
        seen = torch.stack(self.steps)[skip:].double()
        kept = seen[seen.isfinite().all(dim=1) & seen.any(dim=1)]  # applied, and B had begun to move
        if not len(kept):
            raise TrainingError(
                f"{len(self.steps)} steps are too few for the sensitivity: after the first {skip}, LoRA's B was zero "
                "in all: raise profile.steps"
            )
        values = tuple(map(float, kept.mean(dim=0)))
        require_reached("sensitivity", values, say)
        about = "Mean |weight x gradient| over the entries of LoRA's A, plus that of B."
        return Signal(self.parts.graph, "sensitivity", values, len(kept), about)


def _mean_product(tensor: Tensor) -> Tensor:
    product = (tensor.detach() * gradient_of(tensor)).abs().sum(dtype=torch.float32)
    summed: Tensor = whole(product)
    return summed / tensor.numel()

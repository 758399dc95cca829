"""The gradient-norm profile (Eq. 1): a callback on a short LoRA run.

At every optimizer step, after accumulation and before clipping, the L2 norm of the gradient of each LoRA tensor.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.errors import GraphMismatchError
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.training.sharding import norms_of


class GradientNormCallback(TrainerCallback):
    """Records the gradient norms of A and B of every adapted projection, step by step.

    `norms` holds one tensor [projections, 2] a step, in the order of `parts.graph.projections`, A before B.
    """

    def __init__(self, model: nn.Module, parts: ModelParts) -> None:
        self.parts = parts
        self._tensors = list(lora_tensors(model, parts))
        self.norms: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tensors = list(lora_tensors(kwargs["model"], self.parts))  # sharding has put others in their place

    def record(self) -> None:
        """Take the norms now; called by the trainer between accumulation and clipping."""
        gradients = [tensor.grad for pair in self._tensors for tensor in pair]
        with torch.no_grad():
            self.norms.append(norms_of(_present(gradient) for gradient in gradients).view(-1, 2).cpu())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if len(self.norms) <= state.global_step:  # the trainer records before clipping; without clipping, here
            self.record()

    def profile(self, skip: int) -> GradientNormProfile:
        """Mean and standard deviation over the steps after the first `skip`.

        B starts at zero, so at step one A has no gradient: `skip` should be at least 1.
        """
        kept = torch.stack(self.norms[skip:])
        kept = kept[kept.isfinite().flatten(1).all(dim=1)]  # without steps that were left out
        spread = kept.std(dim=0, correction=0)
        return GradientNormProfile(
            graph=self.parts.graph,
            mean=tuple((float(a), float(b)) for a, b in kept.mean(dim=0)),
            spread=tuple((float(a), float(b)) for a, b in spread),
            steps=len(kept),
            skipped=skip,
        )


def lora_tensors(model: nn.Module, parts: ModelParts) -> Iterable[tuple[Tensor, Tensor]]:
    """(A, B) of every projection of the graph in its order.

    Raises:
        GraphMismatchError: a projection has no adapter (a profile needs uniform LoRA everywhere).
    """
    parameters = dict(model.named_parameters())
    for projection in parts.graph.projections:
        name = parts.modules[projection.layer, projection.component]
        try:
            yield tuple(parameters[f"base_model.model.{name}.lora_{side}.default.weight"] for side in "AB")  # type: ignore[misc]
        except KeyError:
            raise GraphMismatchError(
                f"{name} has no LoRA adapter: a profile needs uniform LoRA on every projection"
            ) from None


def _present(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise GraphMismatchError("a LoRA tensor received no gradient: is its layer outside of the loss?")
    return gradient

"""The gradient-norm profile (Eq. 1): a callback on a short LoRA run.

At every optimizer step, after accumulation and before clipping, the L2 norm of the gradient of each LoRA tensor.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.errors import GraphMismatchError, TrainingError
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

    def profile(self, skip: int, say: Callable[[str], None] = lambda line: None) -> GradientNormProfile:
        """Mean and standard deviation over the steps after the first `skip`.

        A has no gradient as long as B is zero, which it is until a step with a learning rate above 0 was applied: such
        steps are left out, also for a single projection whose B begins to move later. `say` is told of more than
        `skip` left out, and of projections that a step did not reach.

        Raises:
            TrainingError: no step is left, or none in which some projection's A had a gradient.
        """
        norms = torch.stack(self.norms)[skip:].double()
        norms = norms[norms.isfinite().flatten(1).all(dim=1)]  # without steps that were not applied
        still = (norms[:, :, 0] == 0).all(dim=1)
        kept = norms[~still]
        counted = torch.ones_like(kept, dtype=torch.bool)
        counted[:, :, 0] = (kept[:, :, 0] > 0) | (kept[:, :, 1] == 0)
        steps = counted.sum(dim=0)
        if not len(kept) or not bool(steps.all()):
            raise TrainingError(
                f"{len(self.norms)} steps are too few for a profile: after the first {skip}, LoRA's A had no gradient "
                "in any step of some projection, since its B was zero: raise profile.steps"
            )
        if still.any():
            say(f"profile: {int(still.sum())} more steps left out, in which B was still zero and A had no gradient")
        if (unreached := (kept == 0).all(dim=2)).any():
            say(
                f"profile: {int(unreached.any(dim=1).sum())} of {len(kept)} steps did not reach "
                f"{int(unreached.any(dim=0).sum())} projections (records without an image?): their norm there is 0"
            )
        mean = (kept * counted).sum(dim=0) / steps
        spread = (((kept - mean) ** 2 * counted).sum(dim=0) / steps).sqrt()
        return GradientNormProfile(
            graph=self.parts.graph,
            mean=tuple((float(a), float(b)) for a, b in mean),
            spread=tuple((float(a), float(b)) for a, b in spread),
            steps=len(kept),
            skipped=skip + int(still.sum()),
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

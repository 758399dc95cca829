"""The gradient norm (Eq. 1): of each LoRA tensor the L2 norm of its gradient, the mean of A's and B's.

Taken at every optimizer step of a short LoRA run, after accumulation and before clipping.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.errors import TrainingError
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.signals import Signal
from hydra_vlm.training.recording import Say, gradient_of, lora_tensors
from hydra_vlm.training.sharding import norms_of


class Recorder:
    """Records the gradient norms of A and B of every adapted projection, step by step.

    `norms` holds one tensor [projections, 2] a step, in the order of `parts.graph.projections`, A before B.
    """

    enough = False

    def __init__(self, model: PeftModel, parts: ModelParts) -> None:
        self.parts = parts
        self.norms: list[Tensor] = []
        self._tensors = list(lora_tensors(model, parts))

    def watching(self, model: PeftModel) -> AbstractContextManager[None]:
        self._tensors = list(lora_tensors(model, self.parts))  # sharding has put others in their place
        return nullcontext()

    def step(self) -> None:
        gradients = [gradient_of(tensor) for pair in self._tensors for tensor in pair]
        with torch.no_grad():
            self.norms.append(norms_of(gradients).view(-1, 2).cpu())

    def signal(self, skip: int, say: Say) -> Signal:
        return self.profile(skip, say).signal()

    def profile(self, skip: int, say: Say = lambda line: None) -> GradientNormProfile:
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

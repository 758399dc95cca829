"""Effective rank of the whitened gradient: how many directions of a weight the data wants to change at once.

G = ∂L/∂ΔW is what the weight's own gradient would be, summed over the tokens of a few optimizer steps; whitened by what
the projection reads, its singular values σ are those of G (C + λI)^-½, with C the second moment of the inputs and λ a
hundredth of C's mean diagonal. The number is exp of the entropy of σ² as shares of their sum. It does not depend on the
gradient's size, so neither on LoRA's rank, scale and learning rate nor on the projection's width as such.

It needs as much of the machine's memory as the adapted weights take in float32.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.resizing import RIDGE
from hydra_vlm.signals import Signal
from hydra_vlm.training.moments import InputMoments, input_moments
from hydra_vlm.training.processes import several
from hydra_vlm.training.recording import Say, effective_rank, require_reached
from hydra_vlm.training.sharding import training_device
from hydra_vlm.verification import lora_layers

STEPS = 8
"""Optimizer steps that the gradient is summed over."""


class Recorder:
    """Records every adapted projection's G, on the CPU, and C."""

    def __init__(self, model: PeftModel, parts: ModelParts) -> None:
        self.parts = parts
        self.moments = InputMoments()
        self.gradients: dict[str, Tensor] = {}
        self.steps = 0
        self._device = training_device(model)
        layers = lora_layers(model)
        self._shapes = {name: (layers[name].out_features, layers[name].in_features) for name in parts.names()}

    @property
    def enough(self) -> bool:
        return self.steps >= STEPS

    @contextmanager
    def watching(self, model: PeftModel) -> Iterator[None]:
        with input_moments(model, self.parts) as self.moments, ExitStack() as undo:
            for name, layer in lora_layers(model).items():
                assert isinstance(layer, nn.Module)
                # First of all hooks: others may put the output back among positions that were not computed.
                hook = layer.register_forward_hook(partial(self._after, name), prepend=True)
                undo.callback(hook.remove)
            yield

    def _after(self, name: str, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad and not self.enough:
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._add(name, gradient, x))

    @torch.no_grad()
    def _add(self, name: str, gradient: Tensor, x: Tensor) -> None:
        """Sum over tokens of the output's gradient [..., d_out] times the input [..., d_in]."""
        with torch.autocast(x.device.type, enabled=False):
            summed = (gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()).cpu()
        if bool(summed.isfinite().all()):  # as a step whose loss is no number is left out
            self.gradients[name] = summed.add_(self.gradients[name]) if name in self.gradients else summed

    def step(self) -> None:
        self.steps += 1
        self.moments.counting = not self.enough

    def signal(self, skip: int, say: Say) -> Signal:
        moments = self.moments.over_processes(self._device)
        values = tuple(self._rank(name, moments.get(name)) for name in self.parts.names())
        require_reached("effective rank", values, say)
        about = "Effective rank of the gradient of a projection's weight, whitened by what the projection reads."
        return Signal(self.parts.graph, "effective_rank", values, min(self.steps, STEPS), about)

    def _rank(self, name: str, moment: Tensor | None) -> float:
        gradient = self.gradients.get(name)
        if several():
            gradient = torch.zeros(self._shapes[name]) if gradient is None else gradient
            gradient = gradient.to(self._device)
            distributed.all_reduce(gradient)
        if gradient is None or moment is None:
            return 0.0
        where = self._device if self._device.type == "cuda" else torch.device("cpu")
        return effective_rank(whitened_squares(gradient.to(where).double(), moment.to(where).double()))


def whitened_squares(gradient: Tensor, moment: Tensor) -> Tensor:
    """The squared singular values of G (C + λI)^-½, of G [d_out, d_in] and C as a matrix or its diagonal."""
    if moment.dim() == 1:
        white = gradient * (moment + RIDGE * moment.mean()).rsqrt()
    else:
        ridge = RIDGE * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)
        white = torch.linalg.solve_triangular(torch.linalg.cholesky(moment + ridge), gradient.T, upper=False).T
    gram = white @ white.T if len(white) <= white.shape[1] else white.T @ white
    return torch.linalg.eigvalsh(gram)

"""Second moments of what the adapted layers read: C = mean of x xᵀ over real tokens, by forward hooks.

C is the metric in which an update is shrunk (`hydra_vlm.resizing`) and the spectrum that some signals are made of. The
hooks sit on PEFT's layers, so they see what a layer reads however its forward is computed (fused, packed, in bf16).

What counts: every token but padding, each time a layer reads it. Where only a part of the positions is computed at all
(`training.supervised`, `training.packed`), those are what the layer reads, and no others count.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, distributed, nn

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.training.processes import from_all_processes, several
from hydra_vlm.verification import lora_layers

FULL_UP_TO = 1024
"""Layers of at most so many input features get C as a matrix, wider ones its diagonal alone."""


class InputMoments(Mapping[str, Tensor]):
    """The second moments so far, by module name: [d_in, d_in], or [d_in] of a layer with many features, in float32.

    A layer that has read nothing yet is not among them. With `counting` off, forward passes leave no trace here, as is
    wanted while a run is validated.
    """

    def __init__(self, full_up_to: int = FULL_UP_TO) -> None:
        self.full_up_to = full_up_to
        self.counting = True
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor, Tensor] | None = None  # queries, keys and values read one tensor

    def __getitem__(self, name: str) -> Tensor:
        if not self.tokens(name):
            raise KeyError(name)
        return self._sums[name] / self._tokens[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._sums if self.tokens(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def tokens(self, name: str) -> int:
        """How many tokens a module's moment is the mean of."""
        return int(self._tokens[name]) if name in self._tokens else 0

    def add(self, name: str, x: Tensor, real: Tensor | None = None) -> None:
        """Count what a module reads, `x` [..., d_in]; `real` [...] says which tokens are no padding.

        Numbers that are not finite are left out with their whole forward pass, as such a step is.
        """
        if not self.counting:
            return
        if self._last is None or self._last[0] is not x:
            self._last = (x, *_summed(x, real, self.full_up_to))
        _, summed, tokens = self._last
        if name not in self._sums:
            self._sums[name], self._tokens[name] = summed.clone(), tokens.clone()
        else:
            self._sums[name] += summed
            self._tokens[name] += tokens

    def over_processes(self, device: torch.device) -> dict[str, Tensor]:
        """The moments over all processes' tokens, the same in each; to be called in all of them. `device` is theirs."""
        if not several():
            return dict(self)
        own = {name: tuple(summed.shape) for name, summed in self._sums.items()}
        shapes = {name: shape for found in from_all_processes(own) for name, shape in found.items()}
        moments = {}
        for name in sorted(shapes):  # a process without images has not seen the tower
            summed = self._sums[name].clone() if name in own else torch.zeros(shapes[name], device=device)
            tokens = self._tokens[name].clone() if name in own else torch.zeros((), dtype=torch.long, device=device)
            distributed.all_reduce(summed)
            distributed.all_reduce(tokens)
            if int(tokens):
                moments[name] = summed / tokens
        return moments


@contextmanager
def input_moments(model: PeftModel, parts: ModelParts, full_up_to: int = FULL_UP_TO) -> Iterator[InputMoments]:
    """While the block lasts, the second moments of the adapted modules' inputs, by the modules' names in the base.

    They may be read within the block and after it. Enter it behind `training.speed.sped_up`, whose own hooks decide
    what the last layer reads.
    """
    moments = InputMoments(full_up_to)
    masks: list[Tensor | None] = [None]

    def begin(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        masks[0] = _mask_in(named)

    def refine(_: nn.Module, args: Any, named: dict[str, Any]) -> None:
        masks[0] = _mask_in(named) if _mask_in(named) is not None else masks[0]

    def reading(name: str, in_decoder: bool) -> Any:
        return lambda _, inputs: moments.add(name, inputs[0], masks[0] if in_decoder else None)

    decoder = model.get_base_model().get_submodule(parts.decoder)
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(begin, with_kwargs=True).remove)
        undo.callback(decoder.register_forward_pre_hook(refine, with_kwargs=True).remove)
        for name, layer in lora_layers(model).items():
            assert isinstance(layer, nn.Module)
            in_decoder = name.startswith(f"{parts.layers}.")
            undo.callback(layer.register_forward_pre_hook(reading(name, in_decoder)).remove)
        yield moments
    moments._last = None


def _mask_in(named: Mapping[str, Any]) -> Tensor | None:
    """The padding mask [B, L] among a call's arguments; some decoders get none, or one for each pair of positions."""
    mask = named.get("attention_mask")
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


@torch.no_grad()
def _summed(x: Tensor, real: Tensor | None, full_up_to: int) -> tuple[Tensor, Tensor]:
    """Sum of x xᵀ (or of its diagonal) over tokens, and their number; zeros where it would not be finite."""
    with torch.autocast(x.device.type, enabled=False):
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        tokens = torch.tensor(len(rows), device=x.device)
        if real is not None and real.numel() == len(rows):  # else they were packed or gathered, without padding
            counted = real.flatten().to(x.device) != 0
            rows, tokens = rows.where(counted[:, None], 0), counted.sum()
        summed = rows.T @ rows if x.shape[-1] <= full_up_to else rows.square().sum(dim=0)
        finite = summed.isfinite().all()
        return summed.where(finite, 0), tokens.where(finite, 0)

"""A trained adapter looked at and cut: its updates, their spectra, and what it would be at lower ranks.

In order, an update's directions stand from the one that carries most to the one that carries least, in the metric of
what the layer reads. Then the best update of rank k is that of the first k columns of B, and to try one is to set the
others to zero.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.models.structure import ModelParts
from hydra_vlm.resizing import LowRank, resize, spectrum
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.verification import ADAPTER, lora_layers

Metrics = Mapping[str, Tensor]
"""The second moment of each adapted module's inputs, as `resizing` takes it, by the module's name.

One that read nothing is not among them, and all its inputs count alike."""


def updates(model: PeftModel) -> dict[str, LowRank]:
    """The update of every adapted module by its name; the tensors are the model's own."""
    return {
        name: LowRank(layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data, layer.scaling[ADAPTER])
        for name, layer in lora_layers(model).items()
    }


def spectra(model: PeftModel, parts: ModelParts, metrics: Metrics) -> tuple[tuple[float, ...], ...]:
    """The singular values of each projection's update in its metric; none where it has no LoRA."""
    found = {name: spectrum(update, metrics.get(name)).tolist() for name, update in updates(model).items()}
    return tuple(tuple(found.get(name, ())) for name in parts.names())


@contextmanager
def cut_by(model: PeftModel, parts: ModelParts, metrics: Metrics) -> Iterator[Callable[[RankSchedule], None]]:
    """While the block lasts, the function that is given makes the adapter what it would be at a schedule's ranks.

    The adapter's own tensors stay where they are, and have their own values again afterwards.
    """
    own = updates(model)
    kept = {name: (update.a.clone(), update.b.clone()) for name, update in own.items()}
    ordered = {
        name: resize(update, update.rank, update.scale, metrics.get(name), in_order=True)[0]
        for name, update in own.items()
    }

    def cut(schedule: RankSchedule) -> None:
        for name, rank in zip(parts.names(), schedule.ranks, strict=True):
            if name in own:
                own[name].a.copy_(ordered[name].a)
                own[name].b.copy_(ordered[name].b)
                own[name].b[:, rank:] = 0

    try:
        with torch.no_grad():
            yield cut
    finally:
        with torch.no_grad():
            for name, (a, b) in kept.items():
                own[name].a.copy_(a)
                own[name].b.copy_(b)

"""Recorders watch a short LoRA run and end with a signal; one file a kind in `training/signals/`.

A new kind is one new file there, named as the kind, with a class `Recorder` that does what the protocol says.
"""

import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.errors import GraphMismatchError, TrainingError
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.signals import Signal, require_kind

Say = Callable[[str], None]


class Recorder(Protocol):
    """What measures one kind of signal, of a model with uniform LoRA on every projection of `parts.graph`."""

    def __init__(self, model: PeftModel, parts: ModelParts) -> None: ...

    @property
    def enough(self) -> bool:
        """Whether further steps would change nothing; a run ends when all its recorders have enough."""
        ...

    def watching(self, model: PeftModel) -> AbstractContextManager[Any]:
        """Put on the model, as it is trained, what sees its forward passes while the block lasts."""
        ...

    def step(self) -> None:
        """An optimizer step's gradients are whole: called between accumulation and clipping."""
        ...

    def signal(self, skip: int, say: Say) -> Signal:
        """The signal, whose `values` are in the order of `parts.graph`; every process takes part.

        The first `skip` steps are left out where B's start at zero shows in them. `say` is told what else was.

        Raises:
            TrainingError: too little was seen.
        """
        ...


def recorder_of(kind: str, model: PeftModel, parts: ModelParts) -> Recorder:
    """A new recorder of a kind; raises ConfigError where there is none."""
    module = importlib.import_module(f"hydra_vlm.training.signals.{require_kind(kind)}")
    recorder: Recorder = module.Recorder(model, parts)
    return recorder


class Recording(TrainerCallback):
    """Shows a training run to recorders. As a context manager it leaves nothing on the model behind it."""

    def __init__(self, recorders: Sequence[Recorder]) -> None:
        self.recorders = tuple(recorders)
        self._steps = 0
        self._undo = ExitStack()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def record(self) -> None:
        """Show a step's gradients; called by the trainer between accumulation and clipping."""
        self._steps += 1
        for recorder in self.recorders:
            recorder.step()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for recorder in self.recorders:  # not before: speed-ups and sharding have put other things in their place
            self._undo.enter_context(recorder.watching(kwargs["model"]))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps <= state.global_step:  # the trainer records before clipping; without clipping, here
            self.record()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if all(recorder.enough for recorder in self.recorders):
            control.should_training_stop = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._undo.close()


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


def gradient_of(tensor: Tensor) -> Tensor:
    """A tensor's gradient; raises GraphMismatchError where it has none."""
    if tensor.grad is None:
        raise GraphMismatchError("a LoRA tensor received no gradient: is its layer outside of the loss?")
    return tensor.grad


def effective_rank(squares: Tensor) -> float:
    """exp of the entropy of squared singular values [n], as shares of their sum: 1 where one is all, n where all alike.

    0 where they are all zero.
    """
    squares = squares.clamp(min=0)
    total = squares.sum()
    return float(torch.special.entr(squares / total).sum().exp()) if total > 0 else 0.0


def require_reached(kind: str, values: Sequence[float], say: Say) -> None:
    """Tell of projections that no record reached; raises TrainingError where none was reached."""
    unreached = sum(value == 0 for value in values)
    if unreached == len(values):
        raise TrainingError(f"{kind} was not measured in any projection: are there records that training can use?")
    if unreached:
        say(f"{kind}: {unreached} of {len(values)} projections were not reached (records without an image?): 0 there")

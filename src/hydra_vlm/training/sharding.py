"""Models that FSDP or DeepSpeed take apart for training, and how their pieces come together again.

A copy of the model is taken apart, so that the model itself stays whole: it gets the trained weights at the end, and
answers. Checkpoints hold whole tensors in the files of a training without sharding, so that a run goes on with any
number of processes, sharded or not; DeepSpeed alone writes its own.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hydra_vlm.config import Config
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.loading import LoadedModel, load_model, resolve_device, resolve_dtype
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.processes import count, shards_model, uses_deepspeed

OPTIMIZER = "optimizer.pt"


def training_device(model: nn.Module) -> torch.device:
    """Where this process trains: where the model is, or, if it is taken apart, the process's own device."""
    device: torch.device = PartialState().device if shards_model() else next(model.parameters()).device
    return device


@contextmanager
def on_training_device(model: Any) -> Iterator[None]:
    """The whole model on this process's device while the block lasts, then back where it was."""
    kept = next(model.parameters()).device
    device = training_device(model)
    try:
        if device != kept:
            model.to(device)
        yield
    finally:
        if device != kept:
            model.to(kept)


def to_take_apart(model: nn.Module) -> nn.Module:
    """What is given to the Trainer: the model, or a copy where the launcher asked for sharding."""
    return copy.deepcopy(model) if shards_model() else model


def bring_back(trained: nn.Module, model: nn.Module) -> None:
    """Give `model` the weights that its sharded copy was trained to; every process takes part."""
    if trained is model:
        return
    targets = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        if parameter.requires_grad:
            value = whole(parameter)
            with torch.no_grad():
                targets[name].copy_(value.to(targets[name].device))


def whole(value: Any) -> Any:
    """A tensor put together from the pieces that the processes hold; all of them take part."""
    if isinstance(value, DTensor):
        return value.full_tensor().detach()
    if hasattr(value, "ds_id") or (isinstance(value, nn.Parameter) and uses_deepspeed()):
        from deepspeed.utils import safe_get_full_fp32_param  # not installed where nobody asks for it

        return safe_get_full_fp32_param(value)
    return value.detach() if torch.is_tensor(value) else value


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters by name, whole, on the CPU; every process takes part."""
    return {name: whole(p).cpu() for name, p in model.named_parameters() if p.requires_grad}


def whole_optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's state as it is without sharding; every process takes part."""
    state: dict[str, Any] = optimizer.state_dict()
    pieces: Mapping[Any, Mapping[str, Any]] = state["state"]
    together = {
        number: {name: _on_cpu(whole(value)) for name, value in values.items()} for number, values in pieces.items()
    }
    return {**state, "state": together}


def load_whole_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give a sharded optimizer its part of a state that `whole_optimizer_state` put together."""
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not isinstance(parameter, DTensor):
                continue
            mesh, placements = parameter.device_mesh, parameter.placements
            own = optimizer.state[parameter]
            for name, value in own.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and not isinstance(value, DTensor):
                    own[name] = distribute_tensor(value, mesh, placements, src_data_rank=None)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if torch.is_tensor(value) else value


def norms_of(gradients: Iterable[Tensor]) -> Tensor:
    """The L2 norm of each gradient: [gradients], of shards too. Every process takes part."""
    listed = list(gradients)
    first = listed[0]
    if not isinstance(first, DTensor):
        return torch.stack(torch._foreach_norm(listed)).float()
    squares = torch.stack([g.to_local().float().square().sum() for g in listed])  # type: ignore[attr-defined]
    for dimension, placement in enumerate(first.placements):
        if placement.is_shard():
            distributed.all_reduce(squares, group=first.device_mesh.get_group(dimension))
    return squares.sqrt()


def shard_on_any_device(accelerator: Any) -> bool:
    """Whether FSDP is in use; accelerate leaves it out on CPUs, where it works as well, so it is put in there."""
    if shards_model() and not uses_deepspeed() and accelerator.distributed_type == DistributedType.MULTI_CPU:
        shared = AcceleratorState._shared_state
        shared["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        for state in (shared, PartialState._shared_state):
            state["distributed_type"] = DistributedType.FSDP
    return accelerator.distributed_type == DistributedType.FSDP


def shard_by_decoder_layer(accelerator: Any, model: Any, parts: ModelParts) -> None:
    """Have FSDP gather the decoder layer by layer, and all else at once.

    Tower and projector are not gathered by themselves: where a batch has no image they do not run, and a process that
    waits for the others at a layer which those never reach would wait for ever. For the same reason the first layer's
    input has a gradient with or without an image: FSDP exchanges a layer's gradients when that of its input is made.
    """
    model.enable_input_require_grads()
    layers = dict(model.named_modules())[_name_within(model, parts.layers)]
    plugin = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted({type(layer).__name__ for layer in layers.children()})


def take_apart_again(model: nn.Module) -> None:
    """Give back what a forward pass has gathered: FSDP keeps the outermost parameters whole until a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def untouched(model: nn.Module, parts: ModelParts) -> Tensor | float:
    """Zero, made of the trained parameters that a batch without image does not reach.

    Added to the loss it gives them a gradient in every process, without which processes would wait for each other's.
    """
    return sum((p.sum() * 0.0 for p in _for_images(model, parts)), start=0.0)


class Unreached(TrainerCallback):
    """Takes the gradients of `untouched` away where no process reached those parameters in a whole step.

    An optimizer passes over parameters without gradient, as it does in one process; a gradient of zeros it would follow
    with its momentum.
    """

    def __init__(self, parts: ModelParts) -> None:
        self.parts = parts

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = _for_images(kwargs["model"], self.parts)
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and not float(norms_of(gradients).sum()):
            for parameter in parameters:
                parameter.grad = None


def _for_images(model: nn.Module, parts: ModelParts) -> list[nn.Parameter]:
    """Trained parameters of the tower and the projector."""
    starts = tuple(f"{_name_within(model, part)}." for part in (parts.tower, parts.projector) if part)
    return [p for name, p in model.named_parameters() if p.requires_grad and name.startswith(starts)]


def _name_within(model: nn.Module, name: str) -> str:
    return f"base_model.model.{name}" if hasattr(model, "peft_config") else name


def require_resumable(checkpoint: str | None) -> str | None:
    """The checkpoint itself, if this job can go on from it.

    Raises:
        ConfigError: DeepSpeed wrote it and is not in use now, or was with another number of processes; or the reverse.
    """
    if checkpoint is None:
        return None
    folder = Path(checkpoint)
    if not uses_deepspeed() and not (folder / OPTIMIZER).is_file():
        raise ConfigError(
            f"{checkpoint} has no {OPTIMIZER}, as DeepSpeed's have none: go on with DeepSpeed, or remove the "
            "checkpoint to start anew"
        )
    if uses_deepspeed():
        processes = len(list(folder.glob("rng_state_*.pth"))) or 1
        if (folder / OPTIMIZER).is_file() or processes != count():
            raise ConfigError(
                f"{checkpoint} was written by {processes} process(es), now there are {count()}: DeepSpeed goes on with "
                "its own checkpoints and the same number alone: start it so, or remove the checkpoint"
            )
    return checkpoint


def load_to_take_apart(config: Config) -> LoadedModel:
    """The configuration's model on the CPU, of which devices get their pieces, in the precision that suits them."""
    place = resolve_device(config.device)
    dtype = str(resolve_dtype(config.dtype, place)).removeprefix("torch.")
    attention = "sdpa" if config.attention == "auto" and place.type != "cpu" else config.attention
    return load_model(config.model, "cpu", config.decoder_pattern, config.adapt, dtype, attention=attention)


def require_gradients() -> None:
    """Raises ConfigError under DeepSpeed, which uses gradients up before they can be measured."""
    if uses_deepspeed():
        raise ConfigError(
            "gradient norms cannot be measured under DeepSpeed: run `profile` with the same configuration and --out on "
            "one process, with DDP or with FSDP first; the profile is then read from the run folder"
        )

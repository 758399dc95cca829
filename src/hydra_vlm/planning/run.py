"""From a configuration to its plan: the model's numbers, the data's lengths, the device's memory."""

import os
from dataclasses import replace
from typing import Any

import torch

from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import Config
from hydra_vlm.errors import ConfigError, HydraError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.models.loading import resolve_model
from hydra_vlm.models.processors import load_processor
from hydra_vlm.models.structure import image_token
from hydra_vlm.moving.plan import wide_schedule
from hydra_vlm.planning.advice import Planner, Remedy, remedies
from hydra_vlm.planning.lengths import DataSize, data_size
from hydra_vlm.planning.plan import GIB, Device, Plan, plan_of
from hydra_vlm.planning.reading import Outline, outline, shape_of
from hydra_vlm.schedule import RankSchedule, Scaling


def make_plan(config: Config, gigabytes: float | None = None) -> tuple[Plan, tuple[Remedy, ...]]:
    """The plan of a configuration, and the changes with which it fits where it does not.

    `gigabytes` (GiB) stands for the device's memory; without it that of the device found here.

    Raises:
        ConfigError: the model's folder is not there, or the device is not and no memory is given.
    """
    planner = planner_of(config, _device(config, gigabytes))
    plan = planner(config)
    return plan, remedies(config, plan, planner)


def planner_of(config: Config, device: Device) -> Planner:
    """A function that plans variations of a configuration over the same model and data, which are read once."""
    folder = resolve_model(config.model)
    source = outline(folder, config.decoder_pattern, config.adapt)
    shape = shape_of(source, _uniform(source.parts.graph, config))
    read: dict[int, DataSize] = {}
    processor = _processor(config, source)
    mark = image_token(source.config, source.parts)
    longest = int(getattr(source.config.get_text_config(), "max_position_embeddings", config.data.max_length))

    def plan(changed: Config) -> Plan:
        if changed.data.max_length not in read:
            read[changed.data.max_length] = data_size(changed, processor, longest, mark)
        wide = shape_of(source, _wide(source.parts.graph, changed)) if changed.training.ranks != "fixed" else None
        found = plan_of(changed, shape, read[changed.data.max_length], device, wide=wide)
        return replace(found, notes=source.parts.graph.notes)

    return plan


def estimate(config: Config, phase: str = "training", gigabytes: float | None = None) -> str:
    """What the plan says of a phase's memory, in a sentence for one whose device ran out of it.

    It never raises: where no plan can be made it is empty. `gigabytes` is as `make_plan` takes it.
    """
    try:
        plan = planner_of(config, _device(config, gigabytes))(config)
    except (HydraError, OSError, RuntimeError, ValueError, MemoryError):
        return ""
    told = next((found for found in plan.phases if found.name == phase), plan.peak)
    return (
        f"The plan was {told.memory.total / GIB:.2f} GiB for {told.name} on a device of "
        f"{plan.device.memory / GIB:.2f} GiB (`hydra-vlm plan` says what makes it smaller)."
    )


def _uniform(graph: ComputationGraph, config: Config) -> RankSchedule:
    budget = Budget.asked(graph, config.budget.rank, config.budget.parameters)
    return allocate("uniform", AllocationRequest(graph, budget))


def _wide(graph: ComputationGraph, config: Config) -> RankSchedule:
    budget = Budget.asked(graph, config.budget.rank, config.budget.parameters)
    return wide_schedule(graph, budget, Scaling(), config.training.width)


def _processor(config: Config, source: Outline) -> Any | None:
    try:
        return load_processor(resolve_model(config.model), source.config)
    except ConfigError:
        return None


def _device(config: Config, gigabytes: float | None) -> Device:
    """The device that a configuration names and its memory: a CUDA card's, or the machine's."""
    kind = config.device.partition(":")[0]
    has_cuda = torch.cuda.is_available()
    if kind == "auto":
        kind = "cuda" if has_cuda else "mps" if torch.backends.mps.is_available() else "cpu"
    if gigabytes is not None:
        return Device(kind, int(gigabytes * GIB), "--memory")
    if kind == "cuda":
        if not has_cuda:
            raise ConfigError(f"device {config.device!r} is not here: say with --memory how many GiB it has")
        name = torch.device(config.device if config.device != "auto" else "cuda")
        card = torch.cuda.get_device_properties(name)
        return Device(kind, card.total_memory, card.name)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Device(kind, pages, "this machine's memory")

"""A checkpoint of one schedule becomes a checkpoint of another at the same step, so that training goes on from there.

Weights are resized in the metric of what their layers read, Adam's moments go along or are restarted. All else (random
states, schedule of rates, what was logged) stays; validation losses do not, since they were another adapter's.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from hydra_vlm.errors import ConfigError
from hydra_vlm.files import write_json
from hydra_vlm.lora import fresh_rows, lora_config
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.models.weights import write_tensors
from hydra_vlm.moving.wide import Metrics, updates
from hydra_vlm.reading import read_json
from hydra_vlm.resizing import Coordinates, LowRank, Moments, carry_moments, resize
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.stored_adapter import CONFIG, WEIGHTS, WRAPPED
from hydra_vlm.training.checkpoints import EVALUATED, LAST_WRITTEN
from hydra_vlm.training.legs import RAMP
from hydra_vlm.training.norms_so_far import NORMS
from hydra_vlm.training.rates import Rates, parameter_groups
from hydra_vlm.training.sharding import OPTIMIZER
from hydra_vlm.verification import ADAPTER

Carried = Literal["carry", "restart"]

STEEP = 1e6
"""Where coordinates change by more than this, an update was near zero and its moments are restarted."""

FIRST, SECOND = "exp_avg", "exp_avg_sq"
"""What AdamW's state calls its moments."""


@dataclass(frozen=True)
class Resized:
    """The adapter at the ranks of `schedule`: updates by module, and how they were written anew."""

    schedule: RankSchedule
    updates: Mapping[str, LowRank]
    ways: Mapping[str, Coordinates]


def resize_all(model: PeftModel, parts: ModelParts, schedule: RankSchedule, metrics: Metrics, seed: int) -> Resized:
    """The model's adapter at the schedule's ranks and scales; A's new rows are those that `attach` draws.

    Raises:
        ConfigError: a projection would lose its adapter, or get one.
    """
    now, found, ways = updates(model), {}, {}
    for name, rank in zip(parts.names(), schedule.ranks, strict=True):
        if (name in now) != (rank > 0):
            raise ConfigError(f"{name}: ranks that move stay above 0, {rank} was decided for it")
        if name in now:
            update = now[name]
            fresh = fresh_rows(name, rank, update.a.shape[1], seed)[update.rank :] if rank > update.rank else None
            found[name], ways[name] = resize(update, rank, schedule.scaling.scale(rank), metrics.get(name), fresh)
    return Resized(schedule, found, ways)


def write_resized(
    source: Path, folder: Path, model: PeftModel, parts: ModelParts, rates: Rates, made: Resized, moments: Carried
) -> None:
    """Make of the checkpoint `source` one of the same step in `folder`, which then has no other.

    Raises:
        ConfigError: the checkpoint has no optimizer's state of its own, as DeepSpeed's have none.
    """
    if not (source / OPTIMIZER).is_file():
        raise ConfigError(
            f"{source} has no {OPTIMIZER}, as DeepSpeed's have none: ranks cannot move under DeepSpeed. Use DDP or "
            "FSDP, or training.ranks=fixed"
        )
    draft = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(draft, ignore_errors=True)
    inside = draft / source.name
    shutil.copytree(source, inside, ignore=shutil.ignore_patterns(CONFIG, WEIGHTS, OPTIMIZER, LAST_WRITTEN))
    lora_config(made.schedule, parts).save_pretrained(str(inside))
    tensors: dict[str, Tensor] = {}
    for name, update in made.updates.items():
        tensors[f"{WRAPPED}{name}.lora_A.weight"] = update.a.cpu().contiguous()
        tensors[f"{WRAPPED}{name}.lora_B.weight"] = update.b.cpu().contiguous()
    write_tensors(inside / WEIGHTS, tensors)
    state = torch.load(source / OPTIMIZER, map_location="cpu", weights_only=True)
    numbers = _numbers(model, parts, rates)
    torch.save(_moved(state, numbers, made.ways, moments == "carry"), inside / OPTIMIZER)
    _write_state(source / LAST_WRITTEN, inside / LAST_WRITTEN)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)


def _numbers(model: PeftModel, parts: ModelParts, rates: Rates) -> dict[str, int]:
    """The number of each trained parameter in the optimizer's state, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in parameter_groups(model, parts, rates) for parameter in group["params"]]
    return {names[id(parameter)]: number for number, parameter in enumerate(ordered)}


def _moved(
    state: dict[str, Any], numbers: Mapping[str, int], ways: Mapping[str, Coordinates], carry: bool
) -> dict[str, Any]:
    """An optimizer's state with the moments of all that was resized carried along, or left out to be restarted."""
    found: dict[int, dict[str, Any]] = dict(state["state"])
    for name, way in ways.items():
        if _is_same(way):
            continue
        a, b = (numbers[f"{WRAPPED}{name}.lora_{matrix}.{ADAPTER}.weight"] for matrix in "AB")
        known = all(found.get(number, {}).keys() >= {FIRST, SECOND} for number in (a, b))
        if carry and known and max(float(way.left.abs().max()), float(way.right.abs().max())) < STEEP:
            moved = carry_moments(way, *(Moments(found[number][FIRST], found[number][SECOND]) for number in (a, b)))
            for number, new in zip((a, b), moved, strict=True):
                found[number] = {**found[number], FIRST: new.first, SECOND: new.second}
        else:
            found.pop(a, None), found.pop(b, None)
    groups = state["param_groups"] if carry else [{**g, "lr": g["lr"] / RAMP} for g in state["param_groups"]]
    return {**state, "state": found, "param_groups": groups}


def _is_same(way: Coordinates) -> bool:
    square = way.left.shape[0] == way.left.shape[1] and way.ratio == 1
    return square and torch.equal(way.left, torch.eye(len(way.left)).to(way.left))


def _write_state(source: Path, target: Path) -> None:
    state = read_json(source)
    state["stateful_callbacks"].pop(NORMS, None)  # norms of other coordinates
    history = [entry for entry in state["log_history"] if not any(name in entry for name in EVALUATED)]
    write_json(target, {**state, "log_history": history})

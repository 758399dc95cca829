"""From a configuration to the schedules that it names: by rule, from a file, an adapter's own, the first ones."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

from hydra_vlm.allocation import ALLOCATORS, AllocationRequest, allocate, allocator_of, require_held
from hydra_vlm.config import Config
from hydra_vlm.files import write_json
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.lora import read_schedule, require_schedule_fits
from hydra_vlm.measuring import Measured, measure
from hydra_vlm.moving.plan import wide_schedule
from hydra_vlm.names import file_name
from hydra_vlm.processes import by_first
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.signals import Signal
from hydra_vlm.starting import OWN, own_schedule
from hydra_vlm.training.frugality import require_frugality
from hydra_vlm.training.recipe import FULL
from hydra_vlm.trials import MOVING, Say, Study, require_start, resolve_budget, scaling_of


def allocation_request(
    config: Config, graph: ComputationGraph, measured: Mapping[str, Measured] = MappingProxyType({})
) -> AllocationRequest:
    """The configuration's wishes as the allocators read them."""
    wish = config.allocation
    return AllocationRequest(
        graph=graph,
        budget=resolve_budget(graph, config),
        profile=next((value for value in measured.values() if isinstance(value, GradientNormProfile)), None),
        signals=tuple(value for value in measured.values() if isinstance(value, Signal)),
        signal=wish.signal,
        n_stages=wish.n_stages,
        delta=wish.delta,
        step=wish.step,
        setting=wish.setting,
        rule=wish.rule,
        seed=wish.seed,
        scaling=scaling_of(config),
    )


def needed_kinds(study: Study) -> list[str]:
    """The kinds of signal that the configuration's schedules follow."""
    request = allocation_request(study.config, study.graph)
    needs = [ALLOCATORS[name].needs(request) for name in study.config.schedules if name in ALLOCATORS]
    return [kind for kind in needs if kind is not None]


def allocate_all(study: Study, measured: Mapping[str, Measured], say: Say = print) -> dict[str, RankSchedule]:
    """Every schedule asked for, under the same budget; "full" has none. `measured` is what `measure` returns."""
    request = allocation_request(study.config, study.graph, measured)
    wanted = [name for name in study.config.schedules if name not in (FULL, OWN, MOVING)]
    schedules = {name: replace(allocate(name, request), name=name) for name in wanted}
    if OWN in study.config.schedules:
        schedules[OWN] = own_ranks(study)
    if MOVING in study.config.schedules:
        schedules[MOVING] = first_ranks(study)
    for name, schedule in schedules.items():
        if schedule.delta is not None and schedule.delta < request.delta:
            say(f"{name}: allocation.delta {request.delta} does not fit the budget, {schedule.delta} is in force")
        by_first(partial(write_json, study.folder.schedule(name), schedule.to_json()))
    return schedules


def schedule_for(study: Study, wish: str, say: Say = print) -> tuple[str, RankSchedule | None]:
    """Name and schedule for `wish`: a schedule file, an allocator's name, "adapter", "moving", or "full" (none).

    What an allocator needs is measured first.
    """
    if wish == FULL:
        require_start(study.config, wish)
        require_frugality(study.config, trains_base=True)
        return FULL, None
    if Path(wish).is_file():
        schedule = read_schedule(wish)
        require_schedule_fits(schedule, study.graph)
        require_held(study.graph, schedule.parameters, f"the schedule in {wish}")
        return file_name(schedule.name, f"{wish}: schedule"), schedule
    if wish in (OWN, MOVING):
        schedule = own_ranks(study) if wish == OWN else first_ranks(study)
    else:
        kind = allocator_of(wish).needs(allocation_request(study.config, study.graph))
        measured = measure(study, [kind], say) if kind is not None else {}
        schedule = allocate(wish, allocation_request(study.config, study.graph, measured))
    name = MOVING if wish == MOVING else schedule.name
    by_first(lambda: write_json(study.folder.schedule(name), schedule.to_json()))
    return name, schedule


def own_ranks(study: Study) -> RankSchedule:
    """The schedule of the adapter that the run starts from; raises BudgetError when it is beyond the budget."""
    require_start(study.config, OWN)
    assert study.start is not None
    return own_schedule(study.start, study.base.parts, study.budget.parameters, scaling_of(study.config))


def first_ranks(study: Study) -> RankSchedule:
    """The schedule that a training whose ranks move begins with."""
    config = study.config
    width = 1.0 if config.training.ranks == "fixed" else config.training.width
    return wide_schedule(study.graph, study.budget, scaling_of(config), width)

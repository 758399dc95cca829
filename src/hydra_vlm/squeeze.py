"""A wider adapter becomes one of a budget after its training, and shows what it would be worth at any.

What `training.ranks: squeeze` does halfway through a run is done to any adapter here, ours or anybody's plain LoRA by
PEFT: every update is cut to its best part in the metric of what its layer reads. Without data all inputs count alike.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from hydra_vlm.allocation import AllocationRequest, Budget
from hydra_vlm.errors import BudgetError, ConfigError
from hydra_vlm.files import require_free
from hydra_vlm.graph import none_for_nan
from hydra_vlm.lora import attach, detach, own_schedule, save_adapter
from hydra_vlm.moving.deciding import DECIDERS, Evidence
from hydra_vlm.moving.phases import SLICE
from hydra_vlm.moving.resized import Resized, resize_all
from hydra_vlm.moving.wide import updates
from hydra_vlm.opened_adapter import Source, Wide, looked_at, opened
from hydra_vlm.report.curve import Curve, Cut, levels
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.trials import Say

Decide = Literal["uniform", "spectral", "phi"]

DOZEN = 12
"""Budgets of a curve."""

CURVED: tuple[Decide, ...] = ("uniform", "spectral")
"""Who makes the cuts of a curve."""


@dataclass(frozen=True)
class Squeezed:
    """An adapter of the budget in `folder`: its schedule, and what was cut from which.

    `kept` is the share of the updates' squared singular values that is left. Losses are nan without validation data.
    """

    source: Path
    folder: Path
    decide: Decide
    has_metric: bool
    before: RankSchedule
    after: RankSchedule
    loss_before: float
    loss_after: float
    kept: float
    probed: int = 0

    def summary(self) -> str:
        """A few lines: what was made, and what it is worth."""
        low, high = min(self.after.ranks), max(self.after.ranks)
        lines = [
            f"{self.source}: {self.before.parameters:,} parameters -> {self.after.parameters:,} of "
            f"{self.after.budget:,}, ranks {low}-{high} by {self.decide}; {self.kept:.2%} of its squared norm is kept"
        ]
        if not self.has_metric:
            lines.append("no data, so no metric: all inputs of a layer count alike, and no loss was measured (--data)")
        if math.isfinite(self.loss_before):
            lines.append(f"validation loss {self.loss_before:.4f} -> {self.loss_after:.4f}")
        return "\n".join([*lines, f"adapter: {self.folder}"])

    def to_json(self) -> dict[str, Any]:
        return {
            "source": str(self.source),
            "adapter": str(self.folder),
            "decide": self.decide,
            "metric": "inputs" if self.has_metric else None,
            "parameters": self.after.parameters,
            "budget": self.after.budget,
            "parameters_before": self.before.parameters,
            "validation_loss_before": none_for_nan(self.loss_before),
            "validation_loss": none_for_nan(self.loss_after),
            "kept": self.kept,
            "probed": self.probed,
            "schedule": self.after.to_json(),
        }


def squeeze(
    source: Source, rank: int | None, parameters: int | None, decide: Decide, out: Path, say: Say = print
) -> Squeezed:
    """Write the adapter of a budget (`parameters`, else what uniform LoRA of `rank` costs) to the new folder `out`.

    Raises:
        HydraError: the adapter is no wider than the budget, or the budget below rank 1; `phi` without validation data;
            what is wrong with adapter, model or data.
    """
    require_free(out)
    if decide == "phi" and not source.validated:
        raise ConfigError(
            "--decide phi probes schedules on validation data, and there is none: give --data, or choose uniform or "
            "spectral"
        )
    if source.is_ours:  # before the model is loaded
        budget_below(own_schedule(source.adapter), rank, parameters)
    with opened(source, say) as (wide, read):
        budget = budget_below(wide.schedule, rank, parameters)
        data = read()
        with looked_at(wide, data, source.config) as seen:
            evidence = Evidence(_request(wide.schedule, budget), seen.spectra, source.seed)
            decision = DECIDERS[decide](evidence, lambda schedule: seen.loss(schedule, SLICE))
            losses = seen.loss(wide.schedule), seen.loss(decision.schedule)
        made = resize_all(wide.model, wide.parts, decision.schedule, seen.metrics, source.seed)
    _write(wide, made, out)
    return Squeezed(
        source.adapter,
        out,
        decide,
        bool(seen.metrics),
        wide.schedule,
        decision.schedule,
        *losses,
        kept=_kept(seen.spectra, decision.schedule),
        probed=len(decision.probed),
    )


def curve(source: Source, say: Say = print) -> Curve:
    """The validation loss of the adapter cut to a dozen budgets, from rank 1 to all that it has.

    Raises:
        HydraError: there is no validation data; the adapter has rank 1; what is wrong with adapter, model or data.
    """
    if not source.validated:
        raise ConfigError(
            "loss against budget is measured on validation data, and there is none: give --data, or a budget with "
            "--rank or --parameters"
        )
    with opened(source, say) as (wide, read):
        least, most = _least(wide.schedule), wide.schedule.parameters
        if most == least:
            raise BudgetError(f"{source.adapter} has rank 1 wherever it adapts, so there is nothing to cut.")
        budgets, data = levels(least, most, DOZEN), read()
        assert data is not None  # validated
        with looked_at(wide, data, source.config) as seen:
            whole = Cut(most, seen.loss(wide.schedule))
            known = {wide.schedule.ranks: whole}
            cuts: dict[str, list[Cut]] = {name: [] for name in CURVED}
            for number, parameters in enumerate(budgets, start=1):
                request = _request(wide.schedule, _budget(wide.schedule, parameters))
                for name, found in cuts.items():
                    schedule = DECIDERS[name](Evidence(request, seen.spectra), seen.loss).schedule
                    if schedule.ranks not in known:
                        known[schedule.ranks] = Cut(schedule.parameters, seen.loss(schedule))
                    found.append(known[schedule.ranks])
                say(f"budget {number} of {len(budgets)}: {parameters:,} parameters")
    made = {name: tuple(found) for name, found in cuts.items()}
    return Curve(str(source.adapter), least, seen.records, whole, tuple(budgets), made)


def budget_below(schedule: RankSchedule, rank: int | None, parameters: int | None) -> Budget:
    """The budget that is asked for, which is less than what the adapter has.

    Raises:
        BudgetError: it is not, or below rank 1 wherever the adapter has one.
    """
    asked = parameters if parameters is not None else (rank or 0) * schedule.graph.cost
    what = f"a budget of {asked:,} parameters" if parameters is not None else f"rank {rank} ({asked:,} parameters)"
    if asked >= schedule.parameters:
        raise BudgetError(
            f"the adapter has {schedule.parameters:,} parameters, and {what} is no less: there is nothing to squeeze, "
            "and an adapter does not grow here.",
            nearest=f"Ask for fewer than {schedule.parameters:,}; training.start_from trains it on at higher ranks.",
        )
    if asked < _least(schedule):
        raise BudgetError(
            f"{what} is below rank 1 for what the adapter adapts.",
            nearest=f"Ask for {_least(schedule):,} or more.",
            budget=_least(schedule),
        )
    return _budget(schedule, asked)


def _budget(schedule: RankSchedule, parameters: int) -> Budget:
    return Budget(parameters, max(1, parameters // schedule.graph.cost))


def _least(schedule: RankSchedule) -> int:
    """Parameters of rank 1 wherever there is one."""
    return schedule.graph.parameters([min(1, rank) for rank in schedule.ranks])


def _request(schedule: RankSchedule, budget: Budget) -> AllocationRequest:
    """Scales follow the adapter's own rule, under the new budget."""
    scaling = schedule.scaling
    if scaling.standard_rank is not None:
        scaling = replace(scaling, standard_rank=None)
    return AllocationRequest(schedule.graph, budget, scaling=scaling)


def _kept(found: tuple[tuple[float, ...], ...], schedule: RankSchedule) -> float:
    whole = sum(value**2 for values in found for value in values)
    left = sum(value**2 for values, rank in zip(found, schedule.ranks, strict=True) for value in values[:rank])
    return left / whole if whole else 1.0


def _write(wide: Wide, made: Resized, out: Path) -> None:
    """Save the resized adapter, with the projector's weights as they were beside the wide one."""
    base, parts = wide.loaded.model, wide.parts
    model = attach(base, made.schedule, parts, dropout=wide.dropout)
    try:
        with torch.no_grad():
            for name, update in updates(model).items():
                update.a.copy_(made.updates[name].a)
                update.b.copy_(made.updates[name].b)
        if wide.projector is not None and parts.projector is not None:
            # assigned, since a copy would take the precision of the base
            base.get_submodule(parts.projector).load_state_dict(dict(wide.projector), assign=True)
        save_adapter(model, out, made.schedule, parts, projector_state=wide.projector is not None)
    finally:
        detach(model)

"""A wider adapter becomes one of a budget after its training, and shows what it would be worth at any.

What `training.ranks: squeeze` does halfway through a run is done to any adapter here, ours or anybody's plain LoRA by
PEFT: every update is cut to its best part in the metric of what its layer reads. Without data all inputs count alike.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hydra_vlm.allocation import AllocationRequest, Budget
from hydra_vlm.config import Config, DataConfig
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin_once
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.preflight import Checked, check_file, check_reading, settle
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.records import sample_numbers
from hydra_vlm.data.templates import require_template
from hydra_vlm.errors import AdapterError, BudgetError, ConfigError
from hydra_vlm.evaluation import tower_features, with_features
from hydra_vlm.files import require_free
from hydra_vlm.graph import none_for_nan
from hydra_vlm.lora import attach, detach, load_adapter, own_schedule, save_adapter
from hydra_vlm.models.loading import LoadedModel, resolve_device
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.moving.deciding import DECIDERS, Evidence
from hydra_vlm.moving.phases import LOOKED_AT, SLICE
from hydra_vlm.moving.resized import Resized, resize_all
from hydra_vlm.moving.wide import Metrics, cut_by, spectra, updates
from hydra_vlm.reading import read_json, read_text
from hydra_vlm.report.curve import Curve, Cut, levels
from hydra_vlm.schedule import DEFAULT_SCALING, RankSchedule
from hydra_vlm.starting import begin, read_start
from hydra_vlm.starting import own_schedule as schedule_of_start
from hydra_vlm.stored_adapter import CONFIG, SCHEDULE, base_quantization, read_adapter
from hydra_vlm.training.measuring import measuring
from hydra_vlm.training.recipe import InstructionData, trains_projector
from hydra_vlm.training.sharding import on_training_device
from hydra_vlm.trials import Say, open_model

Decide = Literal["uniform", "spectral", "phi"]

DOZEN = 12
"""Budgets of a curve."""

CURVED: tuple[Decide, ...] = ("uniform", "spectral")
"""Who makes the cuts of a curve."""


@dataclass(frozen=True)
class Source:
    """The adapter to be squeezed, and what is needed beside it.

    `config` says model, data and how they are computed; `has_data` whether its data are the adapter's. `run` is the
    run folder that a built-in set may lie in already.
    """

    adapter: Path
    config: Config
    has_data: bool
    run: Path | None = None
    other_base: bool = False
    seed: int = 0

    @property
    def is_ours(self) -> bool:
        """Whether its schedule lies beside it; other tools write none."""
        return (self.adapter / SCHEDULE).is_file()

    @property
    def validated(self) -> bool:
        """Whether there are records on which a loss can be measured."""
        return self.has_data and (self.config.data.validation is not None or self.config.data.train in BUILTIN)


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
    with _opened(source, say) as (wide, read):
        budget = budget_below(wide.schedule, rank, parameters)
        data = read()
        with _looked_at(wide, data, source.config) as seen:
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
    with _opened(source, say) as (wide, read):
        least, most = _least(wide.schedule), wide.schedule.parameters
        if most == least:
            raise BudgetError(f"{source.adapter} has rank 1 wherever it adapts, so there is nothing to cut.")
        budgets, data = levels(least, most, DOZEN), read()
        assert data is not None  # validated
        with _looked_at(wide, data, source.config) as seen:
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


# The adapter on its base


@dataclass(frozen=True)
class Wide:
    """A trained adapter on its base; `projector` are the projector's weights that lie beside it, if any."""

    loaded: LoadedModel
    model: Any
    schedule: RankSchedule
    projector: Mapping[str, Tensor] | None
    dropout: float

    @property
    def parts(self) -> ModelParts:
        return self.loaded.parts


@contextmanager
def _opened(source: Source, say: Say) -> Iterator[tuple[Wide, Callable[[], InstructionData | None]]]:
    """The adapter on its base while the block lasts, and the function that reads the data; then the base alone."""
    with tempfile.TemporaryDirectory() as scratch:
        sets = _checked(source, Path(scratch)) if source.has_data else None
        loaded = _base(source)
        opened = _ours(source, loaded) if source.is_ours else _by_peft(source, loaded)
        try:
            yield opened, lambda: None if sets is None else _read(source.config, loaded, *sets, say=say)
        finally:
            detach(opened.model)


def _base(source: Source) -> LoadedModel:
    """The base, with the parts that the adapter reaches, quantised as it was for its training."""
    config = source.config
    if source.is_ours:
        reached = tuple(own_schedule(source.adapter).graph.part_layers)
        kind = base_quantization(source.adapter, resolve_device(config.device))
        config = config.model_copy(update={"adapt": reached, "quantization": kind})
    return open_model(config)


def _ours(source: Source, loaded: LoadedModel) -> Wide:
    stored = read_adapter(source.adapter)
    model = load_adapter(loaded.model, source.adapter, loaded.parts, other_base=source.other_base)
    dropout = float(stored.config.get("lora_dropout") or 0.0)
    return Wide(loaded, model, own_schedule(source.adapter), stored.projector, dropout)


def _by_peft(source: Source, loaded: LoadedModel) -> Wide:
    """An adapter that another tool wrote, read as training would to start from it."""
    parts = loaded.parts
    try:
        start = read_start(source.adapter, loaded.model, parts, trains_projector(parts))
    except AdapterError as problem:  # which names the key of a training
        raise AdapterError(str(problem).removeprefix("training.start_from: ")) from None
    held = sum(update.a.numel() + update.b.numel() for update in start.updates.values())
    schedule = schedule_of_start(start, parts, held, DEFAULT_SCALING)
    dropout = float(read_json(source.adapter / CONFIG).get("lora_dropout") or 0.0)
    model = attach(loaded.model, schedule, parts, seed=source.seed, dropout=dropout)
    begin(start, model, schedule, parts)
    model.requires_grad_(False).eval()
    return Wide(loaded, model, schedule, start.projector, dropout)


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


# What is looked at


@dataclass(frozen=True)
class Seen:
    """What forward passes tell of an adapter; `loss` is that at a schedule's ranks on so many records (None: all)."""

    metrics: Metrics
    spectra: tuple[tuple[float, ...], ...]
    loss: Callable[..., float]
    records: int


@contextmanager
def _looked_at(wide: Wide, data: InstructionData | None, config: Config) -> Iterator[Seen]:
    """What the adapter's layers read, and what it is worth when it is cut; it is whole again afterwards."""
    model, parts, validation = wide.model, wide.parts, data.validation if data is not None else None
    settings = config.training.model_copy(update={"compile": False})  # would not be repaid, nor look at hooks
    with ExitStack() as opened:
        metrics: Metrics = {}
        measure = None
        if data is not None:
            measure = opened.enter_context(measuring(model, parts, data.reader, settings))
            metrics = measure.moments(parts, data.train, range(len(data.train)))
        found = spectra(model, parts, metrics)
        cut = opened.enter_context(cut_by(model, parts, metrics))

        def loss(schedule: RankSchedule, limit: int | None = None) -> float:
            if measure is None or validation is None:
                return math.nan
            cut(schedule)
            return measure.loss(validation, sample_numbers(len(validation), limit))

        yield Seen(metrics, found, loss, 0 if validation is None else len(validation))


def _checked(source: Source, scratch: Path) -> tuple[Checked, Checked | None]:
    """The file whose records make the metric, and that on which losses are measured."""
    wish = source.config.data
    require_template(wish.template)
    files = _files(wish, source.run, scratch)
    seen = check_file(files.train, files.images, wish.max_image_pixels)
    validation = check_file(files.validation, files.images, wish.max_image_pixels) if files.validation else None
    return seen, validation


def _files(wish: DataConfig, run: Path | None, scratch: Path) -> DataFiles:
    if wish.train not in BUILTIN:
        return DataFiles(Path(wish.train), wish.validation, {}, wish.images)
    stored = run / "data" if run is not None else scratch
    is_there = (stored / "set.txt").is_file() and read_text(stored / "set.txt").strip() == wish.train
    return write_builtin_once(wish.train, stored if is_there else scratch / "data")


def _read(config: Config, loaded: LoadedModel, seen: Checked, validation: Checked | None, say: Say) -> InstructionData:
    """Some records of each file as the model reads them, images through the frozen tower once."""
    reader = open_reader(loaded.processor, config.data.template)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    limits = (LOOKED_AT, config.data.validation_limit)
    chosen = []
    for checked, limit in zip((seen, validation), limits, strict=True):
        if checked is not None:
            records = checked.records.select(sample_numbers(len(checked.records), limit))
            sampled = replace(checked, records=records)
            chosen.append(check_reading(sampled, reader, min(config.data.max_length, longest)))
    settle(chosen, config.data.on_bad_row, None, say)
    images = {path for checked in chosen for _, path in checked.records.images()}
    with on_training_device(loaded.model):
        features = tower_features(loaded, reader, images, (), config.training.cache_gigabytes, say)
    reader = with_features(reader, features or None)
    data = [InstructionDataset.of_checked(checked, reader) for checked in chosen]
    return InstructionData(data[0], data[1] if validation is not None else None, reader)

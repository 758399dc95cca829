"""A trained adapter on its base, and the records that tell what it is worth: ours, or anybody's plain LoRA by PEFT."""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hydra_vlm.config import Config, DataConfig
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin_once
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.preflight import Checked, check_file, check_reading, settle
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.records import sample_numbers
from hydra_vlm.data.templates import require_template
from hydra_vlm.errors import AdapterError
from hydra_vlm.evaluation import tower_features, with_features
from hydra_vlm.lora import attach, detach, load_adapter, own_schedule
from hydra_vlm.models.loading import LoadedModel, resolve_device
from hydra_vlm.models.structure import ModelParts
from hydra_vlm.moving.phases import LOOKED_AT
from hydra_vlm.moving.wide import Metrics, cut_by, spectra
from hydra_vlm.reading import read_json, read_text
from hydra_vlm.schedule import DEFAULT_SCALING, RankSchedule
from hydra_vlm.starting import begin, read_start
from hydra_vlm.starting import own_schedule as schedule_of_start
from hydra_vlm.stored_adapter import CONFIG, SCHEDULE, base_quantization, read_adapter
from hydra_vlm.training.measuring import measuring
from hydra_vlm.training.recipe import InstructionData, trains_projector
from hydra_vlm.training.sharding import on_training_device
from hydra_vlm.trials import Say, open_model


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
def opened(source: Source, say: Say) -> Iterator[tuple[Wide, Callable[[], InstructionData | None]]]:
    """The adapter on its base while the block lasts, and the function that reads the data; then the base alone."""
    with tempfile.TemporaryDirectory() as scratch:
        sets = _checked(source, Path(scratch)) if source.has_data else None
        loaded = _base(source)
        wide = _ours(source, loaded) if source.is_ours else _by_peft(source, loaded)
        try:
            yield wide, lambda: None if sets is None else _read(source.config, loaded, *sets, say=say)
        finally:
            detach(wide.model)


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


# What is looked at


@dataclass(frozen=True)
class Seen:
    """What forward passes tell of an adapter; `loss` is that at a schedule's ranks on so many records (None: all)."""

    metrics: Metrics
    spectra: tuple[tuple[float, ...], ...]
    loss: Callable[..., float]
    records: int


@contextmanager
def looked_at(wide: Wide, data: InstructionData | None, config: Config) -> Iterator[Seen]:
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

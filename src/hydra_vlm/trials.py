"""Trials: what all of a run share, the gradient-norm run, and one fine-tuning run with one schedule and seed.

The model is loaded once in a process. A trial borrows it and leaves no trace: its adapter is taken off, the projector
is what it was. Tower features are computed once for all trials and kept in the run folder. A finished trial is read
back, a stopped one goes on from its last checkpoint and its saved answers.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra_vlm.allocation import ALLOCATORS, AllocationRequest, Budget, allocate
from hydra_vlm.benchmarks.generation import Answering
from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.benchmarks.rescoring import finish, write_examples
from hydra_vlm.benchmarks.suite import Task, tasks_of
from hydra_vlm.config import Config, TrainingConfig
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin
from hydra_vlm.data.feature_store import FeatureStore
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import Record, check_images, read_records, sample
from hydra_vlm.data.templates import require_template
from hydra_vlm.errors import ConfigError, StageError
from hydra_vlm.evaluation import answer_tasks, tower_features, with_features
from hydra_vlm.faults import disk_full_told
from hydra_vlm.files import read_value, write_json, write_lines
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.interruption import Interrupted
from hydra_vlm.lora import save_adapter
from hydra_vlm.models.audit import adaptation_summary
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.profile import GradientNormProfile, require_same_graph
from hydra_vlm.records import TrialRecord
from hydra_vlm.run_folder import RunFolder, environment, open_run
from hydra_vlm.schedule import RankSchedule, Scaling
from hydra_vlm.training.gradient_norms import GradientNormCallback
from hydra_vlm.training.progress import Watch
from hydra_vlm.training.recipe import (
    FULL,
    Finetuned,
    InstructionData,
    adapting,
    batch_arithmetic,
    finetune,
    prepare,
    resolve_bf16,
    trains_projector,
)
from hydra_vlm.training.trackers import require_trackers

ZERO_SHOT = "zero-shot"
DAMAGED_RECORD = "remove it, and the trial goes on from its last checkpoint"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """What all trials of a run share: configuration, folder, data, and the model, which is loaded once."""

    config: Config
    folder: RunFolder
    graph: ComputationGraph
    data: InstructionData
    tasks: tuple[Task, ...]
    base: LoadedModel

    def fresh_model(self) -> LoadedModel:
        """The model loaded anew, for training that changes its own weights."""
        return open_model(self.config)

    @property
    def budget(self) -> Budget:
        return resolve_budget(self.graph, self.config)


def prepare_study(config: Config, out: Path, say: Say = print) -> Study:
    """Check everything that can be wrong before the first long step, then open the run folder.

    Raises:
        HydraError: a bad key, record, image, budget, stage count or folder, before anything is trained.
    """
    for name in config.schedules:
        if name not in ALLOCATORS and name != FULL:
            raise ConfigError(f"schedule {name!r} does not exist: choose from {', '.join([*ALLOCATORS, FULL])}")
    require_template(config.data.template)
    loaded = open_model(config)
    reader = open_reader(loaded.processor, config.data.template)
    graph = loaded.parts.graph
    resolve_budget(graph, config)
    longest = max(n for _, n in graph.parts)
    if config.allocation.n_stages > longest:
        raise StageError(
            f"allocation.n_stages {config.allocation.n_stages} exceeds the {longest} layers that can be told apart",
            nearest=f"Lower it to {longest} or less.",
        )
    require_trackers(config.training.trackers)
    bf16 = resolve_bf16(config.training, loaded.model.device)
    say(batch_arithmetic(config.training))
    folder = open_run(out, config, environment(str(loaded.model.device), "bf16 autocast" if bf16 else "fp32"))
    write_json(folder.graph, graph.to_json())
    train, validation, tasks = _records(config, folder)
    write_examples(folder.path, tasks)
    data = _encode(loaded, config, reader, train, validation, tasks, folder, say)
    return Study(config, folder, graph, data, tasks, loaded)


def open_model(config: Config) -> LoadedModel:
    """The configuration's model, freshly loaded, with the parts that are to be adapted."""
    return load_model(config.model, config.device, config.decoder_pattern, config.adapt, config.dtype)


def resolve_budget(graph: ComputationGraph, config: Config) -> Budget:
    """C from `budget.parameters`, or from `budget.rank` where that is not given."""
    if config.budget.parameters is not None:
        return Budget.of_parameters(graph, config.budget.parameters)
    if config.budget.rank is None:
        raise ConfigError("the budget is empty: give budget.rank or budget.parameters")
    return Budget.of_rank(graph, config.budget.rank)


def scaling_of(config: Config) -> Scaling:
    """The scaling that the configuration asks for."""
    return Scaling(config.scaling.rule, config.scaling.value)


def measure_profile(study: Study, say: Say = print) -> GradientNormProfile:
    """The gradient-norm profile of a short uniform LoRA run (Eq. 1), read back if it was measured before."""
    stored = study.folder.profile
    if stored.is_file():
        profile = read_value(stored, GradientNormProfile.from_json, "remove it, and it is measured again")
        require_same_graph(profile, study.graph)
        return profile
    settings = study.config.profile
    budget = study.budget
    rank = settings.rank or budget.rank
    say(f"profile: uniform LoRA of rank {rank} for {settings.steps} steps")
    schedule = allocate(
        "uniform",
        AllocationRequest(study.graph, Budget.of_rank(study.graph, rank), scaling=scaling_of(study.config)),
    )
    training = study.config.training.model_copy(update={"steps": settings.steps, "save_steps": 10**9, "trackers": ()})
    scratch = study.folder.path / "profile-run"
    unvalidated = replace(study.data, validation=None)
    shutil.rmtree(scratch, ignore_errors=True)
    with adapting(study.base, schedule, training, settings.seed) as model:
        say(adaptation_summary(model, study.base.parts))
        callback = GradientNormCallback(model, study.base.parts)
        try:
            finetune(model, study.base, unvalidated, training, settings.seed, scratch, [callback])
        except Interrupted as stop:
            raise Interrupted(stop.number, "the same command measures the profile anew") from None
        profile = callback.profile(settings.skip)
    shutil.rmtree(scratch)
    write_json(stored, profile.to_json())
    return profile


def run_trial(
    study: Study,
    name: str,
    schedule: RankSchedule | None,
    seed: int,
    say: Say = print,
    learning_rate: float | None = None,
    watch: Watch | None = None,
) -> TrialRecord:
    """Fine-tune with one schedule and seed, score, and keep the record; a finished trial is read back.

    "full" trains the whole decoder, "zero-shot" nothing. `learning_rate` replaces the configuration's. `watch` is told
    the validation loss now and then; what it raises ends the trial.
    """
    folder = study.folder.trial(f"{name}-seed{seed}")
    if (folder / "record.json").is_file():
        return read_value(folder / "record.json", TrialRecord.from_json, DAMAGED_RECORD)
    say(f"{name}, seed {seed}" + (f": {schedule.parameters:,} LoRA parameters" if schedule else ""))
    started = time.monotonic()
    settings = study.config.training
    if learning_rate is not None:
        settings = settings.model_copy(update={"learning_rate": learning_rate})
    with _trained(study, name, schedule, seed, settings, folder, watch) as done:
        scores = answer_and_score(study, done.model, folder)
    record = TrialRecord(
        name=name,
        seed=seed,
        schedule=schedule,
        trained=done.trained,
        train_losses=done.train_losses,
        validation_loss=done.validation_loss,
        scores=scores,
        seconds=time.monotonic() - started,
    )
    write_lines(folder / "metrics.jsonl", ({"step": s, "loss": loss} for s, loss in done.train_losses))
    write_json(folder / "record.json", record.to_json())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


@contextmanager
def _trained(
    study: Study,
    name: str,
    schedule: RankSchedule | None,
    seed: int,
    settings: TrainingConfig,
    folder: Path,
    watch: Watch | None,
) -> Iterator[Finetuned]:
    """The trained model, its weights kept, while the block lasts."""
    if name == ZERO_SHOT:
        yield Finetuned(study.base.model, {}, (), math.nan)
    elif schedule is None:
        loaded = study.fresh_model()
        settings = settings.model_copy(update={"learning_rate": settings.full_learning_rate})
        opened = prepare(loaded, None, settings, seed)
        done = finetune(opened, loaded, study.data, settings, seed, folder / "checkpoints", watch=watch)
        keep_weights(loaded, done.model, None, folder)
        yield done
    else:
        with adapting(study.base, schedule, settings, seed) as opened:
            done = finetune(opened, study.base, study.data, settings, seed, folder / "checkpoints", watch=watch)
            keep_weights(study.base, done.model, schedule, folder)
            yield done


def keep_weights(loaded: LoadedModel, model: Any, schedule: RankSchedule | None, folder: Path) -> None:
    """The adapter as plain PEFT with the projector beside it; the whole model after full fine-tuning."""
    with disk_full_told(folder, lambda: "The last checkpoint is kept."):
        if schedule is not None:
            projector = trains_projector(loaded.parts)
            save_adapter(model, folder / "adapter", schedule, loaded.parts, projector_state=projector)
        else:
            model.save_pretrained(folder / "model")
            loaded.processor.save_pretrained(folder / "model")


def answer_and_score(study: Study, model: Any, folder: Path) -> tuple[Score, ...]:
    """Answer the test questions, keep what was said and how it was judged; returns the scores."""
    settings, training = study.config.evaluation, study.config.training
    how = Answering(settings.batch_size, settings.max_new_tokens, training.cache_gigabytes)
    answer_tasks(model, study.data.reader, study.tasks, folder, how)
    return finish(folder, study.tasks)


def _records(config: Config, folder: RunFolder) -> tuple[list[Record], list[Record], tuple[Task, ...]]:
    """Read and check every file before anything is trained; a built-in set is written to the run folder first."""
    wish = config.data
    files = (
        write_builtin(wish.train, folder.path / "data")
        if wish.train in BUILTIN
        else DataFiles(Path(wish.train), wish.validation, wish.tests, wish.images, wish.benchmarks)
    )
    train = _checked(files.train, files.images)
    validation = _checked(files.validation, files.images) if files.validation else []
    tasks = [task.limited(config.evaluation.limit) for task in tasks_of(files, (), folder.path / "images")]
    return train, sample(validation, wish.validation_limit), tuple(tasks)


def _checked(path: Path, images: Path | None) -> list[Record]:
    records = read_records(path, images)
    check_images(path, records)
    return records


def _encode(
    loaded: LoadedModel,
    config: Config,
    reader: Reader,
    train: Sequence[Record],
    validation: Sequence[Record],
    tasks: Sequence[Task],
    folder: RunFolder,
    say: Say,
) -> InstructionData:
    """Encode texts, and the images too where the frozen tower's features can be kept in memory or on disk."""
    images = {r.image for r in (*train, *validation) if r.image}
    disk = config.training.disk_cache_gigabytes
    store = FeatureStore(folder.path / "features", disk) if disk else None
    features = tower_features(loaded, reader, images, tasks, config.training.cache_gigabytes, say, store)
    reader = with_features(reader, features or None)
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    length = min(config.data.max_length, longest)
    sets = [InstructionDataset(rs, reader, length) for rs in (train, validation)]
    return InstructionData(sets[0], sets[1] if validation else None, reader)

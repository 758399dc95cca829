"""Trials: what all of a run share, and one fine-tuning run with one schedule and seed.

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
from functools import partial
from pathlib import Path
from typing import Any

from hydra_vlm.allocation import ALLOCATORS, STAGED, AllocationRequest, Budget, require_held
from hydra_vlm.benchmarks.generation import Answering
from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.benchmarks.rescoring import finish, write_examples
from hydra_vlm.benchmarks.suite import Task, tasks_of
from hydra_vlm.config import Config, TrainingConfig
from hydra_vlm.data.builtin import BUILTIN, DataFiles, write_builtin_once
from hydra_vlm.data.feature_store import FeatureStore
from hydra_vlm.data.instruction import InstructionDataset
from hydra_vlm.data.preflight import Checked, check_file, check_reading, settle
from hydra_vlm.data.readers import Reader, open_reader
from hydra_vlm.data.records import sample_numbers
from hydra_vlm.data.templates import require_template
from hydra_vlm.errors import ConfigError, RunFolderError, StageError
from hydra_vlm.evaluation import answer_tasks, tower_features, with_features
from hydra_vlm.faults import disk_full_told
from hydra_vlm.files import read_kept, read_value, write_json, write_lines
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.inputs import bind, data_inputs, model_inputs, require_unchanged, task_inputs
from hydra_vlm.lora import save_adapter
from hydra_vlm.models.loading import LoadedModel, load_model, resolve_model
from hydra_vlm.models.weights import write_model
from hydra_vlm.moving.phases import first_folder, trained_moving
from hydra_vlm.moving.plan import Move, Plan, plan_of
from hydra_vlm.pilot.candidates import Pilot
from hydra_vlm.pilot.run import piloted as pilot_run
from hydra_vlm.planning.plan import WIDE
from hydra_vlm.planning.run import estimate
from hydra_vlm.processes import by_first, in_turn, is_first, shards_model
from hydra_vlm.records import TrialRecord
from hydra_vlm.run_folder import RunFolder, environment, has_begun, open_run, session_changes
from hydra_vlm.schedule import RankSchedule, Scaling
from hydra_vlm.starting import OWN, Start, kept_share, own_schedule, require_own_base, require_same_start
from hydra_vlm.training.best import require_validation
from hydra_vlm.training.frugality import require_frugality
from hydra_vlm.training.job import Job
from hydra_vlm.training.progress import Watch
from hydra_vlm.training.rates import Rates
from hydra_vlm.training.recipe import (
    FULL,
    Finetuned,
    InstructionData,
    batch_arithmetic,
    finetune,
    prepare,
    resolve_bf16,
    start_of,
    trains_projector,
)
from hydra_vlm.training.sharding import load_to_take_apart, on_training_device, training_device
from hydra_vlm.training.trackers import require_trackers

ZERO_SHOT = "zero-shot"
MOVING = "moving"
"""The name of a schedule that starts wider than the budget and ends inside it, as `training.ranks` says."""

OTHERS = (FULL, OWN, MOVING)
"""What `schedules` may name beside allocators."""

SPENT = "spent.json"
DAMAGED_SCHEDULE = "remove the folder of this trial, which is then trained anew"
DAMAGED_RECORD = "remove it, and the trial goes on from its last checkpoint, or anew where none is left"
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
    start: Start | None = None
    inputs: tuple[str, ...] = ()
    """The groups of `inputs.json` that this run reads."""
    home: Path = Path()
    """The run folder that holds `inputs.json`; the final runs of a search have a folder of their own below it."""

    def require_unchanged(self, made: Path) -> None:
        """Raise RunFolderError where what the run reads was changed while `made` was made of it."""
        by_first(lambda: require_unchanged(self.home, self.inputs, made))

    def fresh_model(self) -> LoadedModel:
        """The model loaded anew, for training that changes its own weights."""
        return open_model(self.config)

    def estimate(self, phase: str) -> Callable[[], str]:
        """What the plan says of a phase's memory, made when it is asked for."""
        return partial(estimate, self.config, phase)

    @property
    def budget(self) -> Budget:
        return resolve_budget(self.graph, self.config)


def prepare_study(config: Config, out: Path, say: Say = print) -> Study:
    """Check everything that can be wrong before the first long step, then open the run folder.

    Raises:
        HydraError: a bad key, record, image, budget, stage count or folder, before anything is trained.
    """
    for name in config.schedules:
        if name not in ALLOCATORS and name not in OTHERS:
            raise ConfigError(f"schedule {name!r} does not exist: choose from {', '.join([*ALLOCATORS, *OTHERS])}")
        require_start(config, name)
    require_template(config.data.template)
    require_frugality(config, trains_base=FULL in config.schedules)
    loaded = open_model(config)
    reader = open_reader(loaded.processor, config.data.template)
    graph = loaded.parts.graph
    budget = resolve_budget(graph, config)
    if config.profile.rank is not None:
        require_held(graph, config.profile.rank * graph.cost, f"profile.rank {config.profile.rank:,}")
    longest = max(n for _, n in graph.parts)
    if config.allocation.n_stages > longest:
        possible = min(longest, budget.rank)
        raise StageError(
            f"allocation.n_stages {config.allocation.n_stages} exceeds the {longest} layers that can be told apart",
            nearest=f"Lower it to {possible}.",
            n_stages=possible,
        )
    start = start_of(loaded, config.training)
    if start is not None:
        require_own_base(start.folder, loaded.model, loaded.parts)
    if start is not None and OWN in config.schedules:
        own_schedule(start, loaded.parts, resolve_budget(graph, config).parameters, scaling_of(config))
    require_trackers(config.training.trackers)
    bf16 = resolve_bf16(config.training, training_device(loaded.model))
    say("\n".join([batch_arithmetic(config.training), *graph.notes, *([start.summary()] if start else [])]))
    place, precision = str(training_device(loaded.model)), "bf16 autocast" if bf16 else "fp32"
    folder = by_first(lambda: open_run(out, config, environment(place, precision)))
    for line in by_first(lambda: session_changes(out)):
        say(line)
    by_first(lambda: write_json(folder.graph, graph.to_json()))
    if start is not None:
        by_first(partial(require_same_start, start, folder.start))
    train, validation, tasks, inputs = by_first(lambda: _records(config, folder))
    by_first(lambda: write_examples(folder.path, tasks))
    data = in_turn(lambda: _encode(loaded, config, reader, train, validation, tasks, folder, say))
    return Study(config, folder, graph, data, tasks, loaded, start, inputs, out)


def require_start(config: Config, name: str) -> None:
    """Raises ConfigError for a schedule that needs an adapter to start from, or one that has no use for it."""
    if name == OWN and config.training.start_from is None:
        raise ConfigError(f"schedule {OWN!r} has the ranks of the adapter in training.start_from: set that key, too")
    if name == FULL and config.training.start_from is not None:
        raise ConfigError(
            f"schedule {FULL!r} trains the decoder itself and has no adapter to begin with: merge the one in "
            "training.start_from (hydra-vlm export --form merged), and give the merged model"
        )


def open_model(config: Config) -> LoadedModel:
    """The configuration's model, freshly loaded, with the parts that are to be adapted."""
    if shards_model():
        return load_to_take_apart(config)
    where = (config.device, config.decoder_pattern, config.adapt)
    return load_model(config.model, *where, config.dtype, config.quantization, config.attention)


def resolve_budget(graph: ComputationGraph, config: Config) -> Budget:
    """C from `budget.parameters`, or from `budget.rank` where that is not given; raises as `Budget.asked` does."""
    fewest = config.search.n_stages[0] if config.search.n_stages else 1
    stages = config.allocation.n_stages if STAGED & set(config.schedules) else 1
    return Budget.asked(graph, config.budget.rank, config.budget.parameters, least=max(fewest, stages))


def scaling_of(config: Config) -> Scaling:
    """The scaling that the configuration asks for; each schedule takes it under its own budget."""
    return Scaling(config.scaling.rule, config.scaling.value)


def finished(stored: Path) -> TrialRecord | None:
    """The record of a finished trial; None where there is none yet."""
    return read_kept(stored, partial(TrialRecord.from_json, key=stored.parent.name), DAMAGED_RECORD)


def run_trial(
    study: Study,
    name: str,
    schedule: RankSchedule | None,
    seed: int,
    say: Say = print,
    learning_rate: float | None = None,
    watch: Watch | None = None,
    moving: bool = False,
    pilot: bool = False,
) -> TrialRecord:
    """Fine-tune with one schedule and seed, score, and keep the record; a finished trial is read back.

    "full" trains the whole decoder, "zero-shot" nothing. `learning_rate` replaces the configuration's. `watch` is told
    the validation loss now and then; what it raises ends the trial. `moving`: ranks begin as the schedule's and move as
    the configuration says. `pilot`: rates are chosen by a pilot first.
    """
    folder = study.folder.trial(f"{name}-seed{seed}")
    before = by_first(lambda: finished(folder / "record.json"))
    by_first(lambda: _require_own_schedule(folder, schedule, None if before is None else before.first_schedule))
    if before is not None:
        return before
    say(f"{name}, seed {seed}" + (f": {schedule.parameters:,} LoRA parameters" if schedule else ""))
    start = study.start if schedule is not None else None
    if start is not None and schedule is not None:
        share = kept_share(start, schedule, study.base.parts)
        if share < 1 - 1e-6:
            say(f"{name} keeps {share:.2%} of the adapter that it starts from, in squared norm")
    before_now, started = by_first(lambda: _seconds_before(folder)), time.monotonic()
    settings = study.config.training
    if learning_rate is not None:
        settings = settings.model_copy(update={"learning_rate": learning_rate})
    wish = _Wish(name, schedule, moving, pilot)
    with _trained(study, wish, seed, settings, folder, watch, say) as (done, ended, moves, piloted):
        training_seconds = before_now + time.monotonic() - started
        scores = by_first(lambda: answer_and_score(study, done.model, folder))
    study.require_unchanged(folder)
    rates = piloted.chosen.settings(settings) if piloted is not None else settings
    record = TrialRecord(
        name=name,
        seed=seed,
        schedule=ended,
        trained=done.trained,
        train_losses=done.train_losses,
        validation_loss=done.validation_loss,
        scores=scores,
        seconds=before_now + time.monotonic() - started,
        started_from=start.digest if start is not None else None,
        validation_losses=done.validation_losses,
        kept_step=done.kept_step,
        moves=moves,
        pilot=piloted,
        training_seconds=training_seconds,
        learning_rates={} if schedule is None else Rates.of(rates).to_json(),
    )
    by_first(lambda: _keep_record(record, folder))
    return record


def _require_own_schedule(folder: Path, schedule: RankSchedule | None, of_record: RankSchedule | None) -> None:
    """Raise unless a trial goes on, or ended, with the schedule that it began with; a new one keeps it.

    Raises:
        RunFolderError: a schedule of that name has other ranks now: its file, or the profile it is made of, was edited.
    """
    stored = folder / "schedule.json"
    if schedule is None:
        return
    before = of_record or read_kept(stored, RankSchedule.from_json, DAMAGED_SCHEDULE)
    if before is None:
        write_json(stored, schedule.to_json())
    elif (before.ranks, before.scaling) != (schedule.ranks, schedule.scaling):
        what = f"{folder} is a trial of another schedule {schedule.name!r} ({_first_difference(before, schedule)})"
        raise RunFolderError(
            f"{what}: put back the schedule's file, or the profile.json that it was made of, or give the new one "
            "another name or --out"
        )


def _first_difference(before: RankSchedule, now: RankSchedule) -> str:
    for place, was, asked in zip(now.graph.projections, before.ranks, now.ranks, strict=False):
        if was != asked:
            return f"{place.component} of layer {place.layer} had rank {was}, and has {asked} now"
    return f"its scaling was {before.scaling}, and is {now.scaling} now"


def _keep_record(record: TrialRecord, folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", record.metrics())
    write_json(folder / "record.json", record.to_json())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / SPENT).unlink(missing_ok=True)


def _seconds_before(folder: Path) -> float:
    """Seconds that earlier sessions spent on a trial, up to the last checkpoint or answer that each of them left.

    `spent.json` holds those before the session that wrote it, at its start.
    """
    stored, seconds = folder / SPENT, 0.0
    if stored.is_file():
        left = [path.stat().st_mtime for path in (*folder.glob("checkpoints/*"), *folder.glob("predictions/*"))]
        last = max(left, default=0.0) - stored.stat().st_mtime
        seconds = read_value(stored, float, DAMAGED_SCHEDULE) + max(0.0, last)
    write_json(stored, seconds)
    return seconds


@dataclass(frozen=True)
class _Wish:
    """What a trial is to train: a schedule (None: the whole decoder, or nothing), whether it moves, whether rates are
    chosen first."""

    name: str
    schedule: RankSchedule | None
    moving: bool
    pilot: bool


_Trained = tuple[Finetuned, RankSchedule | None, tuple[Move, ...], Pilot | None]


@contextmanager
def _trained(
    study: Study, wish: _Wish, seed: int, settings: TrainingConfig, folder: Path, watch: Watch | None, say: Say
) -> Iterator[_Trained]:
    """The trained model while the block lasts, its weights kept; the schedule that it ended with; moves; pilot."""
    if wish.name == ZERO_SHOT:
        yield Finetuned(study.base.model, {}, (), math.nan), None, (), None
    elif wish.schedule is None:
        loaded = study.fresh_model()
        settings = settings.model_copy(update={"learning_rate": settings.full_learning_rate, "rates": "single"})
        opened = prepare(loaded, None, settings, seed)
        expected = study.estimate("full fine-tuning")
        done = finetune(
            opened, loaded, study.data, settings, seed, folder / "checkpoints", watch=watch, estimate=expected
        )
        by_first(lambda: keep_weights(loaded, done.model, None, folder))
        yield done, None, (), None
    else:
        plan = _plan(study, wish.schedule, settings, wish.moving)
        expected = study.estimate(WIDE if plan.points else "training")
        job = Job(study.base, study.data, settings, seed, folder / "checkpoints", expected, watch)
        piloted = None
        if wish.pilot:
            job, piloted = pilot_run(job, wish.schedule, first_folder(job, plan), say)
        request = AllocationRequest(study.graph, study.budget, scaling=wish.schedule.scaling)
        with trained_moving(job, plan, request, say) as (done, ended, moves):
            by_first(lambda: keep_weights(study.base, done.model, ended, folder))
            yield done, ended, moves, piloted


def _plan(study: Study, schedule: RankSchedule, settings: TrainingConfig, moving: bool) -> Plan:
    if not moving:
        return Plan(schedule, ())
    steps = settings.total_steps(len(study.data.train))
    points = plan_of(study.graph, study.budget, schedule.scaling, settings, steps).points
    return Plan(schedule, points)


def keep_weights(loaded: LoadedModel, model: Any, schedule: RankSchedule | None, folder: Path) -> None:
    """The adapter as plain PEFT with the projector beside it; the whole model after full fine-tuning."""
    with disk_full_told(folder, lambda: "The last checkpoint is kept."):
        if schedule is not None:
            projector = trains_projector(loaded.parts)
            save_adapter(model, folder / "adapter", schedule, loaded.parts, projector_state=projector)
        else:
            write_model(folder / "model", model, loaded.processor)


def answer_and_score(study: Study, model: Any, folder: Path) -> tuple[Score, ...]:
    """Answer the test questions, keep what was said and how it was judged; returns the scores."""
    settings, training = study.config.evaluation, study.config.training
    how = Answering(settings.batch_size, settings.max_new_tokens, training.cache_gigabytes)
    with on_training_device(model):
        answer_tasks(model, study.data.reader, study.tasks, folder, how, study.estimate("evaluation"))
    return finish(folder, study.tasks)


def _records(config: Config, folder: RunFolder) -> tuple[Checked, Checked | None, tuple[Task, ...], tuple[str, ...]]:
    """Check every file before anything is trained; a built-in set is written to the run folder first.

    Binds the run to what is read, and returns the names of that last.
    """
    wish = config.data
    files = (
        write_builtin_once(wish.train, folder.path / "data")
        if wish.train in BUILTIN
        else DataFiles(Path(wish.train), wish.validation, wish.tests, wish.images, wish.benchmarks)
    )
    require_validation(config.training, validated=files.validation is not None)
    sets = [check_file(p, files.images, wish.max_image_pixels) for p in (files.train, files.validation) if p]
    names = ("data.train", "data.validation")
    read = model_inputs(resolve_model(config.model))
    for name, checked in zip(names, sets, strict=False):
        read |= data_inputs(name, checked)
    tasks = [task.limited(config.evaluation.limit) for task in tasks_of(files, (), folder.path / "images")]
    bound = bind(folder.path, read | task_inputs(tasks, folder.path), has_begun(folder.path))
    settle(sets, wish.on_bad_row, folder.path, lambda _: None)  # what is left out is said when all was looked at
    return sets[0], sets[1] if files.validation else None, tuple(tasks), bound


def _encode(
    loaded: LoadedModel,
    config: Config,
    reader: Reader,
    train: Checked,
    validation: Checked | None,
    tasks: Sequence[Task],
    folder: RunFolder,
    say: Say,
) -> InstructionData:
    """Measure texts; encode images where the frozen tower's features can be kept in memory or on disk."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", config.data.max_length)
    length = min(config.data.max_length, longest)
    sets = [check_reading(train, reader, length)]
    if validation is not None:
        chosen = sample_numbers(len(validation.records), config.data.validation_limit)
        sets.append(check_reading(replace(validation, records=validation.records.select(chosen)), reader, length))
    settle(sets, config.data.on_bad_row, folder.path if is_first() else None, say)
    images = {path for checked in sets for _, path in checked.records.images()}
    disk = config.training.disk_cache_gigabytes
    store = FeatureStore(folder.path / "features", disk) if disk else None
    with on_training_device(loaded.model):
        features = tower_features(loaded, reader, images, tasks, config.training.cache_gigabytes, say, store)
    reader = with_features(reader, features or None)
    data = [InstructionDataset.of_checked(checked, reader) for checked in sets]
    return InstructionData(data[0], data[1] if validation is not None else None, reader)

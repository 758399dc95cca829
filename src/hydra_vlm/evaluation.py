"""A model's answers to a set of tasks, kept batch by batch, and what they are worth.

An evaluation folder: `evaluation.json` (what was asked), `environment.json`, `examples/<benchmark>.jsonl`, and for
each adapter, or `base`, `answers/<label>/{predictions/, verdicts/, scores.json}`. Started again, it goes on after the
last batch that was saved; what is finished is read back without loading the model.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hydra_vlm.benchmarks.generation import Answering, answer, cutting
from hydra_vlm.benchmarks.protocol import Prediction, Rule, Score
from hydra_vlm.benchmarks.rescoring import finish, read_predictions, write_examples
from hydra_vlm.benchmarks.suite import Task, open_tasks, published
from hydra_vlm.data.feature_store import FeatureStore, StoredFeatures, read_rows
from hydra_vlm.data.features import Features, encode_into, encode_once, feature_bytes
from hydra_vlm.data.readers import Reader, SplicingReader, open_reader
from hydra_vlm.data.templates import AUTO, require_template
from hydra_vlm.errors import ConfigError, RunFolderError
from hydra_vlm.faults import disk_full_told, out_of_memory_told
from hydra_vlm.files import require_place, write_json, write_lines
from hydra_vlm.inputs import bind, folder_inputs, model_inputs, require_unchanged, task_inputs
from hydra_vlm.lora import SCHEDULE, adapted, read_schedule
from hydra_vlm.models.loading import LoadedModel, load_model, resolve_device, resolve_model
from hydra_vlm.models.quantization import NONE
from hydra_vlm.models.structure import TOWER
from hydra_vlm.names import file_name
from hydra_vlm.ownership import contents, owned
from hydra_vlm.reading import read_json
from hydra_vlm.run_folder import environment, keep_session, session_changes
from hydra_vlm.stored_adapter import base_quantization, read_adapter

BASE = "base"
Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluationRequest:
    """What `evaluate` is asked: a model, adapters on it, and tasks.

    `data` is a folder of benchmarks, a LLaVA-format file (with `images`, its image folder) or a built-in set;
    `benchmarks` names some of the six (none: all that are there). `base` scores the model as it is, too; it always is
    when there is no adapter. `max_new_tokens` None is each benchmark's own.
    """

    model: str
    data: str
    adapters: tuple[str, ...] = ()
    base: bool = False
    benchmarks: tuple[str, ...] = ()
    images: str | None = None
    limit: int | None = None
    seed: int = 0
    rule: Rule = "published"
    batch_size: int = 32
    max_new_tokens: int | None = None
    template: str = AUTO
    device: str = "auto"
    dtype: str = "auto"
    decoder_pattern: str | None = None
    cache_gigabytes: float = 2.0
    other_base: bool = False

    @property
    def answering(self) -> Answering:
        return Answering(self.batch_size, self.max_new_tokens, self.cache_gigabytes)

    @property
    def labels(self) -> dict[str, Path | None]:
        """Folder name of the answers to the adapter, or None for the model as it is.

        A folder `adapter` goes by the name of its trial; equal names are told apart by a number.
        """
        named: dict[str, Path | None] = {BASE: None} if self.base or not self.adapters else {}
        for adapter in map(Path, self.adapters):
            name = adapter.resolve().name
            name = adapter.resolve().parent.name if name == "adapter" else name
            label, number = name, 2
            while label in named:
                label, number = f"{name}-{number}", number + 1
            named[file_name(label, f"adapter {adapter}: folder")] = adapter
        return named

    def to_json(self) -> dict[str, Any]:
        asked = asdict(self) | {"adapters": list(self.adapters), "benchmarks": list(self.benchmarks)}
        return {key: value for key, value in asked.items() if value or key != "other_base"}


def _open(request: EvaluationRequest, quantization: str, tasks: Sequence[Task], say: Say) -> tuple[LoadedModel, Reader]:
    """Model and reader; for several adapters with the features of all images, which they share."""
    where = (request.device, request.decoder_pattern)
    loaded = load_model(request.model, *where, dtype=request.dtype, quantization=quantization)
    reader = open_reader(loaded.processor, request.template)
    if len(request.labels) == 1:
        return loaded, reader
    features = tower_features(loaded, reader, set(), tasks, request.cache_gigabytes, say)
    return loaded, with_features(reader, features or None)


def evaluate(request: EvaluationRequest, out: Path, say: Say = print) -> dict[str, tuple[Score, ...]]:
    """Scores by label, of one base model that is loaded once, and once more where adapters want it in four bits.

    Raises:
        HydraError: an unknown model, adapter, template or benchmark, or data that is incomplete, before any answer.
    """
    require_template(request.template)
    resolve_model(request.model)
    for folder in map(Path, request.adapters):
        if not (folder / SCHEDULE).is_file():
            raise ConfigError(f"adapter {folder} has no {SCHEDULE}: give a folder that hydra-vlm saved an adapter in")
        read_schedule(folder / SCHEDULE)
        read_adapter(folder)
    _require_folder(out, request)
    with owned(out, say=say):
        return _evaluate(request, out, say)


def _evaluate(request: EvaluationRequest, out: Path, say: Say) -> dict[str, tuple[Score, ...]]:
    tasks = _tasks(request, out)
    read = model_inputs(resolve_model(request.model)) | task_inputs(tasks, out)
    for label, adapter in request.labels.items():
        read |= folder_inputs(f"adapter {label}", adapter) if adapter is not None else {}
    bound = bind(out, read, begun=any((out / "answers").glob("*")))
    write_json(out / "evaluation.json", request.to_json())
    keep_session(out, environment(request.device, request.dtype))
    for line in session_changes(out):
        say(line)
    write_examples(out, tasks)
    opened: tuple[LoadedModel, Reader] | None = None
    kind, scores = NONE, {}
    for label, adapter in request.labels.items():
        folder = out / "answers" / label
        if not all(_finished(folder, task) for task in tasks):
            say(f"{label}: {sum(len(task.examples) for task in tasks):,} questions")
            wanted = base_quantization(adapter, resolve_device(request.device)) if adapter is not None else NONE
            if wanted != kind:
                say(f"{label}: the base with quantization={wanted}, as for its training")
                opened, kind = None, wanted
            loaded, reader = opened = opened or _open(request, kind, tasks, say)
            with _model(loaded, adapter, request) as model:
                answer_tasks(model, _own_features(reader, adapter), tasks, folder, request.answering)
            require_unchanged(out, bound, folder)
        scores[label] = finish(folder, tasks)
    return scores


def answer_tasks(
    model: Any,
    reader: Reader,
    tasks: Sequence[Task],
    folder: Path,
    settings: Answering,
    estimate: Callable[[], str] = str,
) -> None:
    """Answer what `folder` has no prediction of yet; each batch is on the disk before the next begins.

    `estimate` is asked for what this was expected to take, should memory run out.
    """
    for task in tasks:
        path = folder / "predictions" / f"{task.name}.jsonl"
        done = read_predictions(path, task)
        write_lines(path, (p.to_json() for p in done))  # without a line that was cut off
        own = replace(settings, max_new_tokens=settings.max_new_tokens or task.benchmark.max_new_tokens)
        with _faults_told(task.name, path, settings.batch_size, estimate), path.open("a", encoding="utf-8") as file:

            def save(new: list[Prediction], file: Any = file) -> None:
                file.write("".join(json.dumps(p.to_json()) + "\n" for p in new))
                file.flush()
                os.fsync(file.fileno())

            answer(
                model,
                reader,
                task.examples,
                own,
                pads=task.benchmark.pads,
                done={p.id for p in done},
                save=save,
                progress=partial(tqdm, desc=f"answering {task.name}", leave=False),
            )


@contextmanager
def _faults_told(name: str, path: Path, batch_size: int, estimate: Callable[[], str]) -> Iterator[None]:
    def kept() -> str:
        return f"The answers before are kept in {path}."

    def remedy() -> str:
        lower = "Lower max_new_tokens, or choose dtype bfloat16."
        if batch_size > 1:
            lower = f"Lower the batch size of the evaluation, now {batch_size}, and repeat the command: it goes on."
        return f"{estimate()} {lower}".strip()

    with disk_full_told(path, kept), out_of_memory_told(f"answering {name}", remedy, kept):
        yield


def tower_features(
    loaded: LoadedModel,
    reader: Reader,
    images: set[str],
    tasks: Sequence[Task],
    gigabytes: float,
    say: Say = print,
    store: FeatureStore | None = None,
) -> Features:
    """`images` and the tasks' images through a frozen tower, once: into memory where `gigabytes` hold all features,
    else onto the disk where `store` holds them, else nothing."""
    if not isinstance(reader, SplicingReader) or TOWER in loaded.parts.graph.part_layers:
        return {}
    padded = images.union(*(task.images for task in tasks if task.benchmark.pads))
    cut = set().union(*(task.images for task in tasks if not task.benchmark.pads))
    size = feature_bytes(loaded.model, len(padded) + len(cut)) / 1e9
    if store is not None and size > store.gigabytes:
        store = None
    if not size or (size > gigabytes and store is None):
        return {}
    say(f"features: {len(padded) + len(cut):,} images through the frozen tower, once")
    progress = partial(tqdm, desc="encoding", leave=False)
    halves = [(own.processor, paths) for own, paths in ((reader, padded), (cutting(reader), cut))]
    if store is None:
        return dict(pair for half in halves for pair in encode_once(loaded.model, *half, progress=progress).items())
    places = dict(
        pair for half in halves for pair in encode_into(store, loaded.model, *half, progress=progress).items()
    )
    return read_rows(places) if size <= gigabytes else StoredFeatures(places)


def with_features(reader: Reader, features: Features | None) -> Reader:
    """The reader with these tower features in place of its own; a reader that takes none is returned as it is."""
    return replace(reader, features=features) if isinstance(reader, SplicingReader) else reader


def write_references(request: EvaluationRequest, out: Path, target: Path) -> list[Path]:
    """The answers in the result files of each benchmark's own scorer, under `target`/<label>/<benchmark>."""
    written = []
    for task in _tasks(request, out):
        form = published(task.benchmark)
        if form is None or task.root is None:
            continue
        for label in request.labels:
            predictions = read_predictions(out / "answers" / label / "predictions" / f"{task.name}.jsonl", task)
            folder = target / label / task.name
            folder.mkdir(parents=True, exist_ok=True)
            written += form.write_reference(task.root, task.examples, predictions, folder)
    return written


def _tasks(request: EvaluationRequest, out: Path) -> list[Task]:
    images = Path(request.images) if request.images else None
    tasks = open_tasks(request.data, request.benchmarks, out, request.rule, images)
    return [task.limited(request.limit, request.seed) for task in tasks]


def _finished(folder: Path, task: Task) -> bool:
    return len(read_predictions(folder / "predictions" / f"{task.name}.jsonl", task)) == len(task.examples)


@contextmanager
def _model(loaded: LoadedModel, adapter: Path | None, request: EvaluationRequest) -> Iterator[Any]:
    if adapter is None:
        yield loaded.model
    else:
        parts = loaded.parts if request.decoder_pattern else None
        with adapted(loaded.model, adapter, parts, request.other_base) as model:
            yield model


def _own_features(reader: Reader, adapter: Path | None) -> Reader:
    """Without the base tower's features for an adapter that reaches the tower."""
    reaches = adapter is not None and TOWER in read_schedule(adapter / SCHEDULE).graph.part_layers
    return with_features(reader, None) if reaches else reader


def _require_folder(out: Path, request: EvaluationRequest) -> None:
    """Raises RunFolderError when the folder holds another evaluation, or other files.

    Adapters may come and go as long as their labels stay theirs, and how many questions are answered at a time may
    change: neither touches the answers that are there.
    """
    require_place(out)
    if (out / "evaluation.json").is_file():
        before, asked = read_json(out / "evaluation.json"), request.to_json()
        fixed = asked.keys() - {"batch_size", "cache_gigabytes", "adapters", "base"}
        changed = [key for key in asked if key in fixed and before.get(key) != asked[key]]
        others = replace(request, adapters=tuple(before.get("adapters") or ()), base=bool(before.get("base"))).labels
        renamed = [label for label in others.keys() & request.labels.keys() if others[label] != request.labels[label]]
        if changed or renamed:
            changed += ["adapters"] if renamed else []
            listed = ", ".join(f"{key}: {before.get(key)!r} there, {asked[key]!r} now" for key in changed[:5])
            raise RunFolderError(f"{out} holds another evaluation ({listed}): name another --out")
    elif out.exists() and (not out.is_dir() or any(path.name not in ("data", "images") for path in contents(out))):
        raise RunFolderError(f"{out} exists and holds no evaluation: name an empty or new folder with --out")

"""Stage I: the projector alone is trained on captions, and a new model folder comes out.

The run folder is that of every other command, with `model/` in it. Started again with the same command, a stopped run
goes on and a finished one is left as it is.
"""

import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from hydra_vlm.config import Config
from hydra_vlm.data.builtin import CAPTIONS, QUESTIONS
from hydra_vlm.data.templates import AUTO
from hydra_vlm.errors import ConfigError, RunFolderError
from hydra_vlm.files import whole_folder, write_json, write_lines
from hydra_vlm.models.loading import LoadedModel, resolve_model
from hydra_vlm.models.weights import write_model
from hydra_vlm.processes import by_first
from hydra_vlm.records import TrialRecord
from hydra_vlm.run_folder import owning
from hydra_vlm.training.frugality import require_frugality
from hydra_vlm.training.recipe import finetune, prepare_projector
from hydra_vlm.trials import Say, Study, finished, prepare_study

NAME = "projector"
TEMPLATE = "plain"


def pretrain(config: Config, out: Path, say: Say = print) -> TrialRecord:
    """Train the projector with the first of the seeds and write `out`/model.

    Raises:
        HydraError: a template other than `plain`, a model without projector, or what `prepare_study` finds wrong.
    """
    require_frugality(config, trains_base=True)
    if config.training.start_from is not None:
        raise ConfigError("training.start_from is for LoRA: stage I trains the projector alone, so leave the key out")
    config = stage_one(config)
    with owning(out, say):
        return _pretrain(config, out, say)


def _pretrain(config: Config, out: Path, say: Say) -> TrialRecord:
    study = prepare_study(config, out, say)
    seed = config.seeds[0]
    folder, model_folder = study.folder.trial(f"{NAME}-seed{seed}"), study.folder.path / "model"
    by_first(partial(_require_own_seed, folder, model_folder))
    stored = folder / "record.json"
    before = by_first(lambda: finished(stored) if model_folder.is_dir() else None)
    if before is not None:
        return before
    started = time.monotonic()
    loaded, record = _train(study, seed, folder, started)
    study.require_unchanged(folder)
    by_first(lambda: _keep(loaded, resolve_model(study.config.model), model_folder, record, folder))
    return record


def _require_own_seed(folder: Path, model_folder: Path) -> None:
    """Raise where `model/` is that of another seed: a run folder of stage I holds one model."""
    others = sorted(path.parent.name for path in folder.parent.glob(f"{NAME}-seed*/record.json"))
    if model_folder.is_dir() and others and folder.name not in others:
        raise RunFolderError(
            f"{model_folder} is the model of {others[0]}, and {folder.name} would replace it: name another --out"
        )


def _keep(loaded: LoadedModel, source: Path, model_folder: Path, record: TrialRecord, folder: Path) -> None:
    write_lines(folder / "metrics.jsonl", record.metrics())
    save_model(loaded, source, model_folder)
    write_json(folder / "record.json", record.to_json())
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def stage_one(config: Config) -> Config:
    """The configuration with the template of stage I, and captions in place of a built-in set of questions.

    Raises:
        ConfigError: another template was asked for.
    """
    if config.data.template not in (AUTO, TEMPLATE):
        raise ConfigError(
            f"data.template {config.data.template!r}: stage I reads an image and its caption alone, so leave it out or "
            f"set it to {TEMPLATE}"
        )
    train = CAPTIONS if config.data.train in QUESTIONS else config.data.train
    return config.model_copy(update={"data": config.data.model_copy(update={"template": TEMPLATE, "train": train})})


def save_model(loaded: LoadedModel, source: Path, folder: Path) -> None:
    """Model and processor as a folder, whole or not there; weights in the source folder's dtype, so that frozen ones
    stay what they were, the projector in float32."""
    loaded.model.to(AutoConfig.from_pretrained(source, trust_remote_code=False).dtype or torch.float32)
    if loaded.parts.projector is not None:
        loaded.model.get_submodule(loaded.parts.projector).float()
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped before its record was written
    with whole_folder(folder) as draft:
        write_model(draft, loaded.model, loaded.processor)


def _train(study: Study, seed: int, folder: Path, started: float) -> tuple[LoadedModel, TrialRecord]:
    loaded = study.fresh_model()
    settings = study.config.training.model_copy(update={"rates": "single"})  # the projector alone has the learning rate
    model: Any = prepare_projector(loaded)
    done = finetune(model, loaded, study.data, settings, seed, folder / "checkpoints")
    trained = {part: count for part, count in done.trained.items() if count}
    record = TrialRecord(
        name=NAME,
        seed=seed,
        schedule=None,
        trained=trained,
        train_losses=done.train_losses,
        validation_loss=done.validation_loss,
        scores=(),
        seconds=time.monotonic() - started,
        validation_losses=done.validation_losses,
        kept_step=done.kept_step,
    )
    return loaded, record

"""Files of strangers: a pickle in a model's folder or in a checkpoint is refused and does not run."""

import json
import os
from pathlib import Path

import pytest
import torch

from hydra_vlm import trials
from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.models.loading import load_model
from hydra_vlm.training.recipe import adapting, finetune
from tiny import save_tiny_model, toy_config


class Hostile:
    """Unpickled as it is meant to be, it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_among_a_models_weights_is_refused(tmp_path: Path, zipped: bool) -> None:
    folder, trace = save_tiny_model(tmp_path / "model", layers=1), tmp_path / "it ran"
    (folder / "model.safetensors").unlink()
    torch.save({"w": Hostile(trace)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"more than tensors.*could run .*code.*safetensors"):
        load_model(str(folder), "cpu")
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)  # what would have happened
    assert trace.exists()


def test_code_that_a_model_brings_is_never_run(tmp_path: Path) -> None:
    folder, trace = save_tiny_model(tmp_path / "model", layers=1), tmp_path / "it ran"
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(trace)!r})\n")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForImageTextToText": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="code of its own, which is never run"):
        load_model(str(folder), "cpu")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_refused(tiny_model: Path, toy_data: Path, tmp_path: Path, name: str) -> None:
    config = toy_config(tiny_model, toy_data, "training.steps=2")
    study = trials.prepare_study(config, tmp_path / "run", lambda _: None)
    schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
    folder, trace = tmp_path / "checkpoints", tmp_path / "it ran"
    with adapting(study.base, schedule, config.training, 0) as model:
        finetune(model, study.base, study.data, config.training, 0, folder)
    torch.save({"state": Hostile(trace)}, folder / "checkpoint-2" / name)
    longer = config.training.model_copy(update={"steps": 4})
    with adapting(study.base, schedule, longer, 0) as model, pytest.raises(CheckpointError, match=r"could run .*code"):
        finetune(model, study.base, study.data, longer, 0, folder)
    assert not trace.exists()

"""What is overridden of transformers' Trainer has the signatures that were overridden, and is called."""

import inspect
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hydra_vlm.training.trainer import VLMTrainer
from striking import Place, raising
from tiny import write_toy_data

SIGNATURES = {
    "_get_train_sampler": ["train_dataset"],
    "create_optimizer": ["model"],
    "create_scheduler": ["num_training_steps", "optimizer"],
    "create_accelerator_and_postprocess": [],
    "_get_dataloader": ["dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "evaluation_loop": ["dataloader", "description", "prediction_loss_only", "ignore_keys", "metric_key_prefix"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_clip_grad_norm": ["model"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_run_epoch": [
        *("model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial"),
        *("ignore_keys_for_eval", "start_time", "resume_from_checkpoint", "epochs_trained"),
        "steps_trained_in_current_epoch",
    ],
    "_save_checkpoint": ["model", "trial"],
    "save_model": ["output_dir", "_internal_call"],
    "_save_optimizer_and_scheduler": ["output_dir"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
    "_save": ["output_dir", "state_dict"],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
}


def overridden() -> list[str]:
    return [name for name in vars(VLMTrainer) if name != "__init__" and callable(getattr(Trainer, name, None))]


def test_signatures_are_those_that_were_overridden() -> None:
    found = {name: list(inspect.signature(getattr(Trainer, name)).parameters)[1:] for name in overridden()}
    assert found == {name: SIGNATURES[name] for name in overridden()}
    assert sorted(overridden()) == sorted(SIGNATURES)


def test_each_of_them_is_called_in_a_run_that_is_stopped_and_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tiny_model, write_toy_data(tmp_path / "toy"), tmp_path, monkeypatch)
    place.at_step(4, raising(RuntimeError("struck")))
    options = ("training.steps=4", "training.group_by_length=true")
    with pytest.raises(RuntimeError, match="struck"):
        place.train(*options)
    calls: Counter[str] = Counter()

    def counted(name: str) -> Any:
        real = getattr(VLMTrainer, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(self, *args, **kwargs)

        return call

    monkeypatch.undo()
    for name in overridden():
        monkeypatch.setattr(VLMTrainer, name, counted(name))
    seen: list[tuple[torch.Tensor, int]] = []
    run_epoch = VLMTrainer._run_epoch

    def noting(self: Any, *args: Any, **kwargs: Any) -> None:
        run_epoch(self, *args, **kwargs)
        seen.append((self._tr_loss, self._globalstep_last_logged))

    monkeypatch.setattr(VLMTrainer, "_run_epoch", noting)
    place.train(*options)
    assert {name for name in overridden() if not calls[name]} == set()
    assert calls["training_step"] == 2  # from checkpoint 2 on
    assert (float(seen[-1][0]), seen[-1][1]) == (0.0, 4)  # what was not logged yet, and since when

"""TensorBoard, Weights & Biases and trackio, through the Trainer's integrations, on this machine alone."""

import importlib.util
from pathlib import Path

import pytest

from hydra_vlm.training.trackers import run_name
from striking import Place
from tiny import write_toy_data


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tiny_model, write_toy_data(tmp_path / "toy"), tmp_path, monkeypatch)


def need(name: str) -> None:
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed (extra `trackers`)")


def test_a_run_goes_by_run_folder_and_trial(tmp_path: Path) -> None:
    assert run_name(tmp_path / "mine/trials/coarse-seed0") == "mine/coarse-seed0"
    assert run_name(tmp_path / "mine") == "mine"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_tensorboard_is_told_the_losses_within_the_run_folder(place: Place) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = place.train("training.trackers=tensorboard")
    read = EventAccumulator(str(place.trial / "tensorboard"))
    read.Reload()
    told = {event.step: event.value for event in read.Scalars("train/loss")}
    assert told == pytest.approx(dict(record.train_losses), rel=1e-6)
    assert len(read.Scalars("train/learning_rate")) == len(read.Scalars("train/grad_norm")) == len(told)
    assert read.Scalars("eval/loss")[-1].value == pytest.approx(record.validation_loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_wandb_offline_writes_one_run_within_the_run_folder(place: Place) -> None:
    need("wandb")
    place.patch.setenv("WANDB_MODE", "offline")
    place.patch.setenv("WANDB_SILENT", "true")
    place.train("training.trackers=wandb")
    import wandb

    assert wandb.run is None
    kept = list((place.trial / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 1
    assert b"train/grad_norm" in kept[0].read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trackio's own
def test_trackio_keeps_the_losses_on_this_machine(place: Place) -> None:
    need("trackio")
    place.patch.setenv("TRACKIO_DIR", str(place.path / "trackio"))
    record = place.train("training.trackers=trackio")
    import sqlite3

    (database,) = (place.path / "trackio").glob("hydra-vlm*.db")
    with sqlite3.connect(database) as opened:
        (count,) = opened.execute("select count(*) from metrics").fetchone()
    assert count >= len(record.train_losses)

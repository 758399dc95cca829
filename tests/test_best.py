"""The weights of the lowest validation loss and early stopping: what is kept, said, and the same after a stop."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydra_vlm import trials
from hydra_vlm.config import TrainingConfig, load_config
from hydra_vlm.errors import CheckpointError, ConfigError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.pretrain import pretrain
from hydra_vlm.records import TrialRecord
from hydra_vlm.training import recipe, trainer
from hydra_vlm.training.best import load_best, worse_in_a_row
from hydra_vlm.training.checkpoints import best_step, damage_of, validation_losses
from hydra_vlm.training.sharding import trained_state
from striking import Place, killing, quiet, raising
from test_resuming import results
from tiny import toy_config, write_toy_data

BEST = (
    "training.steps=12",
    "training.learning_rate=0.05",  # so large that the loss goes up again, after step 3 and after step 5
    "training.rates=single",
    "training.save_steps=2",
    "training.keep=best",
    "training.watch_steps=1",
    "training.dropout=0.1",
)
PATIENT = (*BEST, "training.patience=1")


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tiny_model, write_toy_data(tmp_path / "toy"), tmp_path, monkeypatch)


def kept_weights(place: Place) -> dict[str, Tensor]:
    return load_file(place.trial / "adapter/adapter_model.safetensors")


def test_the_lowest_loss_is_found_and_waited_for() -> None:
    history: list[dict[str, Any]] = [
        {"step": 1, "loss": 9.0},
        {"step": 1, "eval_loss": 2.0},
        {"step": 2, "eval_nonfinite": 3},
        {"step": 3, "eval_loss": 1.5},
        {"step": 4, "eval_loss": 1.5},
        {"step": 5, "eval_nonfinite": 1},
    ]
    losses = validation_losses(history)
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5]
    assert best_step(losses) == 3  # the first of equals
    assert worse_in_a_row(losses) == 2
    assert best_step(losses[1:2]) is None
    assert worse_in_a_row(losses[1:2]) == 1
    assert worse_in_a_row(()) == 0


def test_the_best_weights_are_kept_and_training_stops(place: Place) -> None:
    seen: dict[int, dict[str, Tensor]] = {}
    real = trainer.VLMTrainer.training_step

    def noting(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        seen[self.state.global_step] = {k: v.clone() for k, v in trained_state(self.model).items()}
        return real(self, *args, **kwargs)

    place.patch.setattr(trainer.VLMTrainer, "training_step", noting)
    record = place.train(*PATIENT)
    losses = dict(record.validation_losses)
    assert list(losses) == [1, 2, 3, 4]
    assert losses[4] > losses[3] == min(losses.values()) == record.validation_loss
    assert record.kept_step == 3
    assert [step for step, _ in record.train_losses] == [1, 2, 3, 4]
    kept = kept_weights(place)
    plain = {name.replace(".default", ""): value for name, value in seen[3].items() if ".lora_" in name}
    assert kept.keys() == plain.keys()
    assert all(torch.equal(kept[name], value) for name, value in plain.items())
    projector = load_file(place.trial / "adapter/projector.safetensors")
    assert all(torch.equal(projector[n], seen[3][f"base_model.model.model.mm_projector.{n}"]) for n in projector)
    assert "weights of step 3, the lowest of 4; training ended after step 4" in record.summary()
    stored = json.loads((place.trial / "record.json").read_text())
    assert TrialRecord.from_json(stored) == record
    assert not (place.trial / "checkpoints").exists()


def test_without_patience_it_goes_on_to_the_end(place: Place) -> None:
    record = place.train(*BEST, "training.watch_steps=3", "training.steps=7")
    assert [step for step, _ in record.validation_losses] == [3, 6, 7]
    losses = {loss: step for step, loss in record.validation_losses}
    assert record.kept_step == losses[min(losses)]


def test_stopped_and_killed_it_keeps_and_ends_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in steps after which a validation loss is due, and breaks that leave a checkpoint of an earlier step."""
    toy = write_toy_data(tmp_path / "toy")
    whole = Place(tiny_model, toy, tmp_path / "whole", monkeypatch)
    expected = whole.train(*PATIENT)
    cut = Place(tiny_model, toy, tmp_path / "cut", monkeypatch)
    real = trainer.VLMTrainer.training_step
    strikes: list[tuple[int, Callable[[Any], None], type[BaseException]]] = [
        (1, killing(15), Interrupted),
        (3, raising(MemoryError()), Exception),  # the best is that of step 2, the checkpoint that of step 2
        (3, killing(15), Interrupted),
        (4, raising(RuntimeError("struck")), RuntimeError),
        (4, killing(15), Interrupted),  # the loss of step 4 ends the training, and is taken when it goes on
    ]
    for step, act, ends in strikes:
        cut.at_step(step, act)
        with pytest.raises(ends):
            cut.train(*PATIENT)
        monkeypatch.setattr(trainer.VLMTrainer, "training_step", real)
    left = {path.name for path in (cut.trial / "checkpoints").glob("best-*")}
    assert left == {"best-2.safetensors", "best-3.safetensors"}  # of the last checkpoint, and of the one before
    modes = {path: path.stat().st_mode & 0o777 for path in cut.trial.rglob("*") if path.is_file()}
    assert len(set(modes.values())) == 1, modes  # that of the umask
    found = cut.train(*PATIENT)
    assert (found.train_losses, found.validation_losses) == (expected.train_losses, expected.validation_losses)
    assert (found.kept_step, found.validation_loss) == (expected.kept_step, expected.validation_loss)
    assert results(cut) == results(whole)


def test_best_weights_that_do_not_read_take_their_checkpoint_with_them(place: Place) -> None:
    expected = dict(Place(place.model, place.toy, place.path / "other", place.patch).train(*PATIENT).validation_losses)
    place.at_step(4, killing(15))
    with pytest.raises(Interrupted):
        place.train(*PATIENT)
    assert place.checkpoints == ["checkpoint-2", "checkpoint-4"]
    (place.trial / "checkpoints/best-3.safetensors").write_bytes(b"torn")
    said: list[str] = []
    place.patch.setattr("hydra_vlm.training.guarded.say", said.append)
    record = place.train(*PATIENT)
    assert [line for line in said if "checkpoint of step 4 is damaged (best-3.safetensors" in line]
    assert dict(record.validation_losses) == expected
    assert record.kept_step == 3


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 3)}, tmp_path / "best-4.safetensors")
    for model in (torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(3, 2)):
        with pytest.raises(CheckpointError, match=r"best-4\.safetensors.*other weights"):
            load_best(model, tmp_path, 4)
    with pytest.raises(CheckpointError, match="does not read"):
        load_best(torch.nn.Linear(3, 2), tmp_path, 5)


def test_the_whole_decoder_and_stage_one_keep_the_best(place: Place) -> None:
    options = (*PATIENT, "training.steps=5", "training.full_learning_rate=0.05", "training.batch_size=4")
    study = trials.prepare_study(toy_config(place.model, place.toy, *options), place.run, quiet)
    full = trials.run_trial(study, "full", None, 0, quiet)
    first = pretrain(toy_config(place.model, place.toy, *options, "data.tests={}"), place.path / "stage-one", quiet)
    for record in (full, first):
        losses = dict(record.validation_losses)
        assert record.validation_loss == min(losses.values()) == losses[record.kept_step or 0]


def test_what_cannot_be_is_refused_at_once(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"training\.keep=best as well"):
        load_config(None, ["training.patience=3"])
    with pytest.raises(ConfigError, match=r"no validation records: name a file as data\.validation"):
        place.train(*BEST, "data.validation=null")
    assert not place.trial.exists()


# A validation loss that is no number


def strictly(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_records_whose_loss_is_no_number_are_named_and_nothing_else_is_lost(place: Place) -> None:
    real = trainer.token_losses

    def spoilt(logits: Tensor, labels: Tensor, positions: Any) -> Tensor:
        losses = real(logits, labels, positions)
        return losses.index_fill(1, torch.tensor([0]), math.nan) if losses.shape[0] == 1 else losses

    place.patch.setattr(trainer, "token_losses", spoilt)  # the first token of every batch
    said: list[str] = []
    place.patch.setattr("hydra_vlm.training.nonfinite.say", said.append)
    record = place.train("training.keep=best", "training.watch_steps=2")
    assert math.isnan(record.validation_loss)
    assert record.kept_step is None
    assert [step for step, _ in record.validation_losses] == [2, 4, 5]
    named = strictly((place.trial / "nonfinite-validation-5.json").read_text())
    assert [one["id"] for one in named["records"]] == ["toy-0"]
    assert "row 0 (line" in named["records"][0]["place"]
    assert sum("the validation loss is no number" in line and "toy-0" in line for line in said) == 3
    assert "nonfinite-validation-5.json" in record.summary()
    for line in (place.trial / "metrics.jsonl").read_text().splitlines():
        strictly(line)
    stored = strictly((place.trial / "record.json").read_text())
    assert stored["validation_loss"] is None
    assert [loss for _, loss in stored["validation_losses"]] == [None] * 3
    assert math.isnan(TrialRecord.from_json(stored).validation_loss)


# Losses of short runs, and of runs with steps that are left out


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (["training.steps=1"], [1]),
        (["training.steps=null", "training.epochs=0.01"], [1]),
        (["training.steps=null", "training.epochs=0.7", "training.batch_size=64"], [1]),  # more than there are records
        (["training.steps=null", "training.epochs=1.5", "training.batch_size=4"], [1, 2, 3]),
    ],
)
def test_losses_are_logged_however_few_steps_there_are(place: Place, options: list[str], steps: list[int]) -> None:
    record = place.train(*options)
    assert [step for step, _ in record.train_losses] == steps
    lines = [json.loads(line) for line in (place.trial / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["validation_loss"] == record.validation_loss


def logged_every(place: Place, steps: int) -> None:
    own = recipe.training_arguments

    def arguments(*given: Any) -> Any:
        made = own(*given)
        made.logging_steps = steps
        return made

    place.patch.setattr(recipe, "training_arguments", arguments)


def test_the_last_steps_loss_is_logged_whatever_the_interval(place: Place) -> None:
    logged_every(place, 2)
    record = place.train("data.validation=null")
    assert [step for step, _ in record.train_losses] == [2, 4, 5]
    assert "no validation records" in record.summary()
    assert json.loads((place.trial / "record.json").read_text())["validation_loss"] is None


def test_the_interval_follows_the_number_of_steps(tmp_path: Path) -> None:
    made = [recipe.training_arguments(TrainingConfig(steps=n), 0, tmp_path, torch.device("cpu")) for n in (1, 79, 400)]
    assert [one.logging_steps for one in made] == [1, 1, 10]
    assert [one.warmup_steps for one in made] == [0, 0.03, 0.03]  # the first step of a warm-up has rate 0
    settings = TrainingConfig(steps=None, epochs=2.5, batch_size=4)
    assert [settings.total_steps(n) for n in (1, 4, 9)] == [3, 3, 8]
    assert TrainingConfig(steps=7).total_steps(10**6) == 7


def test_a_step_that_is_left_out_has_no_part_in_the_losses(place: Place) -> None:
    """Of two device batches a step; every second step is logged, and step 3 is left out."""
    options = ("training.steps=6", "training.device_batch_size=2", "training.save_steps=1000", "data.validation=null")
    logged_every(place, 2)
    lower = ("training.learning_rate=1e-30", "evaluation.max_new_tokens=1")  # weights stay, so losses tell batches
    other = Place(place.model, place.toy, place.path / "other", place.patch)
    expected = dict(other.train(*options, *lower).train_losses)
    seen: list[float] = []
    real = trainer.VLMTrainer.training_step

    def noting(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss = real(self, *args, **kwargs)
        if self.state.global_step == 3:
            seen.append(float(loss))
        return loss

    place.patch.setattr("hydra_vlm.training.nonfinite.say", quiet)
    place.patch.setattr(trainer.VLMTrainer, "training_step", noting)
    place.spoil_loss({3}, math.nan)
    found = dict(place.train(*options, *lower, "training.skip_spikes=1").train_losses)
    assert list(found) == list(expected) == [2, 4, 6]
    assert found[4] == pytest.approx(sum(seen), abs=1e-6)  # that of step 4 alone
    assert found[4] != pytest.approx(expected[4], abs=1e-4)
    del found[4], expected[4]
    assert found == pytest.approx(expected, abs=1e-6)


# Checkpoints


STATES: list[Callable[[dict[str, Any]], Any]] = [
    lambda state: {**state, "global_step": 10**9},
    lambda state: {**state, "global_step": -4},
    lambda state: {**state, "global_step": "4"},
    lambda state: {**state, "log_history": [{"step": 10**7, "loss": 1.0}]},
    lambda state: {**state, "log_history": "none"},
    lambda state: {**state, "log_history": [7]},
    lambda state: {**state, "epoch": "half"},
    lambda state: {**state, "stateful_callbacks": {"unlogged_losses": {"sum": 1.0, "since": 10**6}}},
    lambda state: {**state, "stateful_callbacks": {"unlogged_losses": {"sum": "x", "since": 0}}},
    lambda state: {**state, "stateful_callbacks": []},
    lambda state: {**state, "unknown": 1},
    lambda state: [],
    lambda state: {},
]


def test_a_state_that_no_training_wrote_is_not_gone_on_from(place: Place) -> None:
    place.at_step(5, raising(RuntimeError("struck")))
    with pytest.raises(RuntimeError, match="struck"):
        place.train()
    last = place.trial / "checkpoints/checkpoint-4"
    path = last / "trainer_state.json"
    sound = json.loads(path.read_text())
    assert damage_of(last) is None
    for change in STATES:
        path.write_text(json.dumps(change(dict(sound))))
        assert "trainer_state.json" in (damage_of(last) or ""), json.dumps(change(dict(sound)))[:200]
    said: list[str] = []
    place.patch.setattr("hydra_vlm.training.guarded.say", said.append)
    place.recovers()
    assert place.checkpoints == []


def test_a_checkpoint_of_another_run_is_named(place: Place) -> None:
    for name, options in (("run", ()), ("other", ("budget.rank=2",))):
        one = Place(place.model, place.toy, place.path / name, place.patch)
        one.at_step(5, raising(RuntimeError("struck")))
        with pytest.raises(RuntimeError, match="struck"):
            one.train(*options)
        place.patch.undo()
    mine, other = (place.path / name / "run/trials/it-seed0/checkpoints" for name in ("run", "other"))
    for step in (2, 4):
        for path in (other / f"checkpoint-{step}").iterdir():
            (mine / f"checkpoint-{step}" / path.name).write_bytes(path.read_bytes())
    one = Place(place.model, place.toy, place.path / "run", place.patch)
    assert "checkpoint-4 does not fit this run" in one.message()

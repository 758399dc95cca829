"""The whole job on a tiny model: what it leaves behind, how it goes on, what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hydra_vlm import compare, measuring, schedules, trials
from hydra_vlm.errors import BudgetError, ConfigError, DataError, GraphMismatchError, RunFolderError, StageError
from hydra_vlm.files import read_json, write_json
from hydra_vlm.lora import load_adapter
from hydra_vlm.models.loading import load_model
from hydra_vlm.records import TrialRecord
from hydra_vlm.training.trainer import VLMTrainer
from tiny import toy_config
from tolerances import assert_same_sums

SPLIT_UP = "schedules=[uniform,coarse,fine,full]"


def quiet(_: str) -> None:
    """Say nothing."""


def record(run: Path, key: str) -> TrialRecord:
    return TrialRecord.from_json(read_json(run / "trials" / key / "record.json"))


def outcome(run: Path) -> dict[str, tuple[object, ...]]:
    """All that must not depend on interruptions."""
    records = [TrialRecord.from_json(read_json(path)) for path in sorted(run.glob("trials/*/record.json"))]
    return {r.key: (r.schedule, r.trained, r.train_losses, repr(r.validation_loss), r.scores) for r in records}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over the toy data, with the data beside it."""
    from tiny import write_toy_data

    home = tmp_path_factory.mktemp("finished")
    data = write_toy_data(home / "toy")
    compare.compare(toy_config(tiny_model, data, SPLIT_UP), home / "run", quiet)
    return home


def test_a_run_leaves_its_records(finished: Path, tiny_model: Path) -> None:
    run = finished / "run"
    for name in ("config.yaml", "environment.json", "graph.json", "profile.json", "schedules/coarse.json"):
        assert (run / name).is_file(), name
    assert sorted(path.name for path in (run / "trials").iterdir()) == [
        "coarse-seed0",
        "fine-seed0",
        "full-seed0",
        "uniform-seed0",
        "zero-shot-seed0",
    ]
    graph = load_model(str(tiny_model), "cpu").parts.graph
    uniform, full = record(run, "uniform-seed0"), record(run, "full-seed0")
    assert uniform.schedule is not None
    assert uniform.trained["lora"] == uniform.schedule.parameters == 4 * graph.cost
    assert full.trained["decoder"] > 0
    assert full.schedule is None
    for name in ("coarse", "fine"):
        trial = record(run, f"{name}-seed0")
        assert trial.schedule is not None
        assert trial.schedule.name == name
        assert trial.trained["lora"] == trial.schedule.parameters <= 4 * graph.cost
        assert math.isfinite(trial.validation_loss)
        assert [s.benchmark for s in trial.scores] == ["toy"]
        assert set(trial.scores[0].groups) == {"colour", "shape"}
    predictions = (run / "trials/uniform-seed0/predictions/toy.jsonl").read_text().splitlines()
    assert len(predictions) == 8
    assert not list(run.rglob("checkpoint-*"))


def test_the_adapter_is_plain_peft_and_gives_the_trained_model(finished: Path, tiny_model: Path) -> None:
    folder = finished / "run/trials/fine-seed0/adapter"
    ours = load_adapter(load_model(str(tiny_model), "cpu").model, folder)
    base = load_model(str(tiny_model), "cpu").model
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        plain = PeftModel.from_pretrained(base, folder)
    projector = ours.get_base_model().model.mm_projector.state_dict()
    plain.get_base_model().model.mm_projector.load_state_dict(projector)
    ids = torch.tensor([[1, 70, 71, 72]])
    assert_same_sums(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_a_finished_run_is_not_repeated(finished: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = outcome(finished / "run")
    monkeypatch.setattr(trials, "finetune", None)
    compare.compare(toy_config(tiny_model, finished / "toy", SPLIT_UP), finished / "run", quiet)
    assert outcome(finished / "run") == before


@pytest.mark.parametrize("stop_at", [1, 3, 5])
def test_an_interrupted_training_goes_on_to_the_same_result(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    config = toy_config(tiny_model, finished / "toy", SPLIT_UP)
    write_json(tmp_path / "run/profile.json", read_json(finished / "run/profile.json"))
    (tmp_path / "run/config.yaml").write_text(config.to_yaml())
    real = VLMTrainer.training_step

    def failing(self: VLMTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == stop_at:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(config, tmp_path / "run", quiet)
    monkeypatch.setattr(VLMTrainer, "training_step", real)
    left = sorted((tmp_path / "run").rglob("checkpoint-*"))
    assert len(left) == stop_at // 2
    if left:  # and a checkpoint that was cut short is passed over
        (left[-1].parent / "checkpoint-99").mkdir()
    compare.compare(config, tmp_path / "run", quiet)
    assert outcome(tmp_path / "run") == outcome(finished / "run")


def test_a_folder_of_another_configuration_is_refused(finished: Path, tiny_model: Path) -> None:
    other = toy_config(tiny_model, finished / "toy", SPLIT_UP, "training.learning_rate=0.5")
    with pytest.raises(RunFolderError, match=r"training\.learning_rate: 0\.004 there, 0\.5 now"):
        compare.compare(other, finished / "run", quiet)
    with pytest.raises(RunFolderError, match="holds no run"):
        compare.compare(other, finished / "toy", quiet)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("budget.parameters=10", BudgetError, "below rank 1"),
        ("allocation.n_stages=9", StageError, "9"),
        ("schedules=[uniform,best]", ConfigError, "'best' does not exist"),
        ("data.template=v7", ConfigError, "template 'v7' does not exist"),
        ("data.max_length=8", DataError, "exceed 8"),
        ("training.batch_size=5", None, ""),
        ("training.device_batch_size=3", ConfigError, "not a multiple"),
        ("device=tpu9", ConfigError, "tpu9"),
        ("model=/nowhere", ConfigError, "no config.json"),
    ],
)
def test_bad_requests_stop_before_anything_is_trained(
    tiny_model: Path,
    toy_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    error: type[Exception] | None,
    message: str,
) -> None:
    def trained(*_: object, **__: object) -> None:
        raise InterruptedError("training began")

    monkeypatch.setattr(VLMTrainer, "train", trained)
    config = toy_config(tiny_model, toy_data, override)
    with pytest.raises(error or InterruptedError, match=message or None):
        compare.compare(config, tmp_path / "run", quiet)


def test_a_profile_of_another_model_is_refused(finished: Path, toy_data: Path, tmp_path: Path) -> None:
    from tiny import save_tiny_model

    deeper = save_tiny_model(tmp_path / "deeper", layers=5)
    config = toy_config(deeper, toy_data)
    study = trials.prepare_study(config, tmp_path / "run", quiet)
    write_json(study.folder.profile, read_json(finished / "run/profile.json"))
    with pytest.raises(GraphMismatchError):
        measuring.measure_profile(study, quiet)


def test_schedules_come_from_files_too(finished: Path, tiny_model: Path, tmp_path: Path) -> None:
    study = trials.prepare_study(toy_config(tiny_model, finished / "toy"), tmp_path / "run", quiet)
    by_hand = read_json(finished / "run/schedules/uniform.json")
    by_hand["name"] = "mine"
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(by_hand))
    name, schedule = schedules.schedule_for(study, str(path), quiet)
    assert name == "mine"
    assert schedule is not None
    assert schedules.schedule_for(study, "full", quiet) == ("full", None)
    done = trials.run_trial(study, name, schedule, 0, quiet)
    same = record(finished / "run", "uniform-seed0")
    assert (done.train_losses, done.validation_loss) == (same.train_losses, same.validation_loss)

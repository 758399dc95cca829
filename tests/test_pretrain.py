"""Stage I: the projector alone is trained, a stopped run goes on, the model folder holds all else unchanged."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from hydra_vlm.cli import app
from hydra_vlm.config import Config, load_config
from hydra_vlm.data import builtin
from hydra_vlm.data.captions import captions_of, mixed, write_scene_captions
from hydra_vlm.data.records import read_records
from hydra_vlm.errors import ConfigError, RunFolderError
from hydra_vlm.models.loading import load_model
from hydra_vlm.pretrain import pretrain
from hydra_vlm.pretrain import stage_one as for_stage_one
from hydra_vlm.training.trainer import VLMTrainer
from tiny import toy_config, write_toy_data


def quiet(_: str) -> None:
    """Say nothing."""


def stage_one(model: Path, data: Path, *overrides: str) -> Config:
    return toy_config(model, data, "data.template=plain", "data.tests={}", "training.learning_rate=0.01", *overrides)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("stage1")
    data = write_toy_data(home / "toy")
    pretrain(stage_one(tiny_model, data), home / "run", quiet)
    return home


def test_the_projector_alone_changes(finished: Path, tiny_model: Path) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_model, finished / "run/model"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == ("mm_projector" not in name), name
    record = json.loads((finished / "run/trials/projector-seed0/record.json").read_text())
    assert record["trained"] == {"projector": sum(v.numel() for k, v in after.items() if "mm_projector" in k)}
    assert record["train_losses"][-1][1] < record["train_losses"][0][1]
    assert not list(finished.rglob("checkpoint-*"))
    load_model(str(finished / "run/model"), "cpu")


def test_a_stopped_run_goes_on_to_the_same_projector(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage_one(tiny_model, finished / "toy")
    real = VLMTrainer.training_step

    def failing(self: VLMTrainer, *args: object, **kwargs: object) -> torch.Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path / "run", quiet)
    monkeypatch.setattr(VLMTrainer, "training_step", real)
    (checkpoint,) = (tmp_path / "run").rglob("checkpoint-*")
    assert (checkpoint / "projector.safetensors").is_file()
    assert not (checkpoint / "model.safetensors").exists()  # a decoder that is not trained need not be stored
    pretrain(config, tmp_path / "run", quiet)
    ours, theirs = (load_file(home / "run/model/model.safetensors") for home in (tmp_path, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_is_not_repeated(finished: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VLMTrainer, "train", None)
    record = pretrain(stage_one(tiny_model, finished / "toy"), finished / "run", quiet)
    assert record.name == "projector"
    with pytest.raises(RunFolderError, match="is the model of projector-seed0, and projector-seed1 would replace it"):
        pretrain(stage_one(tiny_model, finished / "toy", "seeds=[1]"), finished / "run", quiet)


def test_another_template_is_refused(tiny_model: Path, toy_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.template 'v1': stage I reads an image and its caption alone"):
        pretrain(stage_one(tiny_model, toy_data, "data.template=v1"), tmp_path / "run", quiet)


def test_the_command_writes_a_model_in_its_source_s_dtype(tiny_model: Path, toy_data: Path, tmp_path: Path) -> None:
    half = load_model(str(tiny_model), "cpu")
    half.model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    half.processor.save_pretrained(tmp_path / "half")
    words = [f"model={tmp_path / 'half'}", f"data.train={toy_data / 'train.json'}", "training.steps=2", "device=cpu"]
    done = CliRunner().invoke(
        app, ["pretrain", *words, "training.batch_size=4", "--out", str(tmp_path / "run")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "projector parameters" in done.stdout
    assert "global batch 4 = 4 per device x 1 accumulation x 1 device(s)" in done.stderr
    stored = load_file(tmp_path / "run/model/model.safetensors")
    before = load_file(tmp_path / "half/model.safetensors")
    assert all(
        (v.dtype == torch.float32) if "mm_projector" in k else torch.equal(v, before[k]) for k, v in stored.items()
    )


def question(image: int, text: str, answer: str, task: str) -> dict[str, object]:
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}]
    return {"id": text, "image": f"easy-vqa/train/{image}.png", "task": task, "conversations": turns}


def test_captions_say_what_the_questions_tell_and_no_more() -> None:
    records = [
        question(1, "what color is the shape?", "teal", "colour"),
        question(1, "what shape is in the image?", "circle", "shape"),
        question(2, "is there a teal shape?", "yes", "existence"),
        question(2, "does the image not contain a circle?", "no", "absence"),
        question(3, "is there a teal shape?", "no", "existence"),
        question(3, "is there no circle?", "yes", "absence"),
        question(4, "what color is the shape?", "red", "colour"),
    ]
    made = captions_of(records)
    assert [r["image"] for r in made] == ["easy-vqa/train/1.png", "easy-vqa/train/2.png"]
    assert all(r["conversations"][1]["value"].endswith("a teal circle.") for r in made)
    assert captions_of(records) == made


def test_built_in_captions_are_whole_and_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "SCENES", {"train": 6, "validation": 3})
    files = builtin.write_builtin("scene-captions", tmp_path / "a")
    assert files.validation is not None
    train, validation = read_records(files.train, files.images), read_records(files.validation, files.images)
    assert (len(train), len(validation), files.tests) == (6, 3, {})
    assert not {r.image for r in train} & {r.image for r in validation}
    again = builtin.write_builtin("scene-captions", tmp_path / "b")
    assert again.train.read_text() == files.train.read_text()
    pytest.importorskip("easy_vqa", reason="easy-VQA is an extra")
    mix = builtin.write_builtin("captions", tmp_path / "c")
    both = read_records(mix.train, mix.images)
    assert len(both) == 12
    assert sum("scenes/" in (r.image or "") for r in both) == 6


def test_a_mix_takes_equally_many(tmp_path: Path) -> None:
    sets = [write_scene_captions(tmp_path, split, count, 0) for split, count in (("a", 5), ("b", 3))]
    made = mixed(sets, seed=0)
    assert sorted(r["id"].split("-")[1] for r in made) == ["a"] * 3 + ["b"] * 3


def test_stage_one_reads_captions_in_place_of_questions() -> None:
    assert for_stage_one(load_config(None, [])).data.train == "captions"
    own = for_stage_one(load_config(None, ["data.train=mine.json"]))
    assert (own.data.train, own.data.template) == ("mine.json", "plain")

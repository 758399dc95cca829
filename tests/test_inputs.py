"""A run is bound to the content of what it read: which file differs is said, whatever kind of file it is."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from hydra_vlm import compare, schedules, train, trials
from hydra_vlm.benchmarks.suite import Task, load_tasks
from hydra_vlm.config import Config, load_config
from hydra_vlm.data import digests
from hydra_vlm.data.digests import contents_of
from hydra_vlm.data.remembered import state_of
from hydra_vlm.data.worlds import Sizes, write_worlds
from hydra_vlm.errors import RunFolderError
from hydra_vlm.evaluation import EvaluationRequest, evaluate
from hydra_vlm.files import write_json
from hydra_vlm.inputs import INPUTS, SET_ASIDE, bind, model_inputs, read_inputs, task_inputs
from hydra_vlm.lora import read_schedule
from hydra_vlm.run_folder import A_WORKERS_OWN, RunFolder, environment, keep_session, open_run, session_changes
from hydra_vlm.stored_adapter import RECORD
from hydra_vlm.training.trainer import VLMTrainer
from tiny import toy_config, write_toy_data

REMEDY = "put back what was there and repeat the command to go on with the run, or name another --out"
ONE = ("schedules=[uniform]", "profile.steps=3", "training.steps=2", "evaluation.zero_shot=false")


def quiet(_: str) -> None:
    """Say nothing."""


def swap(path: Path, old: str, new: str) -> None:
    """An edit that keeps size and time of modification."""
    seen, text = path.stat(), path.read_text()
    assert len(old) == len(new)
    assert old in text
    path.write_text(text.replace(old, new))
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


def repaint(path: Path) -> None:
    """Other pixels in the picture's file."""
    from PIL import Image

    with Image.open(path) as picture:
        other = picture.rotate(180)
    other.save(path)


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the model, its data and a finished run."""
    home = tmp_path_factory.mktemp("bound")
    shutil.copytree(tiny_model, home / "model")
    write_toy_data(home / "toy")
    compare.compare(configured(home), home / "run", quiet)
    return home


@pytest.fixture
def home(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, which names the same files: a run knows files by their names below a folder."""
    return Path(shutil.copytree(finished, tmp_path / "home"))


def configured(home: Path, *overrides: str) -> Config:
    return toy_config(home / "model", home / "toy", *ONE, *overrides)


def moved(home: Path) -> None:
    """The configuration of the copy names the copy."""
    (home / "run" / "config.yaml").write_text(configured(home).to_yaml())


EDITS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "training": ("toy/train.json", lambda path: swap(path, "what is it?", "what is he?")),
    "validation": ("toy/validation.json", lambda path: swap(path, "what is it?", "what is he?")),
    "test": ("toy/test.json", lambda path: swap(path, "what is it?", "what is he?")),
    "image": ("toy/3.png", repaint),
    "weights": ("model/model.safetensors", lambda path: path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\1")),
    "tokenizer": ("model/tokenizer_config.json", lambda path: path.write_text(path.read_text() + "\n")),
    "chat template": ("model/chat_template.jinja", lambda path: path.write_text("{{ messages[0].content }}")),
}


@pytest.mark.parametrize("kind", EDITS)
def test_a_run_does_not_go_on_with_other_content(home: Path, kind: str) -> None:
    """And goes on when the file is put back."""
    moved(home)
    name, edit = EDITS[kind]
    path = home / name
    before = path.read_bytes() if path.exists() else None
    kept = {p: p.read_bytes() for p in (home / "run").rglob("*") if p.is_file()}
    edit(path)
    now = contents_of([str(path)])[str(path)]
    with pytest.raises(RunFolderError) as told:
        compare.compare(configured(home), home / "run", quiet)
    message = str(told.value)
    assert f"{path} " in message
    assert f"{now[0]:,} bytes (SHA-256 {now[1][:8]}…) now" in message
    assert REMEDY in message
    assert "\n" not in message
    left = {p: p.read_bytes() for p in kept if p.name not in ("environment.json", "config.yaml")}
    assert left == {p: kept[p] for p in left}
    if before is None:
        path.unlink()
    else:
        path.write_bytes(before)
    compare.compare(configured(home), home / "run", quiet)


def test_a_run_interrupted_by_an_edited_data_file_names_it(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stopped in its second schedule; the same command would compare one schedule on old data with one on new."""
    config = configured(home, "schedules=[uniform,coarse]", "allocation.n_stages=2")
    real, steps = VLMTrainer.training_step, []

    def failing(self: VLMTrainer, *args: object, **kwargs: object) -> object:
        steps.append(1)
        if len(steps) == 3 + 2 + 1:  # profile, uniform, and one step of coarse
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", failing)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(config, tmp_path / "run", quiet)
    monkeypatch.setattr(VLMTrainer, "training_step", real)
    train = home / "toy" / "train.json"
    old = train.read_text()
    train.write_text(old.replace("what is it?", "what colour?"))
    with pytest.raises(RunFolderError) as told:
        compare.compare(config, tmp_path / "run", quiet)
    assert f"data.train: {train} had {len(old):,} bytes (SHA-256 " in str(told.value)
    assert "put back what was there and repeat the command to go on with the run, or name another --out" in str(
        told.value
    )
    assert not (tmp_path / "run/trials/coarse-seed0/record.json").exists()
    train.write_text(old)
    compare.compare(config, tmp_path / "run", quiet)
    assert (tmp_path / "run/trials/coarse-seed0/record.json").exists()


def test_a_run_that_computed_nothing_takes_the_new_content(home: Path, tmp_path: Path) -> None:
    trials.prepare_study(configured(home), tmp_path / "run", quiet)
    before = read_inputs(tmp_path / "run")
    swap(home / "toy/train.json", "what is it?", "what is he?")
    trials.prepare_study(configured(home), tmp_path / "run", quiet)
    assert before.keys() == read_inputs(tmp_path / "run").keys()
    assert before["data.train"] != read_inputs(tmp_path / "run")["data.train"]


def test_what_is_changed_while_it_is_used_makes_no_record(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = trials.prepare_study(configured(home), tmp_path / "run", quiet)
    schedule = schedules.schedule_for(study, "uniform", quiet)[1]
    real = trials.answer_and_score
    picture = home / "toy/5.png"
    before = picture.read_bytes()

    def meanwhile(*args: object) -> object:
        repaint(picture)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trials, "answer_and_score", meanwhile)
    with pytest.raises(RunFolderError, match=r"what uniform-seed0 reads was changed while it was used .*5\.png"):
        trials.run_trial(study, "uniform", schedule, 0, quiet)
    assert not (tmp_path / "run/trials/uniform-seed0").exists()
    assert (tmp_path / "run" / SET_ASIDE / "uniform-seed0/adapter").is_dir()
    monkeypatch.setattr(trials, "answer_and_score", real)
    picture.write_bytes(before)
    assert trials.run_trial(study, "uniform", schedule, 0, quiet).validation_loss > 0


def test_an_evaluation_does_not_mix_answers(home: Path, tmp_path: Path) -> None:
    adapter = home / "run/trials/uniform-seed0/adapter"
    (adapter / RECORD).unlink()  # which names an edited file by itself
    request = EvaluationRequest(
        str(home / "model"), str(home / "toy/test.json"), (str(adapter),), device="cpu", max_new_tokens=2
    )
    evaluate(request, tmp_path / "out", quiet)
    for path in (
        home / "toy/test.json",
        home / "toy/1.png",
        adapter / "adapter_config.json",
        home / "model/config.json",
    ):
        before = path.read_bytes()
        path.write_bytes(before + b"\n")
        with pytest.raises(RunFolderError, match=f"{path} had {len(before):,} bytes"):
            evaluate(request, tmp_path / "out", quiet)
        path.write_bytes(before)
    kept = tmp_path / "out/answers/uniform-seed0/predictions/test.jsonl"
    before = kept.read_bytes()
    both = replace(request, base=True, batch_size=2)
    assert evaluate(both, tmp_path / "out", quiet).keys() == {"base", "uniform-seed0"}
    assert kept.read_bytes() == before
    shutil.copytree(adapter, tmp_path / "uniform-seed0")
    with pytest.raises(RunFolderError, match=r"holds another evaluation \(adapters: "):
        evaluate(replace(request, adapters=(str(tmp_path / "uniform-seed0"),)), tmp_path / "out", quiet)
    with pytest.raises(RunFolderError, match=r"holds another evaluation \(max_new_tokens: 2 there, 3 now"):
        evaluate(replace(request, max_new_tokens=3), tmp_path / "out", quiet)


def test_a_built_in_set_edited_by_hand_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_vlm.data import builtin

    monkeypatch.setattr(builtin, "SCENES", {"train": 8, "validation": 4})
    overrides = ("data={train: scene-captions}", "data.max_length=400", "training.batch_size=4")
    config = configured(home, *overrides)
    train.profile(config, tmp_path / "run", quiet)
    written = tmp_path / "run/data/train.json"
    written.write_text(written.read_text() + "\n")
    with pytest.raises(
        RunFolderError, match=r"data.train\.json had .* Once .*data is removed, the built-in set is written"
    ):
        train.profile(config, tmp_path / "run", quiet)
    shutil.rmtree(tmp_path / "run/data")
    train.profile(config, tmp_path / "run", quiet)


def test_every_file_of_a_benchmark_is_bound_wherever_its_folder_is_named_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"mme": 1, "pope": 1, "textvqa": 1, "gqa": 1, "mmbench": 1, "sqa": 1}
    write_worlds(tmp_path, 0, Sizes(few, few, few))

    def tasks(folder: Path) -> list[Task]:
        return load_tasks(folder / "benchmarks", (), folder / "run/images")

    (tmp_path / "run").mkdir()
    found = tasks(tmp_path)
    before = task_inputs(found, tmp_path / "run")
    assert "decoded images of test mmbench" in before
    bind(tmp_path / "run", before, begun=False)
    files = [path for path in sorted((tmp_path / "benchmarks").rglob("*")) if path.is_file()]
    assert len(files) > 25
    for path in files:
        kept = path.read_bytes()
        path.write_bytes(kept + b" ")
        with pytest.raises(RunFolderError, match=f"{path} had {len(kept):,} bytes"):
            bind(tmp_path / "run", task_inputs(found, tmp_path / "run"), begun=True)
        path.write_bytes(kept)
    monkeypatch.chdir(tmp_path.parent)
    here = Path(tmp_path.name)
    bind(here / "run", task_inputs(tasks(here), here / "run"), begun=True)


def test_another_built_in_set_replaces_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra_vlm.data import builtin

    monkeypatch.setattr(builtin, "SCENES", {"train": 3, "validation": 2})
    builtin.write_builtin_once("scene-captions", tmp_path / "data")
    (tmp_path / "data/train.json").write_text("[1]")
    builtin.write_builtin_once("scene-captions", tmp_path / "data")
    assert (tmp_path / "data/train.json").read_text() == "[1]"
    (tmp_path / "data/set.txt").write_text("demo\n")
    builtin.write_builtin_once("scene-captions", tmp_path / "data")
    assert len(json.loads((tmp_path / "data/train.json").read_text())) == 3


# More of the same


def test_seeds_and_schedules_may_be_added_to_a_finished_run(home: Path) -> None:
    moved(home)
    run = home / "run"
    before = {path: path.stat().st_mtime_ns for path in run.glob("trials/*/record.json")}
    more = ("seeds=[0,1]", "schedules=[uniform,coarse]", "allocation.n_stages=2")
    compare.compare(configured(home, *more), run, quiet)
    names = {path.parent.name for path in run.glob("trials/*/record.json")}
    assert names == {f"{name}-seed{seed}" for name in ("uniform", "coarse") for seed in (0, 1)}
    assert before.items() <= {path: path.stat().st_mtime_ns for path in run.glob("trials/*/record.json")}.items()
    compare.compare(configured(home, "seeds=[1]"), run, quiet)  # fewer take nothing away
    assert {path.parent.name for path in run.glob("trials/*/record.json")} == names
    with pytest.raises(RunFolderError, match=r"training\.learning_rate"):
        compare.compare(configured(home, "seeds=[0,1,2]", "training.learning_rate=0.5"), run, quiet)


def test_a_run_that_lacks_a_later_key_goes_on_by_its_default(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for seeds in ("seeds=[0]", "seeds=[0,1]"):
        open_run(run, load_config(None, [seeds]), {})
        stored = run / "config.yaml"
        assert "warmup_ratio: 0.03" in stored.read_text()
        stored.write_text(stored.read_text().replace("  warmup_ratio: 0.03\n", ""))
        (run / "trials" / "uniform-seed0").mkdir(parents=True, exist_ok=True)
    with pytest.raises(RunFolderError, match=r"training\.warmup_ratio: 0\.03 there, 0\.1 now"):
        open_run(run, load_config(None, ["training.warmup_ratio=0.1"]), {})


def test_a_run_of_a_rule_that_was_the_default_goes_on_where_the_rule_is_named(tmp_path: Path) -> None:
    for _ in range(2):
        open_run(tmp_path, load_config(None, ["scaling.rule=constant"]), {})
        (tmp_path / "trials" / "uniform-seed0").mkdir(parents=True, exist_ok=True)
    assert open_run(tmp_path, load_config(tmp_path / "config.yaml"), {}).path == tmp_path
    with pytest.raises(RunFolderError, match=r"scaling\.rule: 'constant' there, 'balanced' now"):
        open_run(tmp_path, load_config(None), {})


def test_a_trial_keeps_its_schedule(home: Path) -> None:
    moved(home)
    study = trials.prepare_study(configured(home), home / "run", quiet)
    mine = replace(read_schedule(home / "run/schedules/uniform.json"), name="mine")
    write_json(home / "mine.json", mine.to_json())
    trials.run_trial(study, *schedules.schedule_for(study, str(home / "mine.json"), quiet), 0, quiet)
    write_json(home / "mine.json", replace(mine, ranks=(3, *mine.ranks[1:])).to_json())
    name, schedule = schedules.schedule_for(study, str(home / "mine.json"), quiet)
    with pytest.raises(RunFolderError, match=r"mine-seed0 is a trial of another schedule 'mine' .*layer 0 had rank 4"):
        trials.run_trial(study, name, schedule, 0, quiet)


def test_the_seconds_of_all_sessions_add_up(tmp_path: Path) -> None:
    assert trials._seconds_before(tmp_path) == 0
    for number, seconds in ((1, 30.0), (2, 50.0)):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{number}"
        checkpoint.mkdir(parents=True)
        start = (tmp_path / trials.SPENT).stat().st_mtime
        os.utime(checkpoint, (start + seconds, start + seconds))
        assert trials._seconds_before(tmp_path) == pytest.approx({1: 30.0, 2: 80.0}[number], abs=0.1)


# Digests


def test_digests_are_taken_once_and_changes_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "AT_REST", 0.0)
    path = tmp_path / "file"
    path.write_text("one")
    taken: list[str] = []
    real = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda path: taken.append(path) or real(path))
    first = contents_of([str(path), str(tmp_path / "none")], tmp_path / "cache")
    assert first == {str(path): (3, "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed")}
    assert contents_of([str(path)], tmp_path / "cache") == first
    assert taken.count(str(path)) == 1
    time.sleep(0.02)  # a tick of the clock
    swap(path, "one", "two")
    assert contents_of([str(path)], tmp_path / "cache") != first
    assert state_of(str(tmp_path / "none")) == (-1, -1, -1, -1)


def test_a_digest_of_a_file_that_was_just_written_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    contents_of([str(path)], tmp_path / "cache")
    monkeypatch.setattr(digests, "state_of", lambda _: (3, 1, 1, 1))  # as if both writes fell into one tick
    path.write_text("two")
    assert contents_of([str(path)], tmp_path / "cache")[str(path)][1].startswith("3fc4ccfe")


def test_a_model_s_files_are_those_that_loading_reads(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "training_args.bin", "README.md", ".hidden"):
        (tmp_path / name).write_text("x")
    assert set(model_inputs(tmp_path)["model"].files) == {"config.json", "model.safetensors"}
    (tmp_path / "model.safetensors").unlink()
    assert set(model_inputs(tmp_path)["model"].files) == {"config.json", "pytorch_model.bin"}


# Sessions


def test_sessions_are_kept_and_what_differs_is_said(tmp_path: Path) -> None:
    first = environment("cpu", "fp32")
    keep_session(tmp_path, first)
    assert session_changes(tmp_path) == []
    keep_session(tmp_path, environment("cpu", "fp32"))
    assert session_changes(tmp_path) == []
    keep_session(tmp_path, environment(A_WORKERS_OWN, A_WORKERS_OWN))
    assert session_changes(tmp_path) == []
    other = {**first, "device": "cuda:0", "packages": {**first["packages"], "torch": "1.0"}}
    keep_session(tmp_path, first)
    keep_session(tmp_path, other)
    [line] = session_changes(tmp_path)
    assert f"torch {first['packages']['torch']} before, 1.0 now; device cpu before, cuda:0 now" in line
    told = json.loads((tmp_path / "environment.json").read_text())
    assert [session["device"] for session in told["before"]] == ["cpu", "cpu", A_WORKERS_OWN, "cpu"]


def test_a_damaged_list_of_inputs_is_named(home: Path) -> None:
    moved(home)
    (home / "run" / INPUTS).write_text("{")
    with pytest.raises(RunFolderError, match=f"{INPUTS}.*remove it if all that the run has read is unchanged"):
        compare.compare(configured(home), home / "run", quiet)
    assert RunFolder(home / "run").profile.is_file()

"""`hydra-vlm search` and `worker` on a tiny model: what they leave behind, how they go on, what they refuse."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hydra_vlm.commands.search import STORAGE, asked_workers, worker_environment
from hydra_vlm.config import Config, load_config
from hydra_vlm.dynamic import join, search
from hydra_vlm.errors import BudgetError, ConfigError, RunFolderError, StageError
from hydra_vlm.files import read_json
from hydra_vlm.findings import conclude
from hydra_vlm.lora import load_adapter
from hydra_vlm.models.loading import load_model
from hydra_vlm.records import TrialRecord
from hydra_vlm.report.comparison import compare
from hydra_vlm.report.run import load_run
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.search.study import close_storage, load_study, open_storage
from tiny import toy_config, write_toy_data

SMALL = (
    "search.objective=loss",
    "search.model=ridge",
    "search.trials=5",
    "search.startup=4",
    "search.final_seeds=[101,102,103]",
    "search.grace_seconds=5",
    "training.steps=4",
    "profile.steps=3",
)


def quiet(_: str) -> None:
    """Say nothing."""


def states(run: Path) -> list[str]:
    storage = open_storage(run)
    found = [trial.state.name for trial in load_study(run, storage).get_trials()]
    close_storage(storage)
    return found


def stamps(run: Path) -> dict[str, int]:
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("record.json")}


@pytest.fixture(scope="module")
def home(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy data and the configuration of a small search."""
    home = tmp_path_factory.mktemp("search")
    config = toy_config(tiny_model, write_toy_data(home / "toy"), *SMALL)
    (home / "config.yaml").write_text(config.to_yaml())
    return home


def configured(home: Path, *overrides: str) -> Config:
    return load_config(home / "config.yaml", overrides)


@pytest.fixture(scope="module")
def done(home: Path) -> Path:
    """The run folder of a finished small search."""
    search(configured(home), home / "run", None, quiet)
    conclude(configured(home), home / "run")
    return home / "run"


def test_a_search_leaves_its_trials_its_findings_and_the_best(done: Path, tiny_model: Path) -> None:
    for name in ("config.yaml", "environment.json", "graph.json", "profile.json", "study.json", "study.journal"):
        assert (done / name).is_file(), name
    assert states(done) == ["COMPLETE"] * 5
    found = read_json(done / "search.json")
    trials = found["trials"]
    assert [trial["number"] for trial in trials] == list(range(5))
    assert [trial["baseline"] for trial in trials] == [True] + [False] * 4
    assert trials[0]["record"] == "trials/uniform-seed0"
    for trial in trials:
        record = TrialRecord.from_json(read_json(done / trial["record"] / "record.json"))
        assert record.schedule is not None
        assert list(record.schedule.ranks) == [rank for layer in trial_ranks(trial) for rank in layer]
        assert trial["values"] == [pytest.approx(-record.validation_loss)]
        assert trial["scores"] == {score.benchmark: score.value for score in record.scores}
        assert trial["seconds"] == pytest.approx(record.seconds, abs=0.001)
    best = max(trials, key=lambda trial: trial["values"][0])
    assert found["best"]["number"] == best["number"]
    schedule = RankSchedule.from_json(read_json(done / "best" / "schedule.json"))
    assert schedule == RankSchedule.from_json({**best["candidate"]["schedule"], "name": schedule.name})
    assert load_adapter(load_model(str(tiny_model), "cpu").model, done / "best" / "adapter") is not None
    assert found["seconds"]["profile"] > 0
    total = found["seconds"]["profile"] + sum(trial["seconds"] for trial in trials)
    assert found["uniform_runs"]["search"] == pytest.approx(total / trials[0]["seconds"], abs=0.01)


def trial_ranks(trial: dict[str, Any]) -> list[list[int]]:
    return [list(layer.values()) for layer in trial["candidate"]["schedule"]["ranks"]]


def test_the_best_is_held_against_uniform_lora_with_paired_seeds(done: Path, home: Path) -> None:
    found = conclude(configured(home), done)
    names = {path.name for path in (done / "final" / "trials").iterdir()}
    expected = {"uniform", found.best.name}
    assert names == {f"{name}-seed{seed}" for name in expected for seed in (101, 102, 103)}
    final = compare(load_run(done / "final"))
    assert found.comparison == final
    if not found.best.is_baseline:
        [measure] = found.objective.values()
        assert measure.difference is not None
        row = final.row(found.best.name).loss
        assert row.difference is not None
        assert measure.difference.mean == pytest.approx(-row.difference.mean)
        assert "3 paired seeds" in found.verdicts()[0]
        assert "noise" in found.verdicts()[0] or "zero" in found.verdicts()[0]
    assert found.verdicts()[0] in found.table()
    assert "runs of uniform LoRA" in found.table()


def test_the_same_search_again_runs_nothing_and_a_longer_one_goes_on(done: Path, home: Path) -> None:
    before = stamps(done)
    search(configured(home), done, None, quiet)
    join(done, None, quiet)
    assert stamps(done) == before
    assert len(before) == 5 + 2 * 3 or len(before) == 5 + 3
    more = configured(home, "search.trials=6")
    with pytest.raises(RunFolderError, match="5 of 6 trials"):
        conclude(more, done)
    search(more, done, None, quiet)
    assert states(done) == ["COMPLETE"] * 6
    assert before.items() <= stamps(done).items()
    assert load_config(done / "config.yaml").search.trials == 6
    conclude(more, done)
    with pytest.raises(RunFolderError, match=r"search\.sampler"):
        search(configured(home, "search.sampler=random"), done, None, quiet)


def test_the_report_shows_a_searchs_trials(done: Path) -> None:
    shown = compare(load_run(done))
    assert shown.baseline == "uniform"
    assert len(shown.rows) >= 5


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["search.trials=0"], ConfigError, "'search.trials'"),
        (["search.sampler=evolutoin"], ConfigError, "did you mean 'evolution'"),
        (["search.model=ridgy"], ConfigError, "did you mean 'ridge'"),
        (["search.objective=toys"], ConfigError, "toy"),
        (["search.objective=pareto:a"], ConfigError, "pareto"),
        (["search.objective=pareto:a,b", "search.pruner=median"], ConfigError, "needs one value"),
        (["search.storage=sqlite:///a.db"], ConfigError, "SQLite"),
        (["search.n_stages=[2,9]"], StageError, "4 layers"),
        (["search.n_stages=[3,4]", "budget.rank=1"], BudgetError, "budget"),
        (["search.n_stages=[3,2]"], ConfigError, "n_stages"),
        (["search.pruner=median", "data.validation=null"], ConfigError, "data.validation"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    home: Path, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        search(configured(home, *overrides), tmp_path / "run", None, quiet)
    assert not (tmp_path / "run" / "profile.json").exists()
    assert not (tmp_path / "run" / "trials").exists()


def test_worker_needs_a_search(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="hydra-vlm search"):
        join(tmp_path)


@pytest.mark.parametrize("options", [["search.open=true"], ["search.tuned=true", "search.sampler=tpe"]])
def test_other_spaces_and_samplers_run_too(home: Path, tmp_path: Path, options: list[str]) -> None:
    run = tmp_path / "run"
    config = configured(home, *options, "search.trials=3", "search.startup=1", "search.final_seeds=[]")
    search(config, run, None, quiet)
    found = conclude(config, run)
    assert len(found.trials) == 3
    assert found.comparison is None
    assert not (run / "best" / "adapter").exists()
    if "search.tuned=true" in options:
        assert all(trial["candidate"]["learning_rate"] is not None for trial in found.trials)


def test_hopeless_trials_are_pruned_and_leave_no_folder(home: Path, tmp_path: Path) -> None:
    """Learning rates far too high and too low beside the recipe's own: some are behind at the first look."""
    run = tmp_path / "run"
    config = configured(
        home,
        *("search.pruner=hyperband", "search.tuned=true", "search.sampler=random", "search.trials=9"),
        *("search.final_seeds=[]", "training.watch_steps=1", "training.steps=6", "training.learning_rate=0.05"),
    )
    search(config, run, None, quiet)
    found = conclude(config, run)
    pruned = [trial for trial in found.trials if trial["state"] == "PRUNED"]
    assert pruned
    assert len(list((run / "trials").iterdir())) == 9 - len(pruned)
    assert found.trials[0]["state"] == "COMPLETE"


# The workers of the command


def test_workers_and_cards_are_counted() -> None:
    assert asked_workers(None, None) == []
    assert asked_workers(3, None) == [None] * 3
    assert asked_workers(None, "0, 1") == ["0", "1"]
    assert asked_workers(None, "GPU-8932f937-d72c") == ["GPU-8932f937-d72c"]
    for workers, gpus in ((None, "0,0"), (None, "0,"), (3, "0,1"), *((None, g) for g in ("", "-1", "all", "0;1", "²"))):
        with pytest.raises(ConfigError, match="--gpus"):
            asked_workers(workers, gpus)


def test_a_worker_gets_its_cores_its_card_and_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cores = len(os.sched_getaffinity(0))
    found = worker_environment("1", cores, "postgresql://me:secret@host/db")
    assert (found["OMP_NUM_THREADS"], found["CUDA_VISIBLE_DEVICES"]) == ("1", "1")
    assert found[STORAGE] == "postgresql://me:secret@host/db"
    assert worker_environment(None, 1, None)["OMP_NUM_THREADS"] == str(cores)
    assert "CUDA_VISIBLE_DEVICES" not in worker_environment(None, 1, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert worker_environment(None, 1, None)["OMP_NUM_THREADS"] == "7"


def command(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = [sys.executable, "-m", "hydra_vlm.cli", *words]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("search", "--trials", "0"), "search.trials"),
        (("search", "--workers", "2", "--gpus", "0"), "--gpus"),
        (("search", "--workers", "2", "--storage", "postgresql://u:secret@127.0.0.1:1/db"), "cannot be opened"),
        (("worker", "nowhere"), "holds no search"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    out = ("--out", str(tmp_path / "run")) if words[0] == "search" else ()
    process = command(*words, *out)
    answer, told = process.communicate(timeout=300)
    assert process.returncode == 2
    assert answer == ""
    assert told.startswith("error: ")
    assert message in told
    assert len(told.splitlines()) == 1
    assert "secret" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_workers_of_the_command_share_a_search(home: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = command("search", str(home / "config.yaml"), "--workers", "2", "--out", str(run), "--json")
    answer, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    assert json.loads(answer) == read_json(run / "search.json")
    assert states(run).count("COMPLETE") == 5
    assert "[1] " in told
    assert "[2] " in told
    assert "\r" not in told
    journal = [json.loads(line) for line in (run / "study.journal").read_text().splitlines()]
    by = {entry["user_attr"]["worker"]["id"] for entry in journal if "worker" in entry.get("user_attr", {})}
    assert 1 <= len(by) <= 2  # on a busy machine the first may be done before the second has loaded the model


@pytest.mark.slow
def test_what_is_wrong_with_the_data_is_said_once_by_many_workers(home: Path, tmp_path: Path) -> None:
    words = ("search", str(home / "config.yaml"), "--workers", "2", "--out", str(tmp_path / "run"))
    process = command(*words, "data.train=nowhere.json")
    _, told = process.communicate(timeout=300)
    assert process.returncode == 2
    assert told.count("nowhere.json") == 1
    assert told.splitlines()[-1].startswith("error: ")


def second(run: Path, *parts: str) -> bool:
    """Whether a trial beside uniform LoRA's has come so far."""
    return any(
        run.glob("/".join(("trials", name, *parts)))
        for name in (path.name for path in run.glob("trials/*") if not path.name.startswith("uniform"))
    )


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "profile": lambda run: (run / "profile-run").exists(),
    "training": lambda run: second(run, "checkpoints", "checkpoint-2"),
    "evaluation": lambda run: second(run, "adapter", "adapter_config.json"),
    "final": lambda run: any(run.glob("final/trials/*-seed102/checkpoints/checkpoint-2")),
}


@pytest.fixture(scope="module")
def undisturbed(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    process = command("search", str(home / "config.yaml"), "--out", str(run))
    told = process.communicate(timeout=600)[1]
    assert process.returncode == 0, told
    return outcome(run)


def outcome(run: Path) -> dict[str, object]:
    """Losses and scores of every trial, and what each adapter holds."""
    found: dict[str, object] = {}
    for path in sorted(run.rglob("record.json")):
        record = json.loads(path.read_text())
        del record["seconds"]
        weights = (path.parent / "adapter" / "adapter_model.safetensors").read_bytes()
        found[str(path.parent.relative_to(run))] = (record, weights)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_search_ends_as_an_undisturbed_one(
    home: Path, undisturbed: dict[str, object], tmp_path: Path, moment: str
) -> None:
    """The only worker of the machine: trials, finals, records and adapters are the same, to the bit."""
    run = tmp_path / "run"
    words = ("search", str(home / "config.yaml"), "--out", str(run))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "hydra_vlm.cli", *words], stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while not MOMENTS[moment](run):
        assert process.poll() is None, "the search ended before the kill"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = stamps(run)
    again = command(*words)
    told = again.communicate(timeout=600)[1]
    assert again.returncode == 0, told
    assert before.items() <= stamps(run).items()
    assert states(run) == ["COMPLETE"] * 5
    assert outcome(run) == undisturbed
    assert yaml.safe_load((run / "config.yaml").read_text())["search"]["trials"] == 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_two_workers_killed_again_and_again_end_as_undisturbed_ones(home: Path, tmp_path: Path, seed: int) -> None:
    """The command and its workers are killed at once, when the journal has grown by a drawn number of lines."""
    draw = random.Random(seed)

    def start(run: Path) -> subprocess.Popen[bytes]:
        words = ("search", str(home / "config.yaml"), "--workers", "2", "--out", str(run))
        with (tmp_path / "log").open("ab") as log:
            whole = [sys.executable, "-m", "hydra_vlm.cli", *words]
            return subprocess.Popen(whole, stdout=log, stderr=log, start_new_session=True)

    def written(run: Path) -> int:
        path = run / "study.journal"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "log").read_text()
    run, kills = tmp_path / "run", 0
    for _ in range(4):
        process, until = start(run), written(run) + draw.randint(1, 40)
        while process.poll() is None and written(run) < until:
            time.sleep(0.005)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert start(run).wait() == 0, (tmp_path / "log").read_text()
    assert kills >= 3
    assert states(run) == ["COMPLETE"] * 5
    assert outcome(run) == outcome(tmp_path / "whole")

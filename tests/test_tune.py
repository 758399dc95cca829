"""`tune`: the best adapter of the budget, uniform LoRA beside it, and what is said of both."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hydra_vlm.cli import app
from hydra_vlm.errors import ConfigError
from hydra_vlm.lora import own_schedule
from hydra_vlm.tune import best_of, tune
from striking import OPTIONS
from tiny import toy_config, write_toy_data

RUN = (*OPTIONS, "training.steps=20", "training.save_steps=100", "budget.rank=2", "training.learning_rate=0.01")


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set beside a finished run of it, started by the command, in `run` and `said`."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def said(home: Path, tiny_model: Path) -> dict[str, object]:
    config = toy_config(tiny_model, write_toy_data(home / "toy"), *RUN)
    (home / "it.yaml").write_text(config.to_yaml())
    done = CliRunner().invoke(app, ["tune", str(home / "it.yaml"), "--out", str(home / "run"), "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_both_are_told_with_what_they_took(home: Path, said: dict[str, dict[str, object]]) -> None:
    assert said.keys() == {"best", "uniform", "cost_in_uniform_runs"}
    keys = {"adapter", "parameters", "budget", "most_trainable", "learning_rates", "validation_loss", "scores"}
    for side in ("best", "uniform"):
        assert keys <= said[side].keys()
        assert said[side]["parameters"] <= said[side]["budget"]  # type: ignore[operator]
        assert own_schedule(Path(str(said[side]["adapter"]))).parameters == said[side]["parameters"]
    records = [json.loads(path.read_text()) for path in sorted(home.glob("run/trials/*/record.json"))]
    assert [record["name"] for record in records] == ["squeeze", "uniform", "zero-shot"]
    losses = {record["name"]: record["validation_loss"] for record in records if record["schedule"]}
    assert said["best"]["validation_loss"] == min(losses.values())
    assert 0 < float(said["cost_in_uniform_runs"]) < 20  # type: ignore[arg-type]
    assert all(record["pilot"]["tried"] for record in records if record["schedule"])
    assert (home / "run/report.html").is_file()


def test_the_same_command_again_trains_nothing(home: Path, tiny_model: Path, said: dict[str, object]) -> None:
    before = {path: path.stat().st_mtime for path in home.glob("run/trials/*/record.json")}
    found = tune(toy_config(tiny_model, home / "toy", *RUN), home / "run", quiet)
    assert found.to_json() == said
    assert {path: path.stat().st_mtime for path in before} == before
    assert f"adapter: {home / 'run/best/adapter'}" in found.summary()


def test_the_best_has_the_lowest_loss_over_seeds_and_another_may_become_it(
    home: Path, tiny_model: Path, said: dict[str, object]
) -> None:
    found = tune(toy_config(tiny_model, home / "toy", *RUN, "seeds=[0,1]"), home / "run", quiet)
    losses: dict[str, list[float]] = {}
    for one in found.trials:
        losses.setdefault(one.name, []).append(one.validation_loss)
    name = min(losses, key=lambda name: sum(losses[name]))
    assert (found.best.name, found.best.validation_loss) == (name, min(losses[name]))
    assert best_of(found.trials) is found.best
    kept = json.loads((home / "run/best/record.json").read_text())
    assert (kept["name"], kept["seed"]) == (found.best.name, found.best.seed)


def test_fixed_ranks_are_uniform_lora_and_nothing_beside_it(tiny_model: Path, toy_data: Path, tmp_path: Path) -> None:
    options = ("training.ranks=fixed", "training.pilot=false", "evaluation.zero_shot=false")
    found = tune(toy_config(tiny_model, toy_data, *OPTIONS, *options), tmp_path / "run", quiet)
    assert [one.name for one in found.trials] == ["uniform"]
    assert found.best.pilot is None
    assert found.cost == pytest.approx(1)


def test_a_pilot_without_validation_data_is_refused_before_anything_is_trained(
    tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    config = toy_config(tiny_model, toy_data, *RUN, "data.validation=null")
    with pytest.raises(ConfigError, match=r"training.pilot=false"):
        tune(config, tmp_path / "run", quiet)
    assert not list((tmp_path / "run").glob("trials/*"))

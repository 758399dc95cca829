"""`squeeze`: a trained adapter becomes one of the budget, or shows its loss at a dozen of them."""

import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from hydra_vlm import opened_adapter, trials
from hydra_vlm import squeeze as library
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.cli import app
from hydra_vlm.commands.squeeze import find_adapter, said
from hydra_vlm.config import DataConfig, load_config
from hydra_vlm.errors import BudgetError, ConfigError, HydraError
from hydra_vlm.lora import attach, own_schedule, save_adapter
from hydra_vlm.models.loading import load_model
from hydra_vlm.moving.wide import updates
from hydra_vlm.report.curve import Curve, Cut, levels
from hydra_vlm.resizing import RIDGE
from hydra_vlm.verification import lora_layers, strictly
from striking import OPTIONS
from tiny import toy_config, write_toy_data

RUN = (*OPTIONS, "training.steps=12", "training.save_steps=100", "training.learning_rate=0.02", "budget.rank=4")
MODULE = "model.language_model.layers.2.mlp.down_proj"


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The folder of a run with one trial: uniform LoRA of rank 4 and the projector beside it."""
    home = tmp_path_factory.mktemp("squeeze")
    config = toy_config(tiny_model, write_toy_data(home / "toy"), *RUN)
    study = trials.prepare_study(config, home / "run", quiet)
    trials.run_trial(study, "it", allocate("uniform", AllocationRequest(study.graph, study.budget)), 0, quiet)
    return home / "run"


@pytest.fixture(scope="module")
def adapter(run: Path) -> Path:
    return run / "trials/it-seed0/adapter"


def asked(*words: object) -> Any:
    """What the command says as JSON."""
    done = CliRunner().invoke(app, ["squeeze", *map(str, words), "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


def refused(*words: object) -> str:
    """The error with which the command ends."""
    done = CliRunner().invoke(app, ["squeeze", *map(str, words)])
    assert isinstance(done.exception, HydraError), done.output
    return str(done.exception)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("decide", ["uniform", "spectral"])
def test_the_budget_is_kept_and_peft_loads_what_was_saved(
    run: Path, adapter: Path, tiny_model: Path, tmp_path: Path, decide: str
) -> None:
    found = asked(
        run, "--parameters", 2 * own_schedule(adapter).graph.cost + 333, "--decide", decide, "--out", tmp_path / "cut"
    )
    schedule = own_schedule(tmp_path / "cut")
    assert found["budget"] == 2 * schedule.graph.cost + 333
    assert found["parameters"] == schedule.parameters <= found["budget"]
    assert schedule.unspent < (schedule.graph.cost if decide == "uniform" else max(schedule.graph.costs))
    assert sum(tensor.numel() for tensor in tensors(tmp_path / "cut").values()) == schedule.parameters
    assert (found["metric"], found["decide"]) == ("inputs", decide)
    assert 0 < found["kept"] < 1
    before, after = (load_file(folder / "projector.safetensors") for folder in (adapter, tmp_path / "cut"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = load_model(str(tiny_model), "cpu")
    with strictly("PEFT alone"):
        model = PeftModel.from_pretrained(loaded.model, str(tmp_path / "cut"))
    ranks = dict(zip(loaded.parts.names(), schedule.ranks, strict=True))
    assert {name: layer.r["default"] for name, layer in lora_layers(model).items()} == ranks
    # what was said of its loss holds for what was saved
    data = run.parent / "toy/validation.json"
    again = asked(tmp_path / "cut", "--rank", 1, "--model", tiny_model, "--data", data, "--out", tmp_path / "again")
    assert again["validation_loss_before"] == pytest.approx(found["validation_loss"], abs=1e-5)
    assert found["validation_loss_before"] == pytest.approx(
        json.loads((adapter.parent / "record.json").read_text())["validation_loss"], abs=1e-5
    )


@pytest.mark.parametrize("has_data", [True, False])
def test_rank_1_is_the_best_that_brute_force_finds(run: Path, adapter: Path, tmp_path: Path, has_data: bool) -> None:
    source = source_of(run, adapter, has_data)
    with opened_adapter.opened(source, quiet) as (wide, read):
        whole = {name: update.delta().double() for name, update in updates(wide.model).items()}
        with opened_adapter.looked_at(wide, read(), source.config) as seen:
            metrics = dict(seen.metrics)
    assert bool(metrics) == has_data
    c = metrics[MODULE].double() if has_data else torch.eye(whole[MODULE].shape[1], dtype=torch.float64)
    ridge = RIDGE * c.diagonal().mean() if has_data else 0.0
    root = torch.linalg.cholesky(c + ridge * torch.eye(len(c), dtype=torch.float64))
    u, sigma, vt = torch.linalg.svd(whole[MODULE] @ root)
    best = sigma[0] * torch.outer(u[:, 0], vt[0]) @ torch.linalg.inv(root)
    done = library.squeeze(source, 1, None, "uniform", tmp_path / "one", quiet)
    assert set(done.after.ranks) == {1}
    assert done.has_metric == has_data
    assert ("no metric" in done.summary()) != has_data
    found = tensors(tmp_path / "one")
    a, b = (found[f"base_model.model.{MODULE}.lora_{matrix}.weight"].double() for matrix in "AB")
    assert torch.allclose(done.after.scaling.scale(1) * b @ a, best, atol=1e-6, rtol=1e-4)


def source_of(run: Path, adapter: Path, has_data: bool = True) -> opened_adapter.Source:
    return opened_adapter.Source(adapter, load_config(run / "config.yaml"), has_data, run)


def test_phi_takes_the_best_that_it_probed(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    real = library.DECIDERS["phi"]

    def listening(evidence: Any, probe: Any) -> Any:
        decision = real(replace(evidence, probes=7), probe)
        losses.extend(loss for _, loss in decision.probed)
        return decision

    monkeypatch.setattr(library, "DECIDERS", {**library.DECIDERS, "phi": listening})
    found = asked(run, "--rank", 2, "--decide", "phi", "--out", tmp_path / "cut")
    assert found["probed"] == len(losses) == 7
    assert found["validation_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert found["parameters"] <= found["budget"]


def test_a_dozen_budgets_from_one_training(run: Path, adapter: Path, tmp_path: Path) -> None:
    found = asked(run, "--out", tmp_path)
    schedule = own_schedule(adapter)
    points = found["curve"]
    assert len(points) == 12
    budgets = [point["budget"] for point in points]
    assert budgets == sorted(set(budgets))
    assert (budgets[0], budgets[-1]) == (schedule.graph.cost, schedule.parameters)
    assert {rank * schedule.graph.cost for rank in (1, 2, 3, 4)} <= set(budgets)
    for name in ("uniform", "spectral"):
        assert all(point[name]["parameters"] <= point["budget"] for point in points)
        losses = [point[name]["validation_loss"] for point in points]
        assert losses[-1] == pytest.approx(found["validation_loss"], abs=1e-5)
        assert losses[0] > losses[-1]
        assert sum(later <= earlier + 1e-3 for earlier, later in pairwise(losses)) >= 9
    assert found["enough"]["budget"] in budgets
    page = (tmp_path / "curve.html").read_text()
    assert "http://" not in page.split("<main>")[1]
    assert f"{budgets[3]:,}" in page


def test_a_curve_says_which_budget_is_enough() -> None:
    cuts = {
        "uniform": (Cut(10, 2.0), Cut(20, 1.2), Cut(40, 1.0)),
        "spectral": (Cut(10, 1.5), Cut(19, 1.009), Cut(40, 1.0)),
    }
    found = Curve("it", 10, 8, Cut(40, 1.0), (10, 20, 40), cuts)
    assert found.enough() == (20, "spectral")
    assert "20 parameters (rank 2) stay within 1 % of it, with spectral ranks" in found.table()
    assert [line.split()[0] for line in found.table().splitlines()[2:5]] == ["10", "20", "40"]
    assert "no lower budget" in replace(found, whole=Cut(40, 0.9)).finding()
    lost = replace(found, whole=Cut(40, math.nan))
    assert lost.enough() is None
    assert lost.to_json()["validation_loss"] is None


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 10**6), st.integers(1, 300), st.integers(0, 10**6))
def test_budgets_of_a_curve_ascend_from_rank_1_to_all(cost: int, rank: int, more: int) -> None:
    most = cost * rank + more
    if most - cost < 12:
        with pytest.raises(ValueError, match="12 budgets"):
            levels(cost, most, 12)
        return
    found = levels(cost, most, 12)
    assert len(found) == 12
    assert found == sorted(set(found))
    assert (found[0], found[-1]) == (cost, most)


def test_what_cannot_be_is_refused_in_a_sentence(run: Path, adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    cost, out = own_schedule(adapter).graph.cost, ("--out", tmp_path / "cut")
    assert "an adapter does not grow here" in refused(run, "--rank", 8, *out)
    assert f"Ask for fewer than {4 * cost:,}" in refused(run, "--rank", 4, *out)
    assert f"Ask for {cost:,} or more" in refused(run, "--parameters", cost - 1, *out)
    assert "give one of them" in refused(run, "--rank", 2, "--parameters", cost, *out)
    assert "give --rank or --parameters" in refused(run, "--decide", "phi", *out)
    alone = tmp_path / "alone"
    shutil.copytree(adapter, alone)
    assert "give --model" in refused(alone, "--rank", 2, *out)
    assert "give --data" in refused(alone, "--rank", 2, "--decide", "phi", "--model", tiny_model, *out)
    assert "give --data" in refused(alone, "--model", tiny_model, *out)
    assert "does not exist" in refused(tmp_path / "nowhere", "--rank", 2, *out)
    assert "nothing is overwritten" in refused(run, "--rank", 2, "--out", alone)
    assert not (tmp_path / "cut").exists()


def test_a_plain_adapter_of_another_tool_becomes_the_same(
    run: Path, adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(adapter, foreign)
    for name in ("schedule.json", "adapter.json"):
        (foreign / name).unlink()
    ours = library.squeeze(source_of(run, adapter, has_data=False), 2, None, "spectral", tmp_path / "ours", quiet)
    found = asked(foreign, "--rank", 2, "--model", tiny_model, "--out", tmp_path / "theirs")
    assert found["metric"] is None
    assert found["validation_loss"] is None
    assert found["parameters"] == ours.after.parameters
    assert own_schedule(tmp_path / "theirs").ranks == ours.after.ranks
    first, second = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    for name in ours_modules(first):
        deltas = [
            at(half, name, own_schedule(tmp_path / place)) for half, place in ((first, "ours"), (second, "theirs"))
        ]
        assert torch.allclose(*deltas, atol=1e-6)


def ours_modules(found: dict[str, torch.Tensor]) -> list[str]:
    return sorted(name.removesuffix(".lora_A.weight") for name in found if name.endswith(".lora_A.weight"))


def at(found: dict[str, torch.Tensor], name: str, schedule: Any) -> torch.Tensor:
    a, b = found[f"{name}.lora_A.weight"], found[f"{name}.lora_B.weight"]
    return schedule.scaling.scale(len(a)) * b @ a


@pytest.mark.parametrize("decide", ["uniform", "spectral"])
def test_what_was_not_adapted_stays_so_and_no_rank_rises(
    run: Path, tiny_model: Path, tmp_path: Path, decide: Any
) -> None:
    loaded = load_model(str(tiny_model), "cpu")
    graph = loaded.parts.graph
    ranks = tuple(0 if p.layer == 0 else 1 + 2 * p.layer for p in graph.projections)
    schedule = replace(
        allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 7))), name="mixed", ranks=ranks
    )
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
    save_adapter(model, tmp_path / "mixed", schedule, loaded.parts, projector_state=False)
    done = library.squeeze(
        source_of(run, tmp_path / "mixed", False), None, 3 * graph.cost, decide, tmp_path / "cut", quiet
    )
    assert done.after.parameters <= 3 * graph.cost < done.before.parameters
    assert all(
        (after == 0) == (before == 0) and after <= before for after, before in zip(done.after.ranks, ranks, strict=True)
    )
    if decide == "uniform":
        assert {after for after, p in zip(done.after.ranks, graph.projections, strict=True) if p.layer > 1} == {4}
    assert not (tmp_path / "cut/projector.safetensors").exists()


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_which_adapter_is_meant(tmp_path: Path) -> None:
    found = make(tmp_path / "run", "config.yaml", "environment.json")
    with pytest.raises(HydraError, match="no adapter yet"):
        find_adapter(found)
    make(found, "trials/a-seed0/adapter/adapter_config.json")
    for place in (found, found / "trials/a-seed0", found / "trials/a-seed0/adapter"):
        named = find_adapter(place)
        assert (named.adapter, named.config) == (found / "trials/a-seed0/adapter", found / "config.yaml")
    make(found, "trials/b-seed0/adapter/adapter_config.json")
    with pytest.raises(HydraError, match=r"2 adapters.*a-seed0/adapter.*b-seed0/adapter"):
        find_adapter(found)
    make(found, "best/adapter/adapter_config.json")
    assert find_adapter(found).adapter == found / "best/adapter"
    assert find_adapter(make(tmp_path / "alone", "adapter_config.json")).run is None
    with pytest.raises(HydraError, match="no adapter is in it"):
        find_adapter(make(tmp_path / "other", "notes.txt"))


def test_a_budget_is_below_the_adapters_and_not_below_rank_1(adapter: Path) -> None:
    schedule = own_schedule(adapter)
    assert library.budget_below(schedule, 3, None) == Budget.of_rank(schedule.graph, 3)
    for rank, parameters in ((4, None), (None, schedule.parameters), (None, schedule.graph.cost - 1)):
        with pytest.raises(BudgetError):
            library.budget_below(schedule, rank, parameters)
    with pytest.raises(ConfigError):
        library.curve(opened_adapter.Source(adapter, None, has_data=False), quiet)  # type: ignore[arg-type]


def test_a_built_in_set_is_read_where_it_lies_and_another_one_never_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []
    monkeypatch.setattr(opened_adapter, "write_builtin_once", lambda name, folder: places.append(folder))
    make(tmp_path / "run", "data/set.txt")
    (tmp_path / "run/data/set.txt").write_text("demo\n")
    for name, run in (("demo", tmp_path / "run"), ("worlds", tmp_path / "run"), ("demo", None)):
        opened_adapter._files(DataConfig(train=name), run, tmp_path / "scratch")
    assert places == [tmp_path / "run/data", tmp_path / "scratch/data", tmp_path / "scratch/data"]


def test_data_of_the_command_replace_those_of_the_run(tmp_path: Path) -> None:
    named = find_adapter(make(tmp_path / "run", "config.yaml", "environment.json", "best/adapter/adapter_config.json"))
    kept = {key: value for key, (_, value) in said(named, None, None, None, None).items() if value is not None}
    assert kept == {}
    own = {key: value for key, (_, value) in said(named, None, "mine.json", None, 5).items() if value is not None}
    assert own == {
        "data.train": "mine.json",
        "data.validation": "mine.json",
        "data.images": "null",
        "data.validation_limit": 5,
    }
    assert said(named, None, "demo", None, None)["data.validation"] == ("--data", "null")

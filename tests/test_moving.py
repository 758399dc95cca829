"""Ranks that move: when, to what, and that a run which is stopped ends as an undisturbed one."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hydra_vlm import trials
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import TrainingConfig
from hydra_vlm.errors import ConfigError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.lora import attach
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.moving.plan import Move, plan_of, wide_schedule
from hydra_vlm.moving.resized import resize_all, write_resized
from hydra_vlm.moving.wide import cut_by, spectra, updates
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import Scaling
from hydra_vlm.training import trainer
from hydra_vlm.training.legs import Leg
from hydra_vlm.training.rates import Rates
from hydra_vlm.verification import lora_layers
from striking import OPTIONS, Place, killing
from test_deciding import GRAPH
from tiny import toy_config, write_toy_data

RUN = (
    *OPTIONS,
    "training.steps=8",
    "training.save_steps=100",
    "training.device_batch_size=2",
    "training.dropout=0.2",
    "training.learning_rate=0.02",
    "training.ranks=squeeze",
    "budget.rank=2",
)


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), "cpu")


# When and how far


@given(st.integers(1, 6), st.floats(1, 8), st.sampled_from(["fixed", "squeeze", "dynamic"]), st.integers(1, 400))
def test_a_plan_falls_to_the_budget_and_ends_before_the_last_third(
    rank: int, width: float, ranks: Any, steps: int
) -> None:
    budget = Budget.of_rank(GRAPH, rank)
    settings = TrainingConfig(ranks=ranks, width=width)
    plan = plan_of(GRAPH, budget, Scaling(), settings, steps)
    budgets = [plan.wide.budget, *(point.budget.parameters for point in plan.points)]
    assert budgets == sorted(budgets, reverse=True)
    assert len(plan.points) <= {"fixed": 0, "squeeze": 1, "dynamic": 3}[ranks]
    assert [point.step for point in plan.points] == sorted({point.step for point in plan.points})
    if ranks != "fixed":
        assert plan.points[-1].budget == budget
        assert plan.points[-1].step <= max(1, 2 * steps / 3)


@given(st.integers(1, 6), st.floats(1, 64))
def test_the_first_ranks_stay_below_half_of_a_module(rank: int, width: float) -> None:
    wide = wide_schedule(GRAPH, Budget.of_rank(GRAPH, rank), Scaling(), width)
    for found, p in zip(wide.ranks, GRAPH.projections, strict=True):
        assert found == max(rank, min(max(rank, round(width * rank)), min(p.in_features, p.out_features) // 2))
    assert wide.parameters <= wide.budget


def test_a_leg_cools_and_rises() -> None:
    cooled = Leg(until=10, cooling=4)
    assert [cooled.pace(step) for step in range(5, 11)] == [1, 1, 0.75, 0.5, 0.25, 0]
    ramp = Leg(ramp_from=6)
    assert [ramp.pace(step) for step in (5, 6, 7, 10, 11, 50)] == [1, 0.2, 0.4, 1, 1, 1]
    assert Leg(until=10).is_plain
    assert not cooled.is_plain


def test_a_move_is_read_back() -> None:
    schedule = allocate("uniform", AllocationRequest(GRAPH, Budget.of_rank(GRAPH, 2)))
    move = Move(
        5, "phi", (4,) * len(GRAPH.projections), schedule, math.nan, 1.5, ((2.0, 1.0),), (((1, 2), 0.5),), 7, 0.1
    )
    again = Move.from_json(json.loads(json.dumps(move.to_json())))
    assert math.isnan(again.loss_before)
    assert replace(again, loss_before=0) == replace(move, loss_before=0)


def test_a_loss_that_has_not_come_back_is_said() -> None:
    schedule = allocate("uniform", AllocationRequest(GRAPH, Budget.of_rank(GRAPH, 2)))
    move = Move(50, "spectral", (4,) * len(GRAPH.projections), schedule, 1.0, 1.1, ())
    for after, said in ((1.09, False), (1.2, True)):
        losses = tuple((step, 1.0 if step <= 50 else 5.0 if step <= 55 else after) for step in range(1, 101))
        record = TrialRecord("squeeze", 0, schedule, {}, losses, 1.0, (), 1.0, moves=(move,))
        assert record.lost_after(move) == pytest.approx(after - 1)
        assert ("not come back after ranks moved at step 50: +20%" in record.summary()) == said
    assert math.isnan(replace(record, train_losses=((100, 1.0),)).lost_after(move))


# Looking at a wide adapter and cutting it


def drawn(loaded: LoadedModel, rank: int = 4) -> Any:
    budget = Budget.of_rank(loaded.parts.graph, rank)
    schedule = allocate("uniform", AllocationRequest(loaded.parts.graph, budget))
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(model).values():
        weight = layer.lora_B["default"].weight
        weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model


def test_a_cut_adapter_is_the_best_of_its_rank_and_comes_back(loaded: LoadedModel) -> None:
    model, parts = drawn(loaded), loaded.parts
    before = {name: update.delta().clone() for name, update in updates(model).items()}
    kept = {name: update.a.clone() for name, update in updates(model).items()}
    found = spectra(model, parts, {})
    low = allocate("uniform", AllocationRequest(parts.graph, Budget.of_rank(parts.graph, 2)))
    with cut_by(model, parts, {}) as cut:
        cut(low)
        for name, sigma in zip(parts.names(), found, strict=True):
            error = torch.linalg.matrix_norm(before[name] - updates(model)[name].delta())
            assert float(error) == pytest.approx(math.hypot(*sigma[2:]), rel=1e-4)
            assert not updates(model)[name].b[:, 2:].any()
    for name, update in updates(model).items():
        assert torch.equal(update.a, kept[name])
        assert torch.equal(update.delta(), before[name])


# A run


@pytest.fixture
def place(tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tiny_model, toy, tmp_path, monkeypatch)


def moved(place: Place, *overrides: str) -> TrialRecord:
    """One trial whose ranks move, from wherever the folder has got to."""
    config = toy_config(place.model, place.toy, *RUN, *overrides)
    study = trials.prepare_study(config, place.run, quiet)
    wide = wide_schedule(study.graph, study.budget, trials.scaling_of(config), config.training.width)
    return trials.run_trial(study, "it", wide, 0, quiet, moving=True)


def results(place: Place) -> dict[str, bytes]:
    return {
        str(path.relative_to(place.trial)): path.read_bytes()
        for path in place.trial.rglob("*")
        if path.is_file() and path.name != "record.json"
    }


@pytest.mark.parametrize(
    ("decide", "ranks", "moments"),
    [("spectral", "squeeze", "carry"), ("uniform", "squeeze", "restart"), ("hydra", "dynamic", "carry")],
)
def test_a_run_ends_inside_its_budget(place: Place, decide: str, ranks: str, moments: str) -> None:
    asked = {"decide": decide, "ranks": ranks, "moments": moments, "steps": 16 if ranks == "dynamic" else 8}
    record = moved(place, *(f"training.{key}={value}" for key, value in asked.items()))
    schedule = record.schedule
    assert schedule is not None
    budget = 2 * schedule.graph.cost
    assert (
        schedule.parameters
        <= budget
        < record.most_trainable
        == record.moves[0].after.graph.parameters(record.moves[0].before)
    )
    assert len(record.moves) == {"squeeze": 1, "dynamic": 3}[ranks]
    assert record.moves[-1].step == {"squeeze": 4, "dynamic": 9}[ranks]
    assert record.trained["lora"] == schedule.parameters
    assert all(math.isfinite(loss) for move in record.moves for loss in (move.loss_before, move.loss_after))
    assert [step for step, _ in record.train_losses] == list(range(1, asked["steps"] + 1))
    assert [step for step, _ in record.validation_losses] == [asked["steps"]]
    weights = load_file(place.trial / "adapter/adapter_model.safetensors")
    assert sum(value.numel() for value in weights.values()) == schedule.parameters
    again = TrialRecord.from_json(json.loads((place.trial / "record.json").read_text()))
    assert again == record
    assert not (place.trial / "checkpoints").exists()


def test_phi_probes_and_takes_the_best(place: Place) -> None:
    record = moved(place, "training.decide=phi")
    (move,) = record.moves
    best = min(move.probed, key=lambda probe: probe[1])
    assert move.after.ranks == best[0]
    assert len({ranks for ranks, _ in move.probed}) > 3
    assert move.passes > 8 * len(move.probed)


def test_probes_need_validation_data(place: Place) -> None:
    with pytest.raises(ConfigError, match="probes schedules on the validation data"):
        moved(place, "training.decide=phi", "data.validation=null")


def test_norms_need_steps_in_which_there_are_some(place: Place) -> None:
    with pytest.raises(ConfigError, match=r"in the first 2 steps LoRA's A has none.*after step 1: train for more"):
        moved(place, "training.decide=hydra", "training.steps=3")


def test_stopped_on_both_sides_of_a_move_it_ends_the_same(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM before, in and after the step of the decision; then the resized checkpoint is lost, too."""
    whole = Place(tiny_model, toy, tmp_path / "whole", monkeypatch)
    expected = moved(whole, "training.decide=spectral")
    cut = Place(tiny_model, toy, tmp_path / "cut", monkeypatch)
    real = trainer.VLMTrainer.training_step
    for step in (3, 4, 5, 7):
        cut.at_step(step, killing(15))
        with pytest.raises(Interrupted):
            moved(cut, "training.decide=spectral")
        monkeypatch.setattr(trainer.VLMTrainer, "training_step", real)
    phases = cut.trial / "checkpoints"
    assert sorted(path.name for path in phases.glob("phase-*")) == ["phase-0", "phase-1"]
    for path in (phases / "phase-1").glob("checkpoint-*/trainer_state.json"):
        path.unlink()
    found = moved(cut, "training.decide=spectral")
    assert found.train_losses == expected.train_losses
    assert found.validation_loss == expected.validation_loss
    assert results(cut) == results(whole)


def test_a_decision_that_was_cut_off_is_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the new checkpoint and before the record of the decision."""
    from hydra_vlm.moving import phases

    real = phases._keep
    monkeypatch.setattr(phases, "_keep", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        moved(place)
    monkeypatch.setattr(phases, "_keep", real)
    assert (place.trial / "checkpoints/phase-1/checkpoint-4").is_dir()
    assert moved(place).schedule.parameters <= 2 * moved(place).schedule.graph.cost


# A checkpoint at other ranks


def test_moments_go_along_and_what_stays_is_left_alone(place: Place, tmp_path: Path) -> None:
    """The next gradient step of a rotated adapter moves its update as the own one does, but for the squares."""
    place.at_step(6, killing(15))
    with pytest.raises(Interrupted):
        place.train("training.steps=8", "training.learning_rate=0.02", "budget.rank=2")
    config = toy_config(place.model, place.toy, *OPTIONS, "training.learning_rate=0.02", "budget.rank=2")
    loaded = load_model(str(place.model), "cpu")
    schedule = allocate("uniform", AllocationRequest(loaded.parts.graph, Budget.of_rank(loaded.parts.graph, 2)))
    source = place.trial / "checkpoints/checkpoint-6"
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    stored = load_file(source / "adapter_model.safetensors")
    for name, update in updates(model).items():
        update.a.copy_(stored[f"base_model.model.{name}.lora_A.weight"])
        update.b.copy_(stored[f"base_model.model.{name}.lora_B.weight"])
    if loaded.parts.projector:
        loaded.model.get_submodule(loaded.parts.projector).requires_grad_(True)
    rates = Rates.of(config.training)
    same = resize_all(model, loaded.parts, schedule, {}, 0)
    write_resized(source, tmp_path / "same", model, loaded.parts, rates, same, "carry")
    own, copy = (
        torch.load(path / "optimizer.pt", weights_only=True) for path in (source, tmp_path / "same/checkpoint-6")
    )
    for number, state in own["state"].items():
        assert all(
            torch.equal(torch.as_tensor(copy["state"][number][key]), torch.as_tensor(state[key])) for key in state
        )
    wider = wide_schedule(loaded.parts.graph, Budget.of_rank(loaded.parts.graph, 2), schedule.scaling, 2)
    grown = resize_all(model, loaded.parts, wider, {}, 0)
    for name, update in grown.updates.items():
        assert torch.allclose(update.delta(), updates(model)[name].delta(), atol=1e-6)
    write_resized(source, tmp_path / "grown", model, loaded.parts, rates, grown, "carry")
    moved_state = torch.load(tmp_path / "grown/checkpoint-6/optimizer.pt", weights_only=True)["state"]
    shapes = sorted(tuple(state["exp_avg"].shape) for state in moved_state.values())
    lora = sorted(tuple(t.shape) for u in grown.updates.values() for t in (u.a, u.b))
    assert set(lora) <= set(shapes)
    restarted = tmp_path / "restarted"
    write_resized(source, restarted, model, loaded.parts, rates, grown, "restart")
    state = torch.load(restarted / "checkpoint-6/optimizer.pt", weights_only=True)
    assert len(state["state"]) == len(own["state"]) - 2 * len(grown.updates)
    assert state["param_groups"][0]["lr"] == own["param_groups"][0]["lr"] / 5
    assert "eval_loss" not in (restarted / "checkpoint-6/trainer_state.json").read_text()


def test_a_named_schedule_keeps_its_ranks(place: Place) -> None:
    record = place.train("training.ranks=squeeze")
    assert record.moves == ()
    assert record.schedule is not None
    assert record.most_trainable == record.schedule.parameters

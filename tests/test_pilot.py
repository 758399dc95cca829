"""The pilot: which rates come next, which win, what it costs; and a run that goes on from the winner."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_vlm import trials
from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.config import TrainingConfig
from hydra_vlm.errors import ConfigError, TrainingError
from hydra_vlm.interruption import Interrupted
from hydra_vlm.pilot.candidates import Length, Pilot, Tried, Tuned, following, winner
from hydra_vlm.records import TrialRecord
from hydra_vlm.training import trainer
from hydra_vlm.training.rates import Rates
from striking import OPTIONS, Place, killing
from tiny import toy_config, write_toy_data

GUESS = Tuned(4e-3, 4.0, 1e-3)
RUN = (*OPTIONS, "training.steps=40", "training.save_steps=100", "budget.rank=2", "training.learning_rate=0.02")


def quiet(_: str) -> None:
    """Say nothing."""


def line(best: float) -> list[Tuned]:
    """What is tried where the loss is a valley over the learning rate alone, until nothing is left."""
    tried: list[Tried] = []
    while (rates := following(GUESS, tried)) is not None and len(tried) < 40:
        loss = 1 + math.log(rates.learning_rate / best) ** 2 + math.log(rates.b_ratio / 4) ** 2
        tried.append(Tried(rates, loss + math.log(rates.projector_learning_rate / 1e-3) ** 2, 10))
    assert winner(tried).b_ratio == 4
    return [one.rates for one in tried]


@pytest.mark.parametrize("steps", range(-3, 4))
def test_the_search_walks_to_the_valley_and_looks_at_both_sides(steps: int) -> None:
    best = 4e-3 * 2.5**steps
    rates = [one.learning_rate for one in line(best)]
    for neighbour in (best / 2.5, best, best * 2.5):
        assert any(math.isclose(rate, neighbour, rel_tol=0.01) for rate in rates)
    assert rates[:2] == [4e-3, 1e-2]
    assert len(rates) <= abs(steps) + 3 + 4  # and both neighbours on the two other axes


def test_ties_go_to_the_lower_rate_and_what_diverged_never_wins() -> None:
    tried = [Tried(GUESS, 1.0, 10), Tried(GUESS.moved("learning_rate", 1), 0.995, 10)]
    assert winner(tried) == GUESS
    tried.append(Tried(GUESS.moved("learning_rate", 2), 0.98, 10))
    assert winner(tried).learning_rate == pytest.approx(0.025)
    tried.append(Tried(GUESS.moved("learning_rate", 3), math.nan, 10))
    assert winner(tried).learning_rate == pytest.approx(0.025)
    assert winner([Tried(GUESS, math.nan, 10)]) == GUESS


@given(st.integers(1, 20_000))
def test_all_candidates_cost_a_fifth_or_a_third(steps: int) -> None:
    length, tried = Length.of(steps), list[Tried]()
    while length.affords(tried):
        tried.append(Tried(GUESS, 1.0, length.trunk + length.cooling))
    thrown = sum(one.steps for one in tried) - (length.trunk if tried else 0)
    assert thrown <= (0.2 if steps >= 600 else 0.35) * steps
    assert steps < 50 or len(tried) >= 3
    assert length.is_worthwhile == (len(tried) >= 2)


def test_the_towers_rate_keeps_its_ratio() -> None:
    settings = TrainingConfig(learning_rate=1e-3, tower_learning_rate=2e-3)
    assert Tuned(4e-3, 2.0, 1e-3).settings(settings).tower_learning_rate == pytest.approx(8e-3)
    assert Tuned.of(TrainingConfig(), 1e-3).settings(TrainingConfig()).tower_learning_rate is None


def test_a_single_rate_stays_single() -> None:
    settings = TrainingConfig(learning_rate=1e-3, rates="single")
    guess = Tuned.of(settings, 1e-3)
    tried = [Tried(guess, 1.0, 1), Tried(guess.moved("learning_rate", 1), 2.0, 1)]
    assert following(guess, tried) == Tuned(4e-4)
    assert following(guess, [*tried, Tried(Tuned(4e-4), 2.0, 1)]) is None
    assert set(Rates.of(Tuned(4e-4).settings(settings)).to_json().values()) == {4e-4}
    assert Tuned.from_json(guess.to_json()) == guess


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")


def piloted(place: Place, *overrides: str) -> TrialRecord:
    config = toy_config(place.model, place.toy, *RUN, *overrides)
    study = trials.prepare_study(config, place.run, quiet)
    schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
    return trials.run_trial(study, "it", schedule, 0, quiet, pilot=True)


def test_the_winner_is_gone_on_from_and_a_stopped_pilot_ends_the_same(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Place(tiny_model, toy, tmp_path / "whole", monkeypatch)
    record = piloted(whole)
    assert record.pilot is not None
    assert len(record.pilot.tried) >= 3
    assert record.learning_rates["a"] == record.pilot.chosen.learning_rate
    assert record.pilot.thrown_away <= 0.35 * 40
    assert Pilot.from_json(json.loads(json.dumps(record.pilot.to_json()))) == record.pilot
    assert [step for step, _ in record.train_losses] == list(range(1, 41))
    plain = Place(tiny_model, toy, tmp_path / "plain", monkeypatch)
    chosen = [f"training.{key}={value}" for key, value in record.pilot.chosen.to_json().items()]
    alone = plain.train(*RUN, *chosen)
    assert alone.validation_loss == record.validation_loss  # the same steps, on the same machine
    cut = Place(tiny_model, toy, tmp_path / "cut", monkeypatch)
    real = trainer.VLMTrainer.training_step
    for step in (2, 4, 5, 3, 5, 30):
        cut.at_step(step, killing(15))
        with pytest.raises(Interrupted):
            piloted(cut)
        monkeypatch.setattr(trainer.VLMTrainer, "training_step", real)
    found = piloted(cut)
    assert (found.pilot, found.train_losses, found.validation_loss) == (
        record.pilot,
        record.train_losses,
        record.validation_loss,
    )


def test_a_candidate_that_diverges_ends_and_the_others_go_on(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tiny_model, toy, tmp_path, monkeypatch)
    real = trainer.VLMTrainer.compute_loss

    def spoilt(own: trainer.VLMTrainer, *args: object, **kwargs: object) -> object:
        loss = real(own, *args, **kwargs)  # type: ignore[arg-type]
        return loss * (math.nan if own.rates.a > 0.04 and own.model.training else 1)

    monkeypatch.setattr(trainer.VLMTrainer, "compute_loss", spoilt)
    record = piloted(place)
    assert record.pilot is not None
    losses = {one.rates.learning_rate: one.loss for one in record.pilot.tried}
    assert math.isnan(losses[0.05])
    assert record.pilot.chosen.learning_rate < 0.05
    assert math.isfinite(record.validation_loss)
    other = Place(tiny_model, toy, tmp_path / "other", monkeypatch)
    with pytest.raises(TrainingError, match=r"no rate of the pilot gave a finite loss"):
        piloted(other, "training.learning_rate=0.5")


def test_a_run_of_a_few_steps_keeps_its_rates(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = piloted(Place(tiny_model, toy, tmp_path, monkeypatch), "training.steps=3")
    assert record.pilot is not None
    assert record.pilot.tried == ()
    assert "too short" in record.pilot.summary()
    assert record.learning_rates["a"] == 0.02


def test_a_pilot_needs_validation_data(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"training.pilot chooses rates by their validation loss"):
        piloted(Place(tiny_model, toy, tmp_path, monkeypatch), "data.validation=null")

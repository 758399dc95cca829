"""What recorders measure, against plain autograd on the same batch; and signals in a run folder."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from hydra_vlm import measuring, schedules, signals, train
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.readers import open_reader
from hydra_vlm.data.records import read_records
from hydra_vlm.errors import ConfigError, GraphMismatchError, RunFolderError, TrainingError
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.resizing import RIDGE
from hydra_vlm.run_folder import RunFolder
from hydra_vlm.schedule import RankSchedule
from hydra_vlm.signals import Signal, kinds
from hydra_vlm.training.loss import mean_over_batch
from hydra_vlm.training.recipe import prepare
from hydra_vlm.training.recording import Recorder, effective_rank, recorder_of
from hydra_vlm.training.signals.effective_rank import STEPS, whitened_squares
from hydra_vlm.training.speed import sped_up
from hydra_vlm.trials import prepare_study
from hydra_vlm.verification import lora_layers
from test_speed import uniform, unlabelled
from tiny import toy_config
from tolerances import ROWS, assert_same_sums

OTHERS = ("sensitivity", "activation_spectrum", "effective_rank")


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), "cpu")


@pytest.fixture
def batch(loaded: LoadedModel, toy_data: Path) -> dict[str, Tensor]:
    reader = open_reader(loaded.processor, "v1-short")
    return reader.batch([reader.item(record) for record in read_records(toy_data / "train.json")[:4]])


def with_adapter(loaded: LoadedModel) -> PeftModel:
    """Uniform LoRA whose B says something."""
    model = prepare(loaded, uniform(loaded), TrainingConfig(), seed=0).train()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def one_step(recorder: Recorder, model: PeftModel, loaded: LoadedModel, batch: dict[str, Tensor]) -> None:
    """A step as the Trainer takes it, with all that makes it cheaper."""
    model.zero_grad()
    with sped_up(model, loaded.parts, TrainingConfig()) as positions, recorder.watching(model):
        assert positions is not None
        positions.read(batch)
        outputs = model(**unlabelled(batch), use_cache=False)
        mean_over_batch(positions)(outputs, batch["labels"], None).backward()
        recorder.step()


def plain_gradients(model: PeftModel, loaded: LoadedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of every adapted projection's own weight, by autograd."""
    layers = lora_layers(model)
    weights = {name: layers[name].get_base_layer().weight.requires_grad_(True) for name in loaded.parts.names()}
    model(**batch, use_cache=False).loss.backward()
    gradients = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.requires_grad_(False).grad = None
    return gradients


def test_every_kind_has_a_recorder_that_leaves_no_trace(loaded: LoadedModel, batch: dict[str, Tensor]) -> None:
    assert {"gradient_norm", *OTHERS} <= set(kinds())
    model = with_adapter(loaded)
    for kind in kinds():
        recorder = recorder_of(kind, model, loaded.parts)
        one_step(recorder, model, loaded, batch)
        signal = recorder.signal(0, quiet)
        assert (signal.kind, signal.graph, signal.steps) == (kind, loaded.parts.graph, 1)
        assert min(signal.values) > 0
        assert signal.about
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lora_layers(model).values())
    assert not model._forward_pre_hooks
    with pytest.raises(GraphMismatchError, match="no LoRA adapter"):
        recorder_of("sensitivity", model.unload(), loaded.parts)


def test_sensitivity_is_weight_times_gradient(loaded: LoadedModel, batch: dict[str, Tensor]) -> None:
    model = with_adapter(loaded)
    recorder = recorder_of("sensitivity", model, loaded.parts)
    one_step(recorder, model, loaded, batch)
    layers = lora_layers(model)
    expected = [
        sum(
            (side["default"].weight * side["default"].weight.grad).abs().mean()
            for side in (layers[name].lora_A, layers[name].lora_B)
        )
        for name in loaded.parts.names()
    ]
    assert_same_sums(torch.tensor(recorder.signal(0, quiet).values), torch.stack(expected).detach())
    recorder.steps = [torch.zeros(2), torch.tensor([math.nan, 1.0]), torch.tensor([1.0, 3.0]), torch.tensor([3.0, 5.0])]
    recorder.parts = SimpleNamespace(graph=signals.ComputationGraph("g", loaded.parts.graph.projections[:2]))
    kept = recorder.signal(0, quiet)
    assert (kept.values, kept.steps) == ((2.0, 4.0), 2)
    recorder.steps = recorder.steps[:2]
    with pytest.raises(TrainingError, match=r"too few for the sensitivity.*raise profile\.steps"):
        recorder.signal(0, quiet)


def test_the_weights_gradient_is_that_of_autograd(loaded: LoadedModel, batch: dict[str, Tensor]) -> None:
    """Also with packed rows, a last layer at supervised positions alone, and fused layers."""
    model = with_adapter(loaded)
    expected = plain_gradients(model, loaded, batch)
    recorder = recorder_of("effective_rank", model, loaded.parts)
    one_step(recorder, model, loaded, batch)
    assert recorder.gradients.keys() == expected.keys()
    for name, gradient in recorder.gradients.items():
        assert_same_sums(gradient, expected[name], ROWS)
    signal = recorder.signal(0, quiet)
    for name, value in zip(loaded.parts.names(), signal.values, strict=True):
        c = recorder.moments[name].double()
        shares, vectors = torch.linalg.eigh(c + RIDGE * c.diagonal().mean() * torch.eye(len(c)))
        white = expected[name].double() @ vectors @ torch.diag(shares.rsqrt()) @ vectors.T
        squares = torch.linalg.svdvals(white).square()
        p = squares / squares.sum()
        assert value == pytest.approx(float((-(p * p.log())).sum().exp()), rel=1e-3)
    recorder.steps = STEPS - 1
    assert not recorder.enough
    one_step(recorder, model, loaded, batch)
    assert recorder.enough
    twice = recorder.gradients[name].clone()
    assert_same_sums(twice, 2 * expected[name], ROWS)
    one_step(recorder, model, loaded, batch)
    assert torch.equal(recorder.gradients[name], twice), "nothing is added any more"


def test_effective_rank_counts_directions() -> None:
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, -1e-9])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    gradient, variances = torch.eye(3).double(), torch.tensor([4.0, 1.0, 1.0]).double()
    both = [whitened_squares(gradient, moment) for moment in (variances, torch.diag(variances))]
    torch.testing.assert_close(both[0], both[1])
    torch.testing.assert_close(both[0], (1 / (variances + RIDGE * 2)).sort().values)


WISHES = ("schedules=[uniform,proportional]", "allocation.signal=effective-rank")


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run measures and allocates before its trials, in proportion to the effective rank; its data beside it."""
    from tiny import write_toy_data

    home = tmp_path_factory.mktemp("signals")
    study = prepare_study(toy_config(tiny_model, write_toy_data(home / "toy"), *WISHES), home / "run", quiet)
    measured = measuring.measure(study, [study.config.profile.signal, *schedules.needed_kinds(study)], quiet)
    schedules.allocate_all(study, measured)
    return home


def test_a_run_measures_what_its_schedules_follow(finished: Path) -> None:
    run = finished / "run"
    signal = Signal.from_json(json.loads((run / "signals/effective_rank.json").read_text()))
    assert signal.steps == 4
    assert GradientNormProfile.from_json(json.loads((run / "profile.json").read_text())).steps == 2
    schedule = RankSchedule.from_json(json.loads((run / "schedules/proportional.json").read_text()))
    request = AllocationRequest(schedule.graph, Budget.of_rank(schedule.graph, 4))
    expected = allocate("proportional", replace(request, signals=(signal,), signal="effective_rank"))
    assert schedule.ranks == expected.ranks
    assert len(set(schedule.ranks)) > 1
    assert not (run / "profile-run").exists()


def test_signals_are_read_back_and_bound_to_the_run(
    finished: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished / "run"
    same = toy_config(tiny_model, finished / "toy", *WISHES, "profile.signal=activation_spectrum")
    measured = train.profile(same, run, quiet)  # another kind beside those that are there
    assert isinstance(measured, Signal)
    assert measured.steps == 4
    monkeypatch.setattr(measuring, "finetune", None)
    assert train.profile(same, run, quiet) == measured
    other = toy_config(tiny_model, finished / "toy", *WISHES, "allocation.signal=sensitivity")
    with pytest.raises(RunFolderError, match=r"allocation\.signal: 'effective_rank' there, 'sensitivity' now"):
        train.profile(other, run, quiet)
    stored = RunFolder(run).signal("activation_spectrum")
    stored.write_text(stored.read_text()[:50])
    with pytest.raises(RunFolderError, match=r"activation_spectrum\.json.*remove it, and it is measured again"):
        train.profile(same, run, quiet)
    stored.unlink()


def test_a_new_kind_takes_one_file(
    finished: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hydra_vlm.training.signals as folder

    (tmp_path / "weight_norm.py").write_text(
        "from contextlib import nullcontext\n"
        "from hydra_vlm.signals import Signal\n"
        "from hydra_vlm.verification import lora_layers\n"
        "class Recorder:\n"
        "    enough = True\n"
        "    def __init__(self, model, parts):\n"
        "        self.model, self.parts = model, parts\n"
        "    def watching(self, model):\n"
        "        return nullcontext()\n"
        "    def step(self):\n"
        "        pass\n"
        "    def signal(self, skip, say):\n"
        "        layers = lora_layers(self.model)\n"
        "        norms = [float(layers[n].get_base_layer().weight.norm()) for n in self.parts.names()]\n"
        "        return Signal(self.parts.graph, 'weight_norm', tuple(norms), 1)\n"
    )
    with pytest.raises(ConfigError, match="no signal is called 'weight_norm'"):
        toy_config(tiny_model, finished / "toy", "profile.signal=weight_norm")
    monkeypatch.setattr(signals, "RECORDERS", tmp_path)
    monkeypatch.setattr(folder, "__path__", [str(tmp_path)])
    measured = train.profile(
        toy_config(tiny_model, finished / "toy", "profile.signal=weight_norm"), tmp_path / "run", quiet
    )
    assert isinstance(measured, Signal)
    assert min(measured.values) > 0
    assert (tmp_path / "run/signals/weight_norm.json").is_file()

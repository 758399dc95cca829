"""Many trials on one loaded model: none leaves a trace, and the tower's features are computed once."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hydra_vlm import trials
from hydra_vlm.allocation import AllocationRequest, allocate
from hydra_vlm.config import load_config
from hydra_vlm.data import features as features_room
from hydra_vlm.data.cache import CacheWarning
from hydra_vlm.data.feature_store import FeatureStore, StoredFeatures, fingerprint, read_rows
from hydra_vlm.data.features import encode_into, encode_once
from hydra_vlm.errors import DataError
from hydra_vlm.files import read_json
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.training.recipe import adapting
from hydra_vlm.training.trainer import ByLength
from tiny import toy_config, write_toy_data


def quiet(_: str) -> None:
    """Say nothing."""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_data(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture
def loaded(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), "cpu")


def logits(loaded: LoadedModel) -> Tensor:
    ids = torch.tensor([[1, *[loaded.model.config.image_token_id] * loaded.processor.image_tokens, 50, 60]])
    side = loaded.model.config.vision_config.image_size
    pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
    with torch.no_grad():
        found: Tensor = loaded.model(input_ids=ids, pixel_values=pixels).logits
    return found


# A model lent to trials


def test_ten_trials_leave_the_base_model_as_it_was(tiny_model: Path, toy: Path, tmp_path: Path) -> None:
    """To the bit in what it computes, too: its weights never leave the memory they are in."""
    config = toy_config(tiny_model, toy, "training.steps=2", "training.learning_rate=0.05")
    study = trials.prepare_study(config, tmp_path / "run", quiet)
    before, weights = logits(study.base), {k: v.clone() for k, v in study.base.model.state_dict().items()}
    losses = set()
    for seed in range(10):
        rank = AllocationRequest(study.graph, study.budget, seed=seed)
        schedule = allocate("random" if seed % 2 else "uniform", rank)
        losses.add(trials.run_trial(study, f"trial{seed}", schedule, seed, quiet).validation_loss)
    assert len(losses) == 10  # something was trained
    after = study.base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    assert torch.equal(logits(study.base), before)
    assert not any(parameter.requires_grad for parameter in study.base.model.parameters())
    assert not study.base.model.training


def test_a_trial_is_the_same_first_or_later_on_the_lent_model(tiny_model: Path, toy: Path, tmp_path: Path) -> None:
    """To the bit: the base stays where it is in memory, and each trial trains a copy of the projector."""
    config = toy_config(tiny_model, toy)
    first = trials.prepare_study(config, tmp_path / "first", quiet)
    later = trials.prepare_study(config, tmp_path / "later", quiet)
    schedule = allocate("uniform", AllocationRequest(first.graph, first.budget))
    other = allocate("random", AllocationRequest(first.graph, first.budget, seed=3))
    alone = trials.run_trial(first, "it", schedule, 5, quiet)
    trials.run_trial(later, "other", other, 1, quiet)
    behind = trials.run_trial(later, "it", schedule, 5, quiet)
    assert (alone.train_losses, alone.validation_loss) == (behind.train_losses, behind.validation_loss)
    weights = [(run / "trials/it-seed5/adapter/adapter_model.safetensors").read_bytes() for run in tmp_path.iterdir()]
    assert weights[0] == weights[1]


def test_what_breaks_a_trial_leaves_the_model_as_it_was(loaded: LoadedModel) -> None:
    before = logits(loaded)
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, trials.Budget.of_rank(graph, 2)))

    def break_off() -> None:
        with adapting(loaded, schedule, load_config(None).training, 0) as model:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert torch.equal(logits(loaded), before)
    with adapting(loaded, schedule, load_config(None).training, 0) as model:  # and it can be lent again
        assert sum(p.requires_grad for p in model.parameters()) > 0


def test_a_projector_in_bfloat16_comes_back_in_bfloat16(tiny_model: Path) -> None:
    loaded = load_model(str(tiny_model), "cpu", dtype="bfloat16")
    before, graph = logits(loaded), loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, trials.Budget.of_rank(graph, 2)))
    for _ in range(2):
        with adapting(loaded, schedule, load_config(None).training, 0):
            kinds = {p.dtype for n, p in loaded.model.named_parameters() if "projector" in n and p.requires_grad}
            assert kinds == {torch.float32}
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), before)


def test_a_learning_rate_of_its_own_and_losses_on_the_way(tiny_model: Path, toy: Path, tmp_path: Path) -> None:
    config = toy_config(tiny_model, toy, "training.watch_steps=2")
    study = trials.prepare_study(config, tmp_path / "run", quiet)
    schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
    seen: list[tuple[int, float]] = []
    plain = trials.run_trial(study, "plain", schedule, 0, quiet)
    watched = trials.run_trial(study, "watched", schedule, 0, quiet, watch=lambda *pair: seen.append(pair))
    hotter = trials.run_trial(study, "hotter", schedule, 0, quiet, learning_rate=1e-2)
    assert [step for step, _ in seen] == [2, 4]
    assert plain.validation_loss == watched.validation_loss != hotter.validation_loss

    def refuse(step: int, loss: float) -> None:
        raise LookupError

    with pytest.raises(LookupError):
        trials.run_trial(study, "refused", schedule, 0, quiet, watch=refuse)
    assert not (study.folder.trial("refused-seed0") / "record.json").exists()


# Features on disk


def images(toy: Path) -> list[str]:
    return [str(path) for path in sorted(toy.glob("*.png"))]


def test_stored_features_are_the_towers_to_the_bit(loaded: LoadedModel, toy: Path, tmp_path: Path) -> None:
    """One model in one place computes both, in the same batches."""
    store, paths = FeatureStore(tmp_path, 1.0), images(toy)
    computed = encode_once(loaded.model, loaded.processor, paths)
    places = encode_into(store, loaded.model, loaded.processor, paths)
    again = encode_into(FeatureStore(tmp_path, 1.0), loaded.model, loaded.processor, paths)
    assert places == again
    for found in (read_rows(places), StoredFeatures(places)):
        assert found.keys() == computed.keys()
        assert all(torch.equal(found[key], computed[key]) and found[key].dtype == computed[key].dtype for key in found)


def test_nothing_is_encoded_twice(
    loaded: LoadedModel, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, paths = FeatureStore(tmp_path / "store", 1.0), images(toy)
    opened: Counter[str] = Counter()
    real = features_room.load_image

    def counting(path: str) -> Any:
        opened[path] += 1
        return real(path)

    monkeypatch.setattr(features_room, "load_image", counting)
    copy = tmp_path / "copy.png"
    copy.write_bytes(Path(paths[0]).read_bytes())
    encode_into(store, loaded.model, loaded.processor, paths[:5])
    places = encode_into(store, loaded.model, loaded.processor, [*paths, str(copy)])
    assert opened == Counter(paths)
    square = loaded.processor.image_aspect_ratio
    assert places[str(copy), square] == places[paths[0], square]


def test_the_fingerprint_follows_weights_dtype_and_preprocessing(tiny_model: Path, loaded: LoadedModel) -> None:
    marks = [fingerprint(loaded.model, loaded.processor)]
    assert fingerprint(load_model(str(tiny_model), "cpu").model, loaded.processor) == marks[0]
    marks.append(fingerprint(load_model(str(tiny_model), "cpu", dtype="bfloat16").model, loaded.processor))
    loaded.processor.image_aspect_ratio = "square"
    marks.append(fingerprint(loaded.model, loaded.processor))
    loaded.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    marks.append(fingerprint(loaded.model, loaded.processor))
    with torch.no_grad():
        next(loaded.model.model.vision_tower.parameters()).view(-1)[0] += 1e-3
    marks.append(fingerprint(loaded.model, loaded.processor))
    assert len(set(marks)) == len(marks)


def test_the_store_keeps_to_its_size(
    loaded: LoadedModel, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_room, "BLOCK", 1)  # a block a batch
    monkeypatch.setattr(features_room, "CPU_BATCH", 2)
    paths = images(toy)
    whole = FeatureStore(tmp_path / "whole", 1.0)
    encode_into(whole, loaded.model, loaded.processor, paths)
    taken = sum(path.stat().st_size for path in whole.folder.rglob("*.safetensors"))
    half = FeatureStore(tmp_path / "half", taken / 2e9)
    with pytest.raises(DataError, match="disk_cache_gigabytes"):
        encode_into(half, loaded.model, loaded.processor, paths)
    assert 0 < sum(path.stat().st_size for path in half.folder.rglob("*.safetensors")) <= taken / 2


@pytest.mark.parametrize("how", ["cut", "a byte"])
def test_a_damaged_block_is_named_and_encoded_again(loaded: LoadedModel, toy: Path, tmp_path: Path, how: str) -> None:
    store, paths = FeatureStore(tmp_path, 1.0), images(toy)
    encode_into(store, loaded.model, loaded.processor, paths)
    (block,) = tmp_path.rglob("*.safetensors")
    raw = bytearray(block.read_bytes())
    raw[-10] ^= 1
    block.write_bytes(raw if how == "a byte" else raw[:40])
    computed = encode_once(loaded.model, loaded.processor, paths)
    with pytest.warns(CacheWarning, match=f"{block.name} is damaged .* made anew"):
        places = encode_into(store, loaded.model, loaded.processor, paths)
    stored = read_rows(places)
    assert all(torch.equal(stored[key], computed[key]) for key in computed)


@pytest.mark.parametrize("memory", ["2", "1e-9"])
def test_a_run_trains_alike_from_memory_and_from_disk(tiny_model: Path, toy: Path, tmp_path: Path, memory: str) -> None:
    config = toy_config(tiny_model, toy, f"training.cache_gigabytes={memory}", "training.steps=2")
    study = trials.prepare_study(config, tmp_path / "run", quiet)
    assert isinstance(study.data.reader.features, StoredFeatures if memory == "1e-9" else dict)
    unkept = toy_config(
        tiny_model, toy, "training.cache_gigabytes=0", "training.disk_cache_gigabytes=0", "training.steps=2"
    )
    plain = trials.prepare_study(unkept, tmp_path / "plain", quiet)
    assert plain.data.reader.features is None
    schedule = allocate("uniform", AllocationRequest(study.graph, study.budget))
    kept, pixels = (trials.run_trial(s, "it", schedule, 0, quiet) for s in (study, plain))
    assert kept.validation_loss == pytest.approx(pixels.validation_loss, rel=1e-5)
    assert read_json(study.folder.trial("it-seed0") / "record.json")["validation_loss"] == kept.validation_loss


# Batches by length


def test_batches_hold_records_of_about_one_length() -> None:
    lengths = [10 + (i * 37) % 90 for i in range(203)]
    order = ByLength(lengths, 8, seed=1)
    numbers = list(order)
    assert sorted(numbers) == list(range(203))
    batches = [numbers[i : i + 8] for i in range(0, 203, 8)]
    spread = [max(lengths[n] for n in batch) - min(lengths[n] for n in batch) for batch in batches]
    assert sum(spread) / len(spread) < 25  # at random: about 70
    means = [sum(lengths[n] for n in batch) / len(batch) for batch in batches]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    lengths = [10 + (i * 37) % 90 for i in range(64)]
    torch.manual_seed(0)
    first = list(ByLength(lengths, 8, seed=1))
    torch.manual_seed(1)
    same, other, later = ByLength(lengths, 8, seed=1), ByLength(lengths, 8, seed=2), ByLength(lengths, 8, seed=1)
    later.set_epoch(1)
    assert list(same) == first
    assert list(other) != first
    assert list(later) != first


def test_grouped_training_resumes_to_the_same_end(
    tiny_model: Path, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra_vlm.training.trainer import VLMTrainer

    config = toy_config(tiny_model, toy, "training.group_by_length=true", "training.batch_size=2", "training.steps=7")
    whole = trials.prepare_study(config, tmp_path / "whole", quiet)
    schedule = allocate("uniform", AllocationRequest(whole.graph, whole.budget))
    expected = trials.run_trial(whole, "it", schedule, 0, quiet)
    cut = trials.prepare_study(config, tmp_path / "cut", quiet)
    real, steps = VLMTrainer.training_step, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 6:
            raise InterruptedError
        return real(self, *args, **kwargs)

    monkeypatch.setattr(VLMTrainer, "training_step", failing)
    with pytest.raises(InterruptedError):
        trials.run_trial(cut, "it", schedule, 0, quiet)
    found = trials.run_trial(cut, "it", schedule, 0, quiet)
    assert (found.train_losses, found.validation_loss) == (expected.train_losses, expected.validation_loss)

"""Plans against what autograd keeps, what FlopCounterMode counts, and what is trained."""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from families import FAMILIES
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.commands.plan import plan_config
from hydra_vlm.config import TrainingConfig
from hydra_vlm.data.templates import IGNORED
from hydra_vlm.errors import ConfigError
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.planning import flops, memory
from hydra_vlm.planning.advice import remedies
from hydra_vlm.planning.lengths import Rows
from hydra_vlm.planning.plan import GIB, Device, manner_of
from hydra_vlm.planning.reading import outline, shape_of
from hydra_vlm.planning.run import estimate, make_plan, planner_of
from hydra_vlm.planning.shapes import Batch, Manner, Shape
from hydra_vlm.training.loss import mean_over_batch
from hydra_vlm.training.recipe import adapting, count_trained
from hydra_vlm.training.speed import sped_up
from tiny import save_tiny_model, toy_config

ROWS, LENGTH, RANK = 3, 48, 4
IMAGE_TOKENS = 4
PIXELS = (3, 32, 32)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MobileVLM wide enough that no constant hides in the rounding."""
    return save_tiny_model(tmp_path_factory.mktemp("plan") / "model", layers=3, hidden=64, intermediate=176, kv_heads=4)


def shape_at(folder: Path, rank: int) -> Shape:
    source = outline(folder)
    graph = source.parts.graph
    return shape_of(source, allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, rank))))


def opened(loaded: LoadedModel, rank: int) -> Any:
    graph = loaded.parts.graph
    schedule = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, rank)))
    return adapting(loaded, schedule, TrainingConfig(), 0)


def inputs(loaded: LoadedModel) -> dict[str, Tensor]:
    ids = torch.randint(4, 200, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    ids[:, :IMAGE_TOKENS] = loaded.model.config.image_token_id
    pixels = torch.zeros(ROWS, *PIXELS, dtype=loaded.model.dtype)
    return {"input_ids": ids, "labels": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids)}


def kept_bytes(forward: Callable[[], object], model: Any, autocast: bool) -> int:
    """What autograd holds after a forward pass, parameters apart; each storage once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        forward()
    return sum(found.values())


@pytest.mark.parametrize(
    ("dtype", "autocast", "attention"),
    list(itertools.product(("float32", "bfloat16"), (False, True), ("eager", "sdpa"))),
)
def test_kept_activations_are_what_autograd_keeps(saved: Path, dtype: str, autocast: bool, attention: Any) -> None:
    loaded = load_model(str(saved), "cpu", dtype=dtype)
    loaded.model.set_attn_implementation(attention)
    shape = shape_at(saved, RANK)
    how = Manner(weight=4 if dtype == "float32" else 2, autocast=autocast, attention=attention)
    batch = Batch(ROWS, LENGTH, ROWS, ROWS * LENGTH)
    with opened(loaded, RANK) as model:
        measured = kept_bytes(lambda: model.train()(**inputs(loaded)), model, autocast)
    layers = sum(memory.saved_by_layer(shape.decoder, layer, batch, how) for layer in shape.decoder.layers)
    rest = batch.positions * (4 * shape.vocabulary + 4 * shape.decoder.width) + ROWS * shape.projector.saved
    assert layers + rest == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("common", [0, 12])
def test_a_faster_step_keeps_and_computes_what_is_planned(saved: Path, common: int) -> None:
    loaded, shape = load_model(str(saved), "cpu"), shape_at(saved, RANK)
    supervised = LENGTH // 3
    given = inputs(loaded)
    given["input_ids"][:, :common] = torch.arange(4, 4 + common)
    given["input_ids"][:, common : common + IMAGE_TOKENS] = loaded.model.config.image_token_id
    given["labels"] = given["labels"].clone()
    given["labels"][:, :-supervised] = IGNORED
    settings = TrainingConfig()
    with opened(loaded, RANK) as model, sped_up(model, loaded.parts, settings) as positions:
        assert positions is not None
        positions.read(given)
        labels = given.pop("labels")

        def loss() -> Tensor:
            return mean_over_batch(positions)(model.train()(**given), labels)

        measured = kept_bytes(loss, model, False)
        with FlopCounterMode(display=False) as counter:
            loss().backward()
    end = ROWS * supervised
    rows = Rows((LENGTH,), ROWS, supervised, 1.0, common, 1.0)
    batch, how = rows.packed(ROWS, LENGTH, LENGTH), Manner(supervised_only=True, packed=True)
    assert (batch.packed is None) == (common == 0)
    *others, last = shape.decoder.layers
    layers = sum(memory.saved_by_layer(shape.decoder, layer, batch, how) for layer in others)
    layers += memory.saved_by_layer(shape.decoder, last, batch, how, end=end)
    rest = 4 * end * shape.vocabulary + 4 * batch.positions * shape.decoder.width + ROWS * shape.projector.saved
    assert layers + rest == pytest.approx(measured, rel=0.05)
    # torch counts no products that are added in place: LoRA's second one, forward and backward.
    assert flops.training_step(shape, batch, how).total == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flops_and_parameters_are_counted_exactly(saved: Path, checkpointing: bool) -> None:
    loaded = load_model(str(saved), "cpu", attention="eager")  # torch does not count the CPU's fused attention
    shape = shape_at(saved, RANK)
    batch, how = Batch(ROWS, LENGTH, ROWS, ROWS * LENGTH), Manner(checkpointing=checkpointing)
    with opened(loaded, RANK) as model:
        assert memory.trained_count(shape, False, True) == sum(count_trained(model, loaded.parts).values())
        if checkpointing:
            loaded.model.activation_checkpointing_enable({"use_reentrant": False})
        with FlopCounterMode(display=False) as counter:
            model.train()(**inputs(loaded)).loss.backward()
        loaded.model.activation_checkpointing_disable()
    assert flops.training_step(shape, batch, how).total == pytest.approx(counter.get_total_flops(), rel=0.002)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        loaded.model(**inputs(loaded))
    plain = shape_at(saved, RANK)
    bare = flops.forward(plain, batch, batch.positions)
    assert bare.total - bare.adapter == counter.get_total_flops()


def test_flops_of_answers_are_counted_exactly(saved: Path) -> None:
    loaded, shape = load_model(str(saved), "cpu"), shape_of(outline(saved))
    given = {name: value for name, value in inputs(loaded).items() if name != "labels"}
    with FlopCounterMode(display=False) as counter:
        loaded.model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    predicted = flops.generation(shape, Batch(ROWS, LENGTH, ROWS, 0), 5).total
    assert predicted == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("family", ["llava", "smolvlm", "gemma3", "llama"])
def test_other_families_have_their_parameters_counted_once(family: str, tmp_path: Path) -> None:
    folder = FAMILIES[family].save(tmp_path / "model")
    loaded, shape = load_model(str(folder), "cpu"), shape_at(folder, 2)
    assert sum(shape.parameters.values()) == sum(p.numel() for p in loaded.model.parameters())
    assert len(shape.decoder.layers) == 3
    assert (shape.parameters["tower"] > 0) == (family != "llama")
    with opened(loaded, 2) as model:
        trained = sum(count_trained(model, loaded.parts).values())
    assert memory.trained_count(shape, False, family != "llama") == trained


def test_each_way_of_saving_saves_where_it_should(saved: Path) -> None:
    shape, batch, how = shape_at(saved, RANK), Batch(8, 256, 8, 128), Manner()
    plain = memory.training_step(shape, batch, how)
    thrifty = memory.training_step(shape, batch, replace(how, checkpointing=True))
    assert thrifty.total < 0.6 * plain.total
    eight = memory.training_step(shape, batch, replace(how, optimizer="adamw-8bit"))
    assert plain.parts["optimizer states"] == 4 * eight.parts["optimizer states"]
    four = memory.weights(shape, replace(how, four_bits=True), True)
    assert 7 * four.parts["weights: decoder, 4 bits"] < memory.weights(shape, how, True).parts["weights: decoder"]
    few = memory.training_step(shape, batch, replace(how, supervised_only=True))
    assert few.total < plain.total
    full = memory.training_step(shape, batch, how, full=True)
    assert full.parts["optimizer states"] > 5 * plain.parts["optimizer states"]


def test_what_is_advised_fits_when_planned_again(saved: Path, toy_data: Path) -> None:
    config = toy_config(saved, toy_data, "training.batch_size=8", "training.precision=fp32")
    planner = planner_of(config, Device("cpu", 64 * GIB, "test"))
    roomy = planner(config)
    assert roomy.fits
    assert remedies(config, roomy, planner) == ()
    tight = planner_of(config, Device("cpu", roomy.peak.memory.total - 300_000, "test"))
    found = remedies(config, tight(config), tight)
    assert found[-1].fits
    assert all(remedy.saving >= 0 for remedy in found)
    changed = config
    for key, value in (change for remedy in found for change in remedy.changes):
        section, _, leaf = key.partition(".")
        inner = getattr(changed, section).model_copy(update={leaf: value})
        changed = changed.model_copy(update={section: inner})
    assert tight(changed).fits
    assert tight(changed).peak.memory.total == found[-1].peak
    hopeless = planner_of(config, Device("cpu", 1000, "test"))
    assert not remedies(config, hopeless(config), hopeless)[-1].fits


def test_a_plan_reads_the_data_and_names_every_phase(saved: Path, toy_data: Path) -> None:
    config = toy_config(saved, toy_data, "schedules=[uniform,full]", "training.steps=null", "training.epochs=3")
    text, found = plan_config(config, 4.0)
    phases = {phase["name"]: phase for phase in found["phases"]}
    assert list(phases) == [
        *("profile", "training", "wide training", "full fine-tuning", "validation", "evaluation", "search"),
        "image features",
    ]
    assert phases["wide training"]["steps"] == 3
    assert phases["wide training"]["peak_bytes"] > phases["training"]["peak_bytes"]
    assert phases["training"]["steps"] == 6  # 8 records in batches of 4, three times
    assert phases["full fine-tuning"]["peak_bytes"] > phases["training"]["peak_bytes"]
    assert phases["search"]["flops"] > 20 * phases["training"]["flops"]
    assert found["fits"]
    assert "8 of 8 training rows tokenized" in text
    assert re.search(r"rows are packed: of a step's [\d,]+ positions [\d,]+ go through the decoder", text)
    unpacked = config.model_copy(update={"training": config.training.model_copy(update={"packed_rows": False})})
    text, more = plan_config(unpacked, 4.0)
    assert "rows are packed" not in text
    assert more["phases"][1]["flops"] > phases["training"]["flops"]
    assert json.loads(json.dumps(found)) == found
    absent = config.model_copy(update={"data": config.data.model_copy(update={"train": "nowhere.json"})})
    text, found = plan_config(absent, 0.001)
    assert "every row is taken for 512 tokens" in text
    assert found["phases"][1]["steps"] is None
    assert "does not fit" in text


def test_a_row_that_does_not_read_is_planned_unpacked(saved: Path, toy_data: Path) -> None:
    config = toy_config(saved, toy_data)
    config = config.model_copy(update={"data": config.data.model_copy(update={"tests": {}})})  # these are checked
    assert "rows are packed" in plan_config(config, 4.0)[0]
    for picture in toy_data.rglob("*.png"):
        picture.write_bytes(b"no picture")
    assert "rows are packed" not in plan_config(config, 4.0)[0]


def test_a_device_that_is_not_here_is_planned_by_its_memory(saved: Path, toy_data: Path) -> None:
    config = toy_config(saved, toy_data).model_copy(update={"device": "cuda"})
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="--memory"):
            plan_config(config, None)
    how = manner_of(config, "cuda")
    assert (how.weight, how.autocast, how.attention) == (2, True, "sdpa")
    assert plan_config(config, 24.0)[1]["device"]["bytes"] == 24 * GIB


def test_the_estimate_is_one_sentence_and_never_fails(saved: Path, toy_data: Path) -> None:
    config = toy_config(saved, toy_data, "training.batch_size=8")
    told = estimate(config, "training", gigabytes=64)
    plan, _ = make_plan(config, 64)
    training = next(phase for phase in plan.phases if phase.name == "training")
    assert f"was {training.memory.total / GIB:.2f} GiB for training on a device of 64.00 GiB" in told
    assert estimate(config.model_copy(update={"model": "nowhere"}), "training") == ""


@pytest.mark.slow
def test_memory_is_within_15_percent_of_what_is_measured(tmp_path: Path, bench: Any) -> None:
    for phase, overrides in (
        ("training", ["training.batch_size=64"]),
        ("training", ["training.batch_size=64", "training.gradient_checkpointing=true"]),
        ("evaluation", ["training.batch_size=64", "evaluation.batch_size=64"]),
    ):
        found = bench.run("embedded", phase, overrides, tmp_path)
        assert found["predicted"] == pytest.approx(found["measured"], rel=0.15), (phase, overrides)
        assert found["flops"] == pytest.approx(found["counted"], rel=0.05), (phase, overrides)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    import bench_plan

    return bench_plan

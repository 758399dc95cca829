"""Training that starts from an adapter: the same function at any larger rank, the best part of it at a smaller one."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from families import FAMILIES
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.cli import app
from hydra_vlm.config import load_config
from hydra_vlm.errors import AdapterError, BudgetError, HydraError, RunFolderError
from hydra_vlm.lora import attach, save_adapter
from hydra_vlm.models.loading import LoadedModel, load_model
from hydra_vlm.resizing import LowRank
from hydra_vlm.schedule import RankSchedule, Scaling
from hydra_vlm.starting import OWN, Start, begin, kept_share, own_schedule, read_start
from hydra_vlm.training.recipe import adapting
from hydra_vlm.trials import prepare_study
from striking import Place, killing
from tiny import toy_config, write_toy_data
from tolerances import assert_same_sums

CONSTANT = Scaling()
LAYERS = "model.language_model.layers"
TOWER = "base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_A.weight"
EMBEDDING = "base_model.model.model.language_model.embed_tokens.lora_embedding_A"
PAIR = f"base_model.model.{LAYERS}.1.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def base(tiny_model: Path) -> LoadedModel:
    return load_model(str(tiny_model), "cpu")


def logits(loaded: LoadedModel, model: nn.Module) -> Tensor:
    image = loaded.model.config.image_token_id
    ids = torch.tensor([[1, *[image] * loaded.processor.image_tokens, 50, 60]])
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, pixel_values=torch.linspace(-1, 1, 3072).view(1, 3, 32, 32)).logits
    return found


@pytest.fixture(scope="module")
def theirs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A LoRA as anybody makes it with PEFT: two kinds of modules in two layers, ranks 3 and 2, and the projector."""
    loaded = load_model(str(tiny_model), "cpu")
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        target_modules=rf"{re.escape(LAYERS)}\.[13]\.self_attn\.[qv]_proj",
        rank_pattern={"layers.1.self_attn.v_proj": 2},
        modules_to_save=["mm_projector"],
    )
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        made: Any = get_peft_model(loaded.model, config)
    torch.manual_seed(1)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "modules_to_save" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    folder = tmp_path_factory.mktemp("theirs") / "adapter"
    made.eval().save_pretrained(str(folder), save_embedding_layers=False)
    return folder, logits(loaded, made)


def uniform(loaded: LoadedModel, rank: int, scaling: Scaling = CONSTANT) -> RankSchedule:
    graph = loaded.parts.graph
    return allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, rank), scaling=scaling))


def started(loaded: LoadedModel, folder: Path, schedule: RankSchedule) -> Tensor:
    """Logits of a model that is about to be trained."""
    settings = load_config(None, [f"training.start_from={folder}"]).training
    with adapting(loaded, schedule, settings, 0) as model:
        return logits(loaded, model.eval())


def test_anybodys_lora_is_the_same_function_at_its_own_ranks_and_at_larger_ones(
    base: LoadedModel, theirs: tuple[Path, Tensor]
) -> None:
    folder, expected = theirs
    bare = logits(base, base.model)
    assert (expected - bare).abs().max() > 0.1
    start = read_start(folder, base.model, base.parts)
    assert start.projector is not None
    own = own_schedule(start, base.parts, 10**6, CONSTANT)
    assert {p.component: r for p, r in zip(own.graph.projections, own.ranks, strict=True) if p.layer == 1 and r} == {
        "q_proj": 3,
        "v_proj": 2,
    }
    assert sum(own.ranks) == 11
    assert own.scaling == Scaling("rslora", 6.0)
    with pytest.raises(BudgetError, match=r"has 624 parameters, the budget is 500: set budget\.parameters=624, or"):
        own_schedule(start, base.parts, 500, CONSTANT)
    for schedule in (own, uniform(base, 3), uniform(base, 5, Scaling("fixed", 7.0))):
        assert kept_share(start, schedule, base.parts) == pytest.approx(1)
        assert_same_sums(started(base, folder, schedule), expected)
    assert torch.equal(logits(base, base.model), bare)  # the base's own weights, where they were


def test_fresh_rows_and_zero_columns_are_what_a_run_without_start_would_have(
    base: LoadedModel, theirs: tuple[Path, Tensor]
) -> None:
    start = read_start(theirs[0], base.model, base.parts)
    schedule = uniform(base, 4)
    settings = load_config(None).training
    name = f"base_model.model.{LAYERS}.1.self_attn.q_proj.lora_%s.default.weight"
    with adapting(base, schedule, settings, 7) as model:
        fresh = model.get_parameter(name % "A").clone()
    with adapting(base, schedule, settings, 7) as model:
        begin(start, model, schedule, base.parts)
        a, b = (model.get_parameter(name % matrix) for matrix in "AB")
        assert torch.equal(a[3:], fresh[3:])
        assert not b[:, 3:].any()
        update = start.updates[f"{LAYERS}.1.self_attn.q_proj"]
        torch.testing.assert_close(schedule.scaling.scale(4) * b @ a, update.delta())


def test_a_smaller_rank_keeps_the_best_part_and_says_how_much(base: LoadedModel, theirs: tuple[Path, Tensor]) -> None:
    start = read_start(theirs[0], base.model, base.parts)
    schedule = uniform(base, 1)
    with adapting(base, schedule, load_config(None).training, 0) as model:
        begin(start, model, schedule, base.parts)
        whole = lost = 0.0
        for name, update in start.updates.items():
            layer = model.get_base_model().get_submodule(name)
            found = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            u, sigma, vt = torch.linalg.svd(update.delta())
            torch.testing.assert_close(found, sigma[0] * torch.outer(u[:, 0], vt[0]), atol=1e-5, rtol=1e-4)
            whole, lost = whole + float(sigma.square().sum()), lost + float(sigma[1:].square().sum())
    assert kept_share(start, schedule, base.parts) == pytest.approx(1 - lost / whole)


def test_our_own_adapter_is_started_from_with_its_projector(
    base: LoadedModel, tiny_model: Path, tmp_path: Path
) -> None:
    loaded, schedule = load_model(str(tiny_model), "cpu"), uniform(base, 2, Scaling("fixed", 8.0))
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "mm_projector" in name:
            parameter.data += 0.1
    save_adapter(model, tmp_path / "adapter", schedule, loaded.parts, projector_state=True)
    start = read_start(tmp_path / "adapter", base.model, base.parts)
    own = own_schedule(start, base.parts, schedule.budget, CONSTANT)
    assert (own.ranks, own.scaling.scale(2)) == (schedule.ranks, 4.0)
    assert_same_sums(started(base, tmp_path / "adapter", own), logits(loaded, model))


def test_the_scales_of_a_balanced_adapter_are_its_own_whatever_the_run_asks_for(base: LoadedModel) -> None:
    names, shapes = base.parts.names(), base.parts.graph.projections
    theirs = Scaling("balanced", 2.0, 4)
    made = {
        name: LowRank(torch.ones(rank, p.in_features), torch.ones(p.out_features, rank), theirs.scale(rank))
        for name, p, rank in zip(names, shapes, itertools.cycle((1, 2, 7)), strict=False)
    }
    start = Start(Path("theirs"), "", made, {n: u.scale * u.rank for n, u in made.items()}, False, None)
    own = own_schedule(start, base.parts, 9 * base.parts.graph.cost, CONSTANT)
    assert (own.scaling.rule, own.scaling.standard_rank) == ("balanced", 9)
    assert [own.scaling.scale(r) for r in own.ranks] == pytest.approx([made[name].scale for name in names])


def test_names_of_transformers_4_are_understood(tmp_path: Path) -> None:
    loaded = load_model(str(FAMILIES["llava"].save(tmp_path / "model")), "cpu")
    schedule = uniform(loaded, 2)
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    save_adapter(model, tmp_path / "adapter", schedule, loaded.parts, projector_state=False)
    fresh = load_model(str(tmp_path / "model"), "cpu")
    expected = read_start(tmp_path / "adapter", fresh.model, fresh.parts)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    old = {k.replace("model.language_model.", "language_model.model."): v for k, v in load_file(weights).items()}
    assert all(".model.language_model.model.layers." in key for key in old)
    save_file(old, weights)
    (tmp_path / "adapter/adapter.json").unlink()  # theirs have none
    found = read_start(tmp_path / "adapter", fresh.model, fresh.parts)
    assert found.updates.keys() == expected.updates.keys() == set(fresh.parts.names())
    assert all(torch.equal(found.updates[name].a, update.a) for name, update in expected.updates.items())


Damage = Callable[[dict[str, Any], dict[str, Tensor]], Any]
NAN = float("nan")
REFUSED: dict[str, tuple[Damage, str]] = {
    "LoHa": (lambda c, _: c.update(peft_type="LOHA"), "is of type LOHA, not LORA"),
    "DoRA": (lambda c, _: c.update(use_dora=True), "has use_dora=True"),
    "PiSSA": (lambda c, _: c.update(init_lora_weights="pissa_niter_4"), "changes the base's own weights"),
    "LoftQ": (lambda c, _: c.update(init_lora_weights="loftq"), "init_lora_weights='loftq'"),
    "bias": (lambda c, _: c.update(bias="lora_only"), "trained biases (bias='lora_only')"),
    "LoRA bias": (lambda c, _: c.update(lora_bias=True), "has lora_bias=True"),
    "experts": (lambda c, _: c.update(target_parameters=["experts.down_proj"]), "has target_parameters="),
    "tokens": (lambda c, _: c.update(trainable_token_indices=[3]), "has trainable_token_indices=[3]"),
    "a new option": (lambda c, _: c.update(next_years_trick={"a": 1}), "has next_years_trick="),
    "expression": (lambda c, _: c.update(alpha_pattern={"(a+)+$": 4}), "expressions are not run"),
    "alpha": (lambda c, _: c.update(lora_alpha=NAN), "is nan, not a number above 0"),
    "alpha of one": (lambda c, _: c.update(alpha_pattern={"q_proj": -1}), "q_proj is -1, not a number above 0"),
    "NaN": (lambda _, t: t[f"{PAIR}A.weight"].fill_(NAN), "q_proj.lora_A.weight holds numbers that are not finite"),
    "integers": (lambda _, t: t.update({f"{PAIR}A.weight": t[f"{PAIR}A.weight"].int()}), "numbers of type torch.int32"),
    "half": (lambda _, t: t.pop(f"{PAIR}B.weight"), "q_proj has lora_A alone"),
    "shape": (
        lambda _, t: t.update({f"{PAIR}A.weight": torch.ones(3, 5)}),
        "A of (3, 5) and B of (32, 3), the model's layer takes 32 and gives 32 features: it was trained on another",
    ),
    "module": (
        lambda _, t: t.update({f"{PAIR}A.weight".replace("q_proj", "qkv"): torch.ones(1, 1)}),
        "adapts model.language_model.layers.1.self_attn.qkv, which this model does not have",
    ),
    "tower": (
        lambda _, t: t.update({TOWER: torch.ones(1, 1)}),
        "fc1, which is not among what this run adapts (adapt: decoder)",
    ),
    "head": (lambda _, t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(1, 1)}), "the output head"),
    "embedding": (
        lambda _, t: t.update({EMBEDDING: torch.ones(1, 1)}),
        "embed_tokens.lora_embedding_A: only LoRA's A and B",
    ),
    "saved whole": (lambda _, t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}), "lm_head.weight: only"),
    "projector": (
        lambda _, t: t.pop(next(key for key in t if "mm_projector" in key)),
        "the projector of the adapter in",
    ),
    "nothing": (lambda _, t: t.clear(), "holds no LoRA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_started_from_is_refused_by_name(
    what: str, base: LoadedModel, theirs: tuple[Path, Tensor], tmp_path: Path
) -> None:
    damage, says = REFUSED[what]
    folder = shutil.copytree(theirs[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    damage(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=re.escape(says)):
        read_start(folder, base.model, base.parts)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("q_proj", 9.0), (f"^{re.escape(LAYERS)}\\.1\\.self_attn\\.q_proj", 9.0), ("j_proj", 6.0), ("^q_proj", 6.0)],
)
def test_alpha_patterns_are_compared_as_names(
    pattern: str, expected: float, base: LoadedModel, theirs: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder = shutil.copytree(theirs[0], tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 9}}))
    start = read_start(folder, base.model, base.parts)
    assert start.alphas[f"{LAYERS}.1.self_attn.q_proj"] == expected
    assert start.alphas[f"{LAYERS}.1.self_attn.v_proj"] == 6.0
    if expected == 9.0:  # no rule has two alphas under rslora, so B carries the scales
        assert own_schedule(start, base.parts, 10**6, CONSTANT).scaling == CONSTANT


def test_a_whole_run_starts_from_it_is_recorded_and_bound_to_it(
    tiny_model: Path, theirs: tuple[Path, Tensor], tmp_path: Path
) -> None:
    toy, folder = write_toy_data(tmp_path / "toy"), shutil.copytree(theirs[0], tmp_path / "adapter")
    options = (f"training.start_from={folder}", "training.steps=2", f"schedules=[{OWN}, coarse]", "profile.steps=3")
    (tmp_path / "config.yaml").write_text(toy_config(tiny_model, toy, *options).to_yaml())

    def tuned(*words: str) -> Any:
        return CliRunner().invoke(
            app, ["compare", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), *words]
        )

    done = tuned()
    assert done.exit_code == 0, done.stderr
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "run/trials").glob("*/record.json"))]
    assert [record["name"] for record in records] == [OWN, "coarse", "zero-shot"]
    assert records[0]["started_from"] == records[1]["started_from"]
    assert records[0]["started_from"] in done.stderr
    assert "started_from" not in records[2]
    assert records[0]["trained"]["lora"] == records[0]["schedule"]["parameters"]
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 6', '"lora_alpha": 7'))
    changed = tuned()
    assert isinstance(changed.exception, RunFolderError)
    assert "is no longer the adapter that this run started from" in str(changed.exception)


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(
    tiny_model: Path, theirs: tuple[Path, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the same machine and threads, and what is trained lies in torch's own memory each time."""
    toy = write_toy_data(tmp_path / "toy")
    option = f"training.start_from={theirs[0]}"
    whole = Place(tiny_model, toy, tmp_path / "whole", monkeypatch)
    expected = whole.train(option)
    cut = Place(tiny_model, toy, tmp_path / "cut", monkeypatch)
    cut.at_step(4, killing(15))
    with pytest.raises(BaseException, match=r"checkpoint|step"):
        cut.train(option)
    monkeypatch.undo()
    found = cut.train(option)
    assert found.train_losses == expected.train_losses
    weights = [load_file(place.trial / "adapter/adapter_model.safetensors") for place in (whole, cut)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tune", f"--schedules=[{OWN}]"], "schedule 'adapter' has the ranks of the adapter in training.start_from"),
        (["tune", "--schedules=[full]", "--training.start_from={theirs}"], "trains the decoder itself"),
        (["pretrain", "--training.start_from={theirs}"], "stage I trains the projector alone"),
        (["train", "--training.start_from={tmp}"], "has no adapter_config.json"),
    ],
)  # fmt: skip
def test_wishes_that_contradict_are_refused_before_training(
    words: list[str], says: str, tiny_model: Path, theirs: tuple[Path, Tensor], toy_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(toy_config(tiny_model, toy_data).to_yaml())
    filled = [word.format(theirs=theirs[0], tmp=tmp_path) for word in words[1:]]
    done = CliRunner().invoke(app, [words[0], str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), *filled])
    assert isinstance(done.exception, HydraError)
    assert says in str(done.exception)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_an_adapter_that_is_not_whole_or_of_another_base_is_refused(
    tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    """By what its own record says, before anything is trained."""
    loaded = load_model(str(tiny_model), "cpu")
    schedule = allocate("uniform", AllocationRequest(loaded.parts.graph, Budget.of_rank(loaded.parts.graph, 2)))
    model = attach(loaded.model, schedule, loaded.parts, seed=0)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    save_adapter(model, whole, schedule, loaded.parts, projector_state=True)
    shutil.copytree(whole, torn)
    (torn / "projector.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"training\.start_from: .*projector\.safetensors"):
        read_start(torn, loaded.model, loaded.parts)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("0.mlp.up_proj.weight"))
    weights[name].view(-1)[3] += 0.1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    asked = toy_config(other, toy_data, f"training.start_from={whole}")
    with pytest.raises(AdapterError, match=r"training\.start_from: .* was trained on another base: other weights in"):
        prepare_study(asked, tmp_path / "run", lambda _: None)
    assert not (tmp_path / "run").exists()
    prepare_study(toy_config(tiny_model, toy_data, f"training.start_from={whole}"), tmp_path / "own", lambda _: None)

import json
import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Phi3Config,
    Phi3ForCausalLM,
)

from hydra_vlm import lora
from hydra_vlm.errors import AdapterError, ConfigError, GraphMismatchError, RunFolderError
from hydra_vlm.graph import ComputationGraph, llama_graph
from hydra_vlm.lora import attach, detach, load_adapter, lora_config, merge, ranks_of, save_adapter
from hydra_vlm.models.audit import adaptation_summary
from hydra_vlm.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from hydra_vlm.models.structure import find_parts
from hydra_vlm.schedule import RankSchedule, Scaling
from tolerances import assert_same_sums

# PEFT asks transformers for an attribute that transformers has renamed; hydra_vlm.lora lets only that kind pass.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

LAYERS = 4
TEXT = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    pad_token_id=0,
)
TOWER = CLIPVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, image_size=16, patch_size=4
)
SCALINGS = (Scaling(), Scaling("fixed", 16.0), Scaling("rslora", 3.0), Scaling("balanced", 2.0, 3))


def llama() -> nn.Module:
    return LlamaForCausalLM(TEXT)


def deep_llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**TEXT.to_dict(), "num_hidden_layers": 12}))


def llava() -> nn.Module:
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=TOWER, text_config=TEXT, image_token_id=5))


def mobilevlm() -> nn.Module:
    config = MobileVLMConfig(vision_config=TOWER.to_dict(), text_config=TEXT.to_dict(), image_token_id=5)
    return MobileVLMForConditionalGeneration(config)


def phi3() -> nn.Module:
    config = {key: TEXT.to_dict()[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "pad_token_id")}
    return Phi3ForCausalLM(Phi3Config(**config, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=3, n_embd=32, n_head=2, n_positions=32))


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


def inputs_for(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 64, (2, 20), generator=generator)
    if find_parts(model).tower is None:
        return {"input_ids": ids}
    images = 4 if isinstance(model, MobileVLMForConditionalGeneration) else 16
    ids[:, 1 : 1 + images] = 5
    return {"input_ids": ids, "pixel_values": torch.rand(2, 3, 16, 16, generator=generator)}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


def uniform(graph: ComputationGraph) -> list[int]:
    return [3] * len(graph.projections)


def coarse(graph: ComputationGraph) -> list[int]:
    return [2 + 3 * (p.layer * 3 // graph.n_layers) for p in graph.projections]


def fine(graph: ComputationGraph) -> list[int]:
    return [1 + p.layer + graph.components.index(p.component) % 4 for p in graph.projections]


def with_zeros(graph: ComputationGraph) -> list[int]:
    return [(7 * i) % 5 for i in range(len(graph.projections))]


def one_module(graph: ComputationGraph) -> list[int]:
    return [4 if (p.layer, p.component) == (1, graph.components[0]) else 0 for p in graph.projections]


def by_layer(graph: ComputationGraph) -> list[int]:
    return [p.layer + 1 for p in graph.projections]


def anything(graph: ComputationGraph) -> list[int]:
    drawn = random.Random(5)
    return [drawn.choice((0, 1, 2, 5, 9, 40)) for _ in graph.projections]


RULES = (uniform, coarse, fine, with_zeros, one_module, by_layer, anything)


def schedule_for(
    graph: ComputationGraph, rule: Callable[..., list[int]], scaling: Scaling = SCALINGS[0]
) -> RankSchedule:
    return RankSchedule(rule.__name__, graph, tuple(rule(graph)), budget=10**9, scaling=scaling)


def train(peft_model: PeftModel) -> None:
    """Stands for training: B is no longer zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in peft_model.named_parameters():
        if ".lora_B." in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)


def trainable_lora(model: nn.Module) -> int:
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".lora_" in n)


def check_round_trip(base: nn.Module, schedule: RankSchedule, folder: Path) -> None:
    """Attach, count, save, load with PEFT alone, merge: exact ranks, exact g(G, Z), equal logits."""
    inputs, parts = inputs_for(base), find_parts(base)
    fresh, untouched = deepcopy(base), logits(base, inputs)
    model = attach(base, schedule, parts, seed=0)
    assert ranks_of(model, parts) == schedule.ranks
    assert trainable_lora(model) == schedule.parameters == schedule.graph.parameters(schedule.ranks)
    assert torch.equal(logits(model, inputs), untouched)
    train(model)
    trained = logits(model, inputs)
    assert (trained - untouched).abs().max() > 1e-4
    save_adapter(model, folder, schedule, parts, projector_state=False)
    plain = PeftModel.from_pretrained(fresh, str(folder))
    assert_same_sums(logits(plain, inputs), trained)
    merged = merge(plain, inputs)
    assert_same_sums(logits(merged, inputs), trained)
    assert torch.equal(logits(detach(model), inputs), untouched)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rule)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_adapter_is_the_schedule(rule: Callable[..., list[int]], scaling: Scaling, tmp_path: Path) -> None:
    base = build(llama)
    check_round_trip(base, schedule_for(find_parts(base).graph, rule, scaling), tmp_path / "adapter")


@pytest.mark.parametrize("rule", [by_layer, with_zeros], ids=lambda rule: rule.__name__)
def test_layer_numbers_that_begin_alike(rule: Callable[..., list[int]], tmp_path: Path) -> None:
    base = build(deep_llama)  # layers 1, 10 and 11
    check_round_trip(base, schedule_for(find_parts(base).graph, rule), tmp_path / "adapter")


@pytest.mark.parametrize("make", [llava, mobilevlm, phi3, gpt2], ids=lambda make: make.__name__)
@pytest.mark.parametrize("rule", [uniform, with_zeros], ids=lambda rule: rule.__name__)
def test_families(make: Callable[[], nn.Module], rule: Callable[..., list[int]], tmp_path: Path) -> None:
    base = build(make)
    check_round_trip(base, schedule_for(find_parts(base).graph, rule), tmp_path / "adapter")


@pytest.mark.parametrize("make", [llava, mobilevlm], ids=lambda make: make.__name__)
def test_tower_with_the_same_names_gets_nothing(make: Callable[[], nn.Module]) -> None:
    base = build(make)
    parts = find_parts(base)
    assert any(
        name.endswith(".layers.1.self_attn.q_proj") for name, _ in base.get_submodule(parts.tower).named_modules()
    )
    model = attach(base, schedule_for(parts.graph, uniform), parts)
    assert not any(isinstance(module, LoraLayer) for module in base.get_submodule(parts.tower).modules())
    assert not any(p.requires_grad for p in base.get_submodule(parts.tower).parameters())
    tower = next(line for line in adaptation_summary(model, parts).splitlines() if line.startswith("vision tower"))
    assert tower.split()[-4:-1] == ["0", "0", "0"]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rule)
def test_scale_of_every_module(scaling: Scaling) -> None:
    base = build(llama)
    parts = find_parts(base)
    schedule = schedule_for(parts.graph, by_layer, scaling)
    attach(base, schedule, parts)
    scales = [base.get_submodule(name).scaling["default"] for name in parts.names()]
    assert scales == pytest.approx([scaling.scale(rank) for rank in schedule.ranks], rel=1e-12)


def test_config_is_small_where_it_can_be() -> None:
    parts = find_parts(build(llama))
    same = lora_config(schedule_for(parts.graph, uniform), parts)
    assert (same.r, same.lora_alpha, same.rank_pattern, same.alpha_pattern) == (3, 6, {}, {})
    mixed = lora_config(schedule_for(parts.graph, with_zeros, Scaling("fixed", 16.0)), parts)
    assert (mixed.r, mixed.lora_alpha, mixed.alpha_pattern) == (4, 16, {})
    assert r"^model\.layers\.0\.self_attn\.k_proj" in mixed.rank_pattern


def test_seeded_noise_is_shared_between_schedules() -> None:
    def noise(rank: int, seed: int) -> Tensor:
        torch.manual_seed(rank)  # torch's own generator must not matter
        base = build(llama)
        graph = find_parts(base).graph
        attach(base, replace(schedule_for(graph, uniform), ranks=(rank,) * len(graph.projections)), seed=seed)
        return base.get_submodule("model.layers.3.mlp.down_proj").lora_A["default"].weight.detach()

    large = noise(7, seed=1)
    assert torch.equal(noise(3, seed=1), large[:3])
    assert not torch.equal(noise(3, seed=2), large[:3])
    bound = 48**-0.5
    assert 0.9 * bound < large.abs().max() <= bound


def test_dropout_follows_the_mode_of_its_module() -> None:
    base = build(llama)
    schedule = schedule_for(find_parts(base).graph, uniform)
    model = attach(base, schedule, dropout=0.5, seed=0)
    train(model)
    inputs = inputs_for(llama())
    assert torch.equal(logits(model, inputs), logits(model, inputs))


def test_generation_goes_through_the_adapter() -> None:
    base = build(mobilevlm)
    inputs = inputs_for(base)
    model = attach(base, schedule_for(find_parts(base).graph, uniform), seed=0)
    train(model)
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokens[:, 20].tolist() == logits(model, inputs)[:, -1].argmax(-1).tolist()


def test_projector_is_saved_beside_the_adapter_and_restored(tmp_path: Path) -> None:
    base = build(mobilevlm)
    parts, inputs = find_parts(base), inputs_for(base)
    fresh = deepcopy(base)
    schedule = schedule_for(parts.graph, coarse)
    model = attach(base, schedule, parts, seed=0)
    train(model)
    for parameter in base.get_submodule(parts.projector).parameters():
        parameter.data += 0.1
    save_adapter(model, tmp_path / "adapter", schedule, parts, projector_state=True)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
    loaded = load_adapter(fresh, tmp_path / "adapter", trainable=True)
    assert trainable_lora(loaded) == schedule.parameters
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), atol=1e-6, rtol=0)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with an adapter of the tiny Llava, projector included."""
    base = build(llava)
    parts = find_parts(base)
    schedule = schedule_for(parts.graph, by_layer)
    save_adapter(attach(base, schedule, parts), tmp_path / "saved", schedule, parts, projector_state=True)
    return tmp_path / "saved"


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_rank(config: dict[str, Any]) -> None:
    config["rank_pattern"] = dict.fromkeys(config["rank_pattern"], 5)


def other_scale(config: dict[str, Any]) -> None:
    config["alpha_pattern"].popitem()


DAMAGE: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no schedule": (lambda f: (f / "schedule.json").unlink(), AdapterError, "has no schedule.json"),
    "no schedule in it": (lambda f: (f / "schedule.json").write_text("{}"), ConfigError, "schedule.json"),
    "truncated": (
        lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:5000]),
        AdapterError,
        "cannot be read",
    ),
    "ranks": (lambda f: rewrite(f / "adapter_config.json", other_rank), AdapterError, "says rank 5"),
    "scale": (lambda f: rewrite(f / "adapter_config.json", other_scale), AdapterError, "scale"),
    "targets": (
        lambda f: rewrite(f / "adapter_config.json", lambda c: c.update(target_modules=["q_proj"])),
        AdapterError,
        "which are no target",
    ),
    "projector": (
        lambda f: (f / "projector.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()),
        AdapterError,
        "does not fit the projector",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_refused_and_the_model_stays_as_it_was(saved: Path, damage: str) -> None:
    harm, error, says = DAMAGE[damage]
    (saved / "adapter.json").unlink()  # which would tell any change
    harm(saved)
    base = build(llava)
    names, before = dict(base.named_modules()), logits(base, inputs_for(base))
    with pytest.raises(error, match=says):
        load_adapter(base, saved)
    assert dict(base.named_modules()) == names
    assert torch.equal(logits(base, inputs_for(base)), before)


def test_adapter_of_another_model_is_refused(saved: Path) -> None:
    smaller = LlamaConfig(**{**TEXT.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(GraphMismatchError, match=r"4 decoder layers where the other has 3 decoder layers"):
        load_adapter(LlamaForCausalLM(smaller), saved)


def test_schedule_of_another_shape_is_refused() -> None:
    schedule = schedule_for(llama_graph("wider", LAYERS, 32, 64, kv_features=16), uniform)
    with pytest.raises(
        GraphMismatchError, match=r"layer 1 with .*gate_proj 32x64.* where the other has .*gate_proj 32x48"
    ):
        attach(build(llama), schedule)


def test_saving_replaces_an_adapter_but_nothing_else(saved: Path) -> None:
    base = build(llama)
    parts = find_parts(base)
    schedule = schedule_for(parts.graph, one_module)
    model = attach(base, schedule, parts)
    (saved.parent / ".saved.new").mkdir()  # left by a run that was killed while saving
    save_adapter(model, saved, schedule, parts, projector_state=False)
    assert not (saved / "projector.safetensors").exists()
    assert lora.read_schedule(saved / "schedule.json") == schedule
    (saved / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match=r"holds thesis\.tex"):
        save_adapter(model, saved, schedule, parts, projector_state=False)
    with pytest.raises(AdapterError, match="no projector"):
        save_adapter(model, saved.with_name("other"), schedule, parts, projector_state=True)
    with pytest.raises(AdapterError, match="is asked for"):
        save_adapter(model, saved.with_name("other"), schedule_for(parts.graph, uniform), parts, projector_state=False)
    assert sorted(path.name for path in saved.parent.iterdir()) == ["saved"]


def test_nothing_to_adapt() -> None:
    base = build(llama)
    with pytest.raises(AdapterError, match="rank 0 everywhere"):
        attach(base, schedule_for(find_parts(base).graph, lambda graph: [0] * len(graph.projections)))


def test_attaching_twice_is_refused_and_detaching_makes_room() -> None:
    base = build(llama)
    first, second = (schedule_for(find_parts(base).graph, rule) for rule in (with_zeros, coarse))
    model = attach(base, first)
    with pytest.raises(AdapterError, match="already"):
        attach(base, second)
    with pytest.raises(AdapterError, match="already"):
        attach(model, second)
    parts = find_parts(detach(model))
    assert ranks_of(attach(base, second), parts) == second.ranks


def complain(message: str, category: type[Warning]) -> Callable[..., PeftModel]:
    build_adapter = lora.get_peft_model

    def get_peft_model(model: nn.Module, config: Any) -> PeftModel:
        warnings.warn(message, category, stacklevel=2)
        return build_adapter(model, config)

    return get_peft_model


def test_a_warning_of_peft_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base = build(llama)
    schedule = schedule_for(find_parts(base).graph, uniform)
    monkeypatch.setattr(lora, "get_peft_model", complain("rank_pattern keys did not match", RuntimeWarning))
    with pytest.raises(AdapterError, match="rank_pattern keys did not match"):
        attach(base, schedule)
    assert all(p.requires_grad for p in base.parameters())
    find_parts(base)  # bare again


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, "not asked for"),
        ({"rank_pattern": {}}, "schedule 'by_layer': .* is built with rank 4, 1 is asked for"),
        ({"alpha_pattern": {}}, "scale 8, 2 is asked for"),
        ({"bias": "all"}, "trainable, but not in the schedule"),
        ({"r": -1}, "PEFT fails with ValueError"),
    ],
)
def test_an_adapter_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], says: str) -> None:
    honest = lora.lora_config

    def dishonest(*args: Any) -> Any:
        config = honest(*args)
        for key, value in change.items():
            setattr(config, key, value)
        return config

    base = build(llava)
    monkeypatch.setattr(lora, "lora_config", dishonest)
    schedule = schedule_for(find_parts(base).graph, by_layer)
    with pytest.raises(AdapterError, match=says):
        attach(base, schedule)
    find_parts(base)


def test_merging_is_checked() -> None:
    base = build(llama)
    inputs = inputs_for(base)
    model = attach(base, schedule_for(find_parts(base).graph, uniform), seed=0)
    train(model)
    with pytest.raises(AdapterError, match="merging changed the logits"):
        merge(model, inputs, tolerance=0.0)


def test_a_merged_adapter_cannot_be_detached() -> None:
    base = build(llama)
    model = attach(base, schedule_for(find_parts(base).graph, uniform))
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into the weights"):
        detach(model)

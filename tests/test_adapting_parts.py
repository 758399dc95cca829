"""The budget reaching the vision tower and the projector: one graph of several parts."""

from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer

from hydra_vlm.allocation import ALLOCATORS, AllocationRequest, Budget, allocate, measured_offsets
from hydra_vlm.compare import compare
from hydra_vlm.errors import ConfigError, GraphMismatchError
from hydra_vlm.files import read_json
from hydra_vlm.graph import ComputationGraph, Projection
from hydra_vlm.lora import attach, load_adapter, ranks_of, save_adapter
from hydra_vlm.models.loading import load_model
from hydra_vlm.models.structure import find_parts
from hydra_vlm.profile import GradientNormProfile, stages_of
from hydra_vlm.records import TrialRecord
from hydra_vlm.schedule import RankSchedule
from tiny import save_tiny_model, toy_config, write_toy_data

DECODER = [Projection(layer, c, 16, 16) for layer in range(4) for c in ("q_proj", "up_proj")]
TOWER = [Projection(layer, f"tower.{c}", 8, 8) for layer in range(4, 7) for c in ("q_proj", "fc1")]
GRAPH = ComputationGraph("two", (*DECODER, *TOWER), (("decoder", 4), ("tower", 3)))


def profile(layer_norms: list[float], graph: ComputationGraph = GRAPH) -> GradientNormProfile:
    mean = tuple((layer_norms[p.layer], layer_norms[p.layer]) for p in graph.projections)
    return GradientNormProfile(graph, mean, mean, steps=1, skipped=0)


def test_layers_count_through_the_parts_and_know_their_place() -> None:
    assert GRAPH.part_layers == {"decoder": range(4), "tower": range(4, 7)}
    assert [GRAPH.label(i) for i in (0, 3, 4, 6)] == ["1", "4", "tower 1", "tower 3"]
    assert [GRAPH.depth(i) for i in (0, 3, 4, 6)] == [0, 1, 0, 1]
    assert ComputationGraph.from_json(GRAPH.to_json()) == GRAPH
    with pytest.raises(ConfigError, match="do not add up to 7 layers"):
        ComputationGraph("wrong", GRAPH.projections, (("decoder", 4), ("tower", 4)))


def test_a_graph_with_and_without_the_tower_differ() -> None:
    alone = ComputationGraph("one", tuple(DECODER))
    assert GRAPH.difference(alone) == "4 decoder layers and 3 tower layers where the other has 4 decoder layers"
    assert GRAPH.difference(GRAPH) is None
    with pytest.raises(GraphMismatchError, match="3 tower layers"):
        AllocationRequest(alone, Budget.of_rank(alone, 4), profile([1.0] * 7))


def test_stages_are_made_part_by_part_and_joined() -> None:
    # The tower's norms are a hundred times smaller: on one scale all of it would be in the lowest stage.
    measured = profile([1.0, 5.0, 1.1, 5.1, 0.01, 0.05, 0.011])
    assert stages_of(measured, 2) == ((0, 2, 4, 6), (1, 3, 5))
    # Three distinct norms in the tower: it has no fourth stage.
    assert stages_of(profile([1.0, 2.0, 3.0, 4.0, 0.1, 0.2, 0.3]), 4) == ((0, 4), (1, 5), (2, 6), (3,))


def test_offsets_compare_components_within_their_part() -> None:
    values = {"q_proj": 1.0, "up_proj": 3.0, "tower.q_proj": 0.03, "tower.fc1": 0.01}
    mean = tuple((values[p.component],) * 2 for p in GRAPH.projections)
    measured = GradientNormProfile(GRAPH, mean, mean, steps=1, skipped=0)
    assert measured_offsets(measured, 2) == {"q_proj": -2, "up_proj": 2, "tower.q_proj": 2, "tower.fc1": -2}


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("rule", ["paper", "profile"])
def test_every_allocator_spends_one_budget_on_all_parts(rank: int, rule: str) -> None:
    measured = profile([1.0, 5.0, 1.1, 5.1, 0.01, 0.05, 0.011])
    request = AllocationRequest(GRAPH, Budget.of_rank(GRAPH, rank), measured, n_stages=2, delta=1, rule=rule)  # type: ignore[arg-type]
    for name in ALLOCATORS:
        made = allocate(name, request)
        assert made.parameters <= made.budget
        assert min(made.ranks) >= 1
        assert RankSchedule.from_json(made.to_json()) == made
    coarse = allocate("coarse", request)
    of_layer = [coarse.rank(p.layer, p.component) for p in GRAPH.projections if p.component.endswith("q_proj")]
    assert of_layer[1] - of_layer[0] >= 1
    assert of_layer[5] - of_layer[4] >= 1
    assert of_layer[0] == of_layer[4]
    assert of_layer[1] == of_layer[5]


def test_the_adapter_reaches_what_was_asked_and_nothing_else(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    adapt = ("decoder", "tower", "projector")
    parts = find_parts(load_model(str(folder), "cpu").model, adapt=adapt)
    assert dict(parts.graph.parts) == {"decoder": 4, "tower": 2, "projector": 1}
    assert parts.modules[4, "tower.q_proj"] == "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert {c for c in parts.graph.components if c.startswith("projector")} == {
        "projector.mlp.mlp.0",
        "projector.mlp.mlp.2",
    }
    ranks = tuple(1 + i % 3 for i in range(len(parts.graph.projections)))
    schedule = RankSchedule("mixed", parts.graph, ranks, parts.graph.parameters(ranks))
    model = attach(load_model(str(folder), "cpu").model, schedule, seed=0)
    assert ranks_of(model, parts) == ranks
    adapted = {n for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    assert adapted == set(parts.names())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.1)
    save_adapter(model, tmp_path / "adapter", schedule, parts, projector_state=False)
    inputs = {
        "input_ids": torch.tensor([[1, *[3] * 4, 9, 10]]),
        "pixel_values": torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
    }
    expected = model.eval()(**inputs).logits
    again = load_adapter(load_model(str(folder), "cpu").model, tmp_path / "adapter").eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    assert (expected - load_model(str(folder), "cpu").model(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("family", "layers"), [("Llava", 23), ("SmolVLM", 12), ("Qwen2_5_VL", 32), ("PaliGemma", 27), ("InternVL", 24)]
)
def test_towers_of_transformers_models_are_adaptable(family: str, layers: int) -> None:
    model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    with torch.device("meta"):
        model = model_class(model_class.config_class())
    parts = find_parts(model, adapt=("decoder", "tower"))
    # LLaVA reads the tower's last but one hidden state: its last block never runs and would get no gradient.
    assert dict(parts.graph.parts)["tower"] == layers
    inside = [name for (layer, _), name in parts.modules.items() if layer in parts.graph.part_layers["tower"]]
    assert all(name.startswith(f"{parts.tower}.") for name in inside)
    assert parts.projector is None or not any(name.startswith(f"{parts.projector}.") for name in inside)


def test_a_part_that_is_not_there_or_not_known_is_named() -> None:
    text = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(text)
    with pytest.raises(ConfigError, match=r"adapt names the tower, but LlamaForCausalLM has none"):
        find_parts(model, adapt=("decoder", "tower"))
    with pytest.raises(ConfigError, match=r"adapt names head: choose from decoder, tower, projector"):
        find_parts(model, adapt=("decoder", "head"))


def test_a_whole_run_reaches_the_tower(tmp_path: Path) -> None:
    model, data = save_tiny_model(tmp_path / "model"), write_toy_data(tmp_path / "data")
    config = toy_config(model, data, "adapt=decoder,tower", "schedules=[fine, full]", "training.steps=2")
    before = load_model(str(model), "cpu").model.state_dict()
    run = compare(config, tmp_path / "run")
    profile = GradientNormProfile.from_json(read_json(run.profile))
    assert dict(profile.graph.parts) == {"decoder": 4, "tower": 2}
    assert min(profile.layer_norms()) > 0
    record = TrialRecord.from_json(read_json(run.trial("fine-seed0") / "record.json"))
    assert record.schedule is not None
    assert record.trained["lora"] == record.schedule.parameters <= record.schedule.budget
    assert record.trained["projector"] > 0
    adapted = load_adapter(load_model(str(model), "cpu").model, run.trial("fine-seed0") / "adapter")
    learned = {name for name, p in adapted.named_parameters() if ".lora_B." in name and p.abs().max() > 0}
    assert any(".vision_tower." in name for name in learned)
    after = adapted.get_base_model().state_dict()
    same = [key for key in before if ".vision_tower." in key and key in after]
    assert same
    assert all(torch.equal(before[key], after[key]) for key in same)


def test_a_projector_under_lora_is_not_trained_whole(tmp_path: Path) -> None:
    model, data = save_tiny_model(tmp_path / "model"), write_toy_data(tmp_path / "data")
    config = toy_config(model, data, "adapt=decoder,projector", "schedules=[uniform]", "training.steps=2")
    run = compare(config, tmp_path / "run")
    record = TrialRecord.from_json(read_json(run.trial("uniform-seed0") / "record.json"))
    assert record.schedule is not None
    assert record.trained == {"lora": record.schedule.parameters, "projector": 0}
    assert not (run.trial("uniform-seed0") / "adapter" / "projector.safetensors").exists()

"""Mixtures of experts: linears are adapted, fused experts and routers named as not adapted, never silently."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel
from torch import Tensor, nn
from typer.testing import CliRunner

from families import MIXTURE
from hydra_vlm.allocation import AllocationRequest, Budget, allocate
from hydra_vlm.cli import app
from hydra_vlm.export.run import export
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.lora import attach, detach, load_adapter, merge, ranks_of, save_adapter
from hydra_vlm.models.audit import adaptation_summary
from hydra_vlm.models.structure import find_parts
from hydra_vlm.schedule import RankSchedule
from tiny import toy_config, write_toy_data

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEW = {"num_experts_per_tok": 2}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
STACK = "mlp.experts.gate_up_proj, mlp.experts.down_proj"


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**BASE, **FEW, num_local_experts=4))


def olmoe() -> nn.Module:
    return hf.OlmoeForCausalLM(hf.OlmoeConfig(**BASE, **FEW, num_experts=4))


def qwen3() -> nn.Module:
    """Its first layer is dense, and PEFT takes the names of the linears there for those of experts."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8, "mlp_only_layers": [0]}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**BASE, **FEW, **sizes))


def qwen2() -> nn.Module:
    """With a shared expert of three linears, which is weighed by another."""
    sizes = {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40}
    return hf.Qwen2MoeForCausalLM(hf.Qwen2MoeConfig(**BASE, **FEW, **sizes, decoder_sparse_step=1))


def phi() -> nn.Module:
    """Its router is a linear that answers with two tensors."""
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**BASE, **FEW, num_local_experts=4))


KINDS = {
    "mixtral": (mixtral, ATTENTION, (STACK, "mlp.gate")),
    "olmoe": (olmoe, ATTENTION, (STACK, "mlp.gate")),
    "qwen3": (qwen3, ATTENTION, (STACK, "mlp.gate", "mlp.gate_proj, mlp.up_proj, mlp.down_proj")),
    "qwen2": (qwen2, (*ATTENTION, *FEED_FORWARD), (STACK, "mlp.gate, mlp.shared_expert_gate")),
    "phi": (phi, ATTENTION, (STACK, "mlp.router")),
}
IDS = torch.tensor([[1, 5, 6, 7, 8]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def uneven(graph: ComputationGraph) -> RankSchedule:
    """Ranks 0 to 2; the first layer's q_proj is not adapted, the others' are."""
    ranks = tuple(i % 3 for i in range(len(graph.projections)))
    return RankSchedule("uneven", graph, ranks, graph.parameters(ranks))


@pytest.mark.parametrize("kind", KINDS)
def test_linears_are_adapted_and_the_rest_is_named(kind: str, tmp_path: Path) -> None:
    build, components, named = KINDS[kind]
    torch.manual_seed(0)
    model = build().requires_grad_(False)
    parts, before = find_parts(model), logits(model)
    assert parts.graph.components == components
    assert [note.split(": ")[1].split(" of ")[0].split(", 4,")[0] for note in parts.graph.notes] == list(named)
    schedule = uneven(parts.graph)
    adapted = attach(model, schedule, parts, seed=0)
    assert ranks_of(adapted, parts) == schedule.ranks
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == schedule.parameters
    assert not any(word in name for name in trained for word in ("experts", ".gate.", "router"))
    for name, parameter in trained.items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    after = logits(adapted)
    assert (after - before).abs().max() > 1e-2
    for text in (adaptation_summary(adapted, parts), schedule.table()):
        assert text.splitlines()[-len(named) :] == list(parts.graph.notes)
    save_adapter(adapted, tmp_path / "adapter", schedule, parts, projector_state=False)
    assert torch.equal(logits(detach(adapted)), before)  # the same weights in the same memory
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        plain = PeftModel.from_pretrained(model, tmp_path / "adapter")  # as anybody would
    assert torch.equal(logits(plain), after)  # stored float32 is read back as it was, into torch's own memory
    detach(plain)
    merge(load_adapter(model, tmp_path / "adapter", parts), {"input_ids": IDS})


def test_every_weight_matrix_of_the_layers_is_adapted_or_named() -> None:
    for build, _, _ in KINDS.values():
        with torch.device("meta"):
            parts = find_parts(model := build())
        matrices = {n for n, p in model.model.layers.named_parameters() if p.dim() > 1 and "bias" not in n}
        left = {n for n in matrices if f"{parts.layers}.{n.removesuffix('.weight')}" not in parts.names()}
        said = {name for note in parts.graph.notes for name in note.split(": ")[1].split(" (")[0].split(", ")}
        said = {name.split(" of ")[0] for name in said}
        assert {n.split(".", 1)[1].removesuffix(".weight") for n in left} <= said


def test_notes_go_with_the_graph_and_tell_none_apart() -> None:
    with torch.device("meta"):
        graph = find_parts(mixtral()).graph
    again = ComputationGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.notes == graph.notes
    assert len(graph.notes) == 2
    assert replace(graph, notes=()) == graph
    assert graph.difference(replace(graph, notes=())) is None
    made = allocate("uniform", AllocationRequest(graph, Budget.of_rank(graph, 2)))
    assert RankSchedule.from_json(made.to_json()).graph.notes == graph.notes


def test_experts_that_are_linears_are_adapted_and_their_router_is_not() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.router = nn.Linear(4, 4), nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.ModuleDict({"w1": nn.Linear(4, 8)}) for _ in range(3))

    model = nn.Module()
    model.layers = nn.ModuleList(Layer() for _ in range(2))
    graph = find_parts(model).graph
    assert graph.components == ("attention", "experts.0.w1", "experts.1.w1", "experts.2.w1")
    assert [note.split(" (")[0] for note in graph.notes] == ["not adapted: router of 2 layers, 24 parameters"]


def test_a_vision_language_mixture_is_trained_and_says_what_is_left_out(tmp_path: Path) -> None:
    model, data = MIXTURE.save(tmp_path / "model"), write_toy_data(tmp_path / "toy")
    config = toy_config(model, data, "training.steps=2", "profile.steps=3", "schedules=[fine]")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    words = [str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, ["compare", *words], catch_exceptions=False)
    assert done.exit_code == 0
    notes = json.loads((tmp_path / "run/graph.json").read_text())["notes"]
    assert [note.split(" of ")[0] for note in notes] == [f"not adapted: {STACK}", "not adapted: mlp.gate"]
    assert all(done.stderr.count(note) >= 2 for note in notes)  # at the start, and in the audit
    planned = CliRunner().invoke(app, ["plan", words[0]], catch_exceptions=False)
    assert all(note in planned.stdout for note in notes)
    adapter = tmp_path / "run/trials/fine-seed0/adapter"
    merged = export(str(model), adapter, tmp_path / "merged", "merged")
    assert merged.outcome.seen is not None

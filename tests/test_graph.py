"""The computation graph: shapes, g(G, Z), presets, JSON."""

import json
import subprocess
import sys

import pytest

from hydra_vlm.errors import ConfigError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph, preset

FUSED = ComputationGraph(
    "fused",
    (
        Projection(1, "down_proj", 24, 8),
        Projection(0, "qkv_proj", 8, 24),
        Projection(0, "o_proj", 8, 8),
        Projection(1, "qkv_proj", 8, 16),
    ),
)


def test_budget_of_the_paper() -> None:
    graph = preset("mobilellama-1.4b")
    assert graph.layer_cost(0) == 39_424
    assert graph.parameters([128] * len(graph.projections)) == 128 * graph.cost == 121_110_528
    larger = preset("mobilellama-2.7b")
    assert (larger.n_layers, larger.layer(31)[-1]) == (32, Projection(31, "down_proj", 6912, 2560))


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'mobilellama-2\.7b'"):
        preset("mobilelama2.7b")


def test_grouped_query_attention_narrows_k_and_v_only() -> None:
    graph = llama_graph("gqa", 1, hidden=576, feed_forward=1536, kv_features=192)
    costs = {p.component: p.cost for p in graph.projections}
    assert costs["k_proj"] == costs["v_proj"] == 768
    assert costs["q_proj"] == costs["o_proj"] == 1152


def test_layers_may_differ_and_order_does_not_matter() -> None:
    assert FUSED.components == ("qkv_proj", "o_proj", "down_proj")
    assert [p.component for p in FUSED.layer(1)] == ["qkv_proj", "down_proj"]
    assert FUSED.layer_costs == (48, 56)
    assert FUSED.index(1, "down_proj") == 3
    assert ComputationGraph("fused", FUSED.projections) == FUSED
    with pytest.raises(KeyError):
        FUSED.index(0, "down_proj")


@pytest.mark.parametrize("graph", [FUSED, preset("mobilellama-1.4b")], ids=lambda graph: graph.name)
def test_json_round_trip_survives_sorted_keys(graph: ComputationGraph) -> None:
    assert ComputationGraph.from_json(json.loads(json.dumps(graph.to_json(), sort_keys=True))) == graph


def test_fingerprint_depends_on_shapes_only() -> None:
    a, b = llama_graph("a", 2, 8, 24), llama_graph("b", 2, 8, 24)
    assert a.fingerprint() == b.fingerprint() != llama_graph("a", 2, 8, 32).fingerprint()
    assert a.fingerprint() in repr(a)


@pytest.mark.parametrize(
    ("projections", "message"),
    [
        ((), "no projections"),
        ((Projection(1, "q_proj", 8, 8),), "layer 1 has none"),
        ((Projection(-1, "q_proj", 8, 8), Projection(0, "q_proj", 8, 8)), "negative"),
        ((Projection(0, "q_proj", 8, 8), Projection(0, "q_proj", 8, 9)), "twice"),
        ((Projection(0, "q_proj", 8, 0),), "layer 1, q_proj: sizes must be positive"),
    ],
)
def test_bad_graphs(projections: tuple[Projection, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ComputationGraph("bad", projections)


@pytest.mark.parametrize("data", [{}, {"name": "x", "components": ["a"], "layers": [{"b": [1, 2]}]}, {"layers": 3}])
def test_bad_json(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="not a computation graph"):
        ComputationGraph.from_json(data)


def test_the_pure_middle_loads_no_heavy_library() -> None:
    code = (
        "import sys, hydra_vlm.allocation as a, hydra_vlm.profile as p; "
        "p.partition_into_stages([1, 2, 3], 2); "
        "print(sorted({'torch', 'sklearn', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

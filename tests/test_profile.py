"""The gradient-norm profile, its two views, and exact one-dimensional K-means."""

import json
from itertools import product
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_vlm.errors import ConfigError, GraphMismatchError, StageError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph
from hydra_vlm.profile import GradientNormProfile, partition_into_stages, require_same_graph
from hydra_vlm.schedule import check_stages

GRAPH = ComputationGraph(
    "uneven",
    (Projection(0, "q_proj", 8, 8), Projection(0, "up_proj", 8, 24), Projection(1, "up_proj", 8, 24)),
)
PROFILE = GradientNormProfile(GRAPH, ((1.0, 3.0), (2.0, 6.0), (8.0, 10.0)), ((0.1, 0.3), (0.2, 0.6), (1.0, 2.0)), 5, 2)


def test_layer_curve_and_component_table_are_means_over_tensors() -> None:
    assert PROFILE.norms == (2.0, 4.0, 9.0)
    assert PROFILE.layer_norms() == (3.0, 9.0)
    assert PROFILE.component_norms() == {"q_proj": 2.0, "up_proj": 6.5}
    assert PROFILE.layer_spread() == pytest.approx((0.3, 1.5))


def test_json_round_trip() -> None:
    assert GradientNormProfile.from_json(json.loads(json.dumps(PROFILE.to_json(), sort_keys=True))) == PROFILE
    assert "5 steps after 2 skipped" in repr(PROFILE)
    with pytest.raises(ConfigError, match="not a gradient-norm profile"):
        GradientNormProfile.from_json({"graph": GRAPH.to_json(), "mean": []})


def test_bad_profiles() -> None:
    zeros = ((0.0, 0.0),) * 3
    with pytest.raises(ConfigError, match="at least one kept step"):
        GradientNormProfile(GRAPH, zeros, zeros, 0, 2)
    with pytest.raises(ConfigError, match="layer 2, up_proj"):
        GradientNormProfile(GRAPH, ((0.0, 0.0), (0.0, 0.0), (1.0, float("nan"))), zeros, 1, 0)
    with pytest.raises(GraphMismatchError, match="2 entries"):
        GradientNormProfile(GRAPH, zeros[:2], zeros, 1, 0)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (llama_graph("longer", 3, 8, 24), "it has 2 decoder layers where the other has 3 decoder layers"),
        (llama_graph("other", 2, 8, 24), "components q_proj, up_proj where the other has q_proj, k_proj"),
        (
            ComputationGraph("wider", (*GRAPH.projections[:2], Projection(1, "up_proj", 8, 32))),
            "layer 2 with up_proj 8x24 where the other has up_proj 8x32",
        ),
    ],
)
def test_a_profile_of_another_model_is_told_apart(other: ComputationGraph, difference: str) -> None:
    with pytest.raises(GraphMismatchError, match=difference):
        require_same_graph(PROFILE, other)


def test_the_name_of_the_graph_does_not_count() -> None:
    require_same_graph(PROFILE, ComputationGraph("renamed", GRAPH.projections))


def test_stages_need_not_be_contiguous_and_ascend() -> None:
    assert partition_into_stages([0.9, 0.1, 0.5, 0.11, 0.52, 0.95], 3) == ((1, 3), (2, 4), (0, 5))


def test_equal_layers_share_a_stage() -> None:
    assert partition_into_stages([1.0, 1.0, 1.0, 2.0], 2) == ((0, 1, 2), (3,))


@pytest.mark.parametrize(("n_stages", "possible"), [(0, 1), (3, 2), (9, 2)])
def test_too_many_or_too_few_stages(n_stages: int, possible: int) -> None:
    with pytest.raises(StageError, match=f"Set n_stages to {possible}") as caught:
        partition_into_stages([1.0, 2.0, 2.0], n_stages)
    assert caught.value.n_stages == possible


def sum_of_squares(values: list[float], labels: tuple[int, ...]) -> float:
    clusters = [[v for v, label in zip(values, labels, strict=True) if label == i] for i in set(labels)]
    return sum((v - fmean(cluster)) ** 2 for cluster in clusters for v in cluster)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 3), st.sampled_from([1e-6, 1.0, 1e4]))
def test_stages_are_the_optimum_of_all_partitions(steps: list[int], n_stages: int, unit: float) -> None:
    norms = [step * unit for step in steps]
    n_stages = min(n_stages, len(set(norms)))
    stages = partition_into_stages(norms, n_stages)
    check_stages(stages, len(norms))
    centroids = [fmean(norms[layer] for layer in stage) for stage in stages]
    assert len(stages) == n_stages
    assert centroids == sorted(centroids)
    labels = tuple(next(i for i, stage in enumerate(stages) if layer in stage) for layer in range(len(norms)))
    every = (found for found in product(range(n_stages), repeat=len(norms)) if len(set(found)) == n_stages)
    best = min(sum_of_squares(norms, found) for found in every)
    assert sum_of_squares(norms, labels) <= best + 1e-9 * unit**2

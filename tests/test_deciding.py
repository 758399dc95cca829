"""Who decides the ranks at which a wider adapter ends: budgets, limits, and what each rule follows."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hydra_vlm.allocation import AllocationRequest, Budget
from hydra_vlm.errors import ConfigError
from hydra_vlm.graph import ComputationGraph, Projection
from hydra_vlm.moving.deciding import DECIDERS, Decision, Evidence, spectral
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule

SHAPES = {"q_proj": (16, 16), "up_proj": (16, 40), "down_proj": (40, 16)}
GRAPH = ComputationGraph("four", tuple(Projection(i, c, *SHAPES[c]) for i in range(4) for c in SHAPES))


def profile(draw: random.Random) -> GradientNormProfile:
    mean = tuple((draw.uniform(0.1, 2), draw.uniform(0.1, 2)) for _ in GRAPH.projections)
    return GradientNormProfile(GRAPH, mean, mean, steps=3, skipped=1)


def evidence(seed: int, rank: int = 4, width: int = 2, probes: int = 8) -> Evidence:
    draw = random.Random(seed)
    request = AllocationRequest(GRAPH, Budget.of_rank(GRAPH, rank), profile(draw), n_stages=2, delta=1)
    values = ([draw.expovariate(1) for _ in range(width * rank)] for _ in GRAPH.projections)
    return Evidence(request, tuple(tuple(sorted(found, reverse=True)) for found in values), seed, probes)


def kept(found: Evidence, ranks: Sequence[int]) -> float:
    return sum(value**2 for values, rank in zip(found.spectra, ranks, strict=True) for value in values[:rank])


def never(schedule: RankSchedule) -> float:
    raise AssertionError("this rule probes nothing")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 6), st.integers(2, 3), st.sampled_from(["uniform", "spectral", "hydra"]))
def test_every_rule_keeps_the_budget_and_the_ranks_that_there_are(seed: int, rank: int, width: int, name: str) -> None:
    found = evidence(seed, rank, width)
    schedule = DECIDERS[name](found, never).schedule
    assert schedule.parameters <= found.request.budget.parameters
    assert schedule.unspent < max(GRAPH.costs)
    assert all(1 <= r <= most for r, most in zip(schedule.ranks, found.widest, strict=True))


@pytest.mark.parametrize("name", ["uniform", "spectral", "phi"])
def test_what_is_narrow_stays_so_and_where_there_is_no_rank_there_stays_none(name: str) -> None:
    spectra = tuple(tuple(float(8 - i) for i in range(2 * p.layer)) for p in GRAPH.projections)  # 0, 2, 4, 6
    request = AllocationRequest(GRAPH, Budget.of_rank(GRAPH, 2))
    schedule = DECIDERS[name](Evidence(request, spectra, probes=7), lambda found: -sum(found.ranks)).schedule
    assert all(min(1, len(v)) <= r <= len(v) for r, v in zip(schedule.ranks, spectra, strict=True))
    assert schedule.unspent >= 0
    if name == "uniform":
        assert {(p.layer, r) for r, p in zip(schedule.ranks, GRAPH.projections, strict=True)} == {
            *((0, 0), (1, 2), (2, 3), (3, 3))
        }


def test_spectral_keeps_more_of_the_update_than_uniform_does() -> None:
    for seed in range(10):
        found = evidence(seed)
        assert kept(found, spectral(found, never).schedule.ranks) > kept(found, [4] * len(GRAPH.projections))


def test_spectral_takes_the_largest_square_per_parameter() -> None:
    flat = tuple((9.0, 0.9, 0.8, 0.7) if i == 3 else (9.0, 0.1, 0.1, 0.1) for i in range(len(GRAPH.projections)))
    budget = Budget.of_parameters(GRAPH, GRAPH.cost + 2 * GRAPH.costs[3])
    ranks = spectral(Evidence(AllocationRequest(GRAPH, budget), flat), never).schedule.ranks
    assert ranks == tuple(3 if i == 3 else 1 for i in range(len(GRAPH.projections)))


def decided(found: Evidence) -> Decision:
    """Φ on a ground where rank in the last layer alone is worth something."""

    def probe(schedule: RankSchedule) -> float:
        return 2.0 - sum(r for r, p in zip(schedule.ranks, GRAPH.projections, strict=True) if p.layer == 3) / 100

    return DECIDERS["phi"](found, probe)


def test_phi_probes_as_often_as_asked_and_takes_the_best() -> None:
    found = evidence(1, probes=14)
    decision = decided(found)
    assert len(decision.probed) == 14
    assert min(loss for _, loss in decision.probed) == dict(decision.probed)[decision.schedule.ranks]
    assert decision.schedule.parameters <= found.request.budget.parameters
    first = [loss for _, loss in decision.probed[:3]]  # uniform, spectral, HyDRA's
    assert min(loss for _, loss in decision.probed) < min(first)


def test_phi_is_the_same_every_time() -> None:
    assert decided(evidence(2, probes=10)) == decided(evidence(2, probes=10))


@pytest.mark.parametrize(
    ("spectra", "words"), [(((1.0,),), "one each is needed"), (((1.0, 2.0),) * 12, "largest to the smallest")]
)
def test_spectra_that_are_none_are_refused(spectra: tuple[tuple[float, ...], ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Evidence(AllocationRequest(GRAPH, Budget.of_rank(GRAPH, 2)), spectra)

"""The samplers: whatever they propose is feasible, new and inside of the space, and Φ finds better schedules."""

import math
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState, create_trial

from hydra_vlm.allocation import Budget
from hydra_vlm.errors import ConfigError, GraphMismatchError
from hydra_vlm.graph import ComputationGraph
from hydra_vlm.search.acquisition import Goal, log_improvement
from hydra_vlm.search.journal import open_journal
from hydra_vlm.search.membership import adopt, contains, distance
from hydra_vlm.search.objective import Objective
from hydra_vlm.search.phi import Observation, PhiSettings, choose, propose, starters, unseen
from hydra_vlm.search.proposals import listed, sample, scatter
from hydra_vlm.search.samplers import SAMPLERS, distributions, schedule_sampler, within
from hydra_vlm.search.space import Candidate, Space
from hydra_vlm.search.study import candidate_of
from test_space import EMBEDDED, GROUPED, LLAMA, TUNING, space_of, tiny_graph

NAMES = ("gqa", "pope", "mme")
QUICK = PhiSettings("ridge", targets="objective", pool=8, rounds=1, steps=1)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


def worth(found: Candidate) -> float:
    """A smooth function of a schedule, highest where late layers and the last components get most."""
    schedule, graph = found.schedule, found.schedule.graph
    places = {component: i for i, component in enumerate(graph.components)}
    weights = [(0.3 + graph.depth(p.layer)) * (1 + places[p.component]) for p in graph.projections]
    gains = [math.log2(1 + rank * graph.cost / schedule.budget) for rank in schedule.ranks]
    rate = 0.0 if found.learning_rate is None else math.log(found.learning_rate / TUNING.middle[0])
    return 10 * sum(w * g for w, g in zip(weights, gains, strict=True)) / sum(weights) - rate**2


def scores(found: Candidate, noise: float = 0.0, draw: random.Random | None = None) -> dict[str, float]:
    jitter = [draw.gauss(0.0, noise) if draw else 0.0 for _ in NAMES]
    return {name: 40.0 + (1 + i / 4) * worth(found) + jitter[i] for i, name in enumerate(NAMES)}


def observed(candidates: list[Candidate]) -> list[Observation]:
    return [Observation(one, scores(one), 3.0 - worth(one) / 10) for one in candidates]


def ask(study: optuna.Study, space: Space) -> tuple[optuna.Trial, Candidate]:
    trial = study.ask(distributions(space))
    found = candidate_of(study._storage.get_trial(trial._trial_id))
    assert found is not None
    assert trial.params == within(distributions(space), found.values)
    return trial, found


def tell(study: optuna.Study, trial: optuna.Trial, found: Candidate, objective: Objective, base: Candidate) -> None:
    trial.set_user_attr("loss", 3.0 - worth(found) / 10)
    trial.set_user_attr("scores", scores(found))
    study.tell(trial, objective.values(scores(found), scores(base), 3.0 - worth(found) / 10))


def new_study(
    name: str, space: Space, objective: Objective, settings: PhiSettings = QUICK, seed: int = 0, **at: object
):
    sampler = schedule_sampler(name, space, seed, objective, settings)
    return optuna.create_study(directions=["maximize"] * objective.n_values, sampler=sampler, **at)  # type: ignore[arg-type]


# Many calls of each sampler

GRAPHS = ((EMBEDDED, 4), (GROUPED, 32), (LLAMA, 128))
COMPLETE = 12


def check_proposals(name: str, space: Space, calls: int) -> None:
    """All proposals of a study of so many calls are feasible, inside of the space, and no other trial's."""
    # Optuna's own models are slow with many trials: they take over from chance for the last calls only.
    complete = range(calls - 9, calls) if name == "gp" else range(COMPLETE)
    settings = replace(QUICK, n_startup=max(8, calls - 20) if name == "tpe" else 8)
    study = new_study(name, space, Objective(), settings)
    keys, first = set(), None
    for i in range(calls):
        trial, found = ask(study, space)
        first = first or found
        assert found.schedule.parameters <= space.budget.parameters
        assert found.key not in keys
        assert contains(space, found.schedule)
        keys.add(found.key)
        if i in complete:
            tell(study, trial, found, Objective(), first)
        else:  # what a pruned trial leaves, without the parameters that would slow the others down
            study.tell(trial, state=TrialState.FAIL)
            kept = {"candidate": found.to_json(), **({"baseline": True, "scores": scores(found)} if i == 0 else {})}
            study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs=kept))
    assert len(keys) == calls


@pytest.mark.parametrize("name", SAMPLERS)
def test_proposals_are_feasible_new_and_inside(name: str) -> None:
    check_proposals(name, space_of(EMBEDDED, 4), 16)
    if name != "gp":  # which takes seconds where every rank is free
        check_proposals(name, space_of(GROUPED, 32), 16)
        check_proposals(name, space_of(EMBEDDED, 4, open=True, tuned=TUNING), 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("graph", "rank"), GRAPHS, ids=lambda p: getattr(p, "name", ""))
def test_a_thousand_proposals_on_three_graphs(name: str, graph: ComputationGraph, rank: int) -> None:
    check_proposals(name, space_of(graph, rank), 167)
    if name != "gp" or graph is not LLAMA:  # with 168 free ranks a Gaussian process takes minutes a proposal
        check_proposals(name, space_of(graph, rank, open=True, tuned=TUNING), 167)


@pytest.mark.parametrize("name", SAMPLERS)
def test_workers_side_by_side_and_several_values(name: str) -> None:
    space, objective = space_of(EMBEDDED, 4), Objective.parse("pareto:gqa,pope")
    study = new_study(name, space, objective)
    keys = set()
    for _ in range(5):
        asked = [ask(study, space) for _ in range(2)]
        keys |= {found.key for _, found in asked}
        for trial, found in asked:
            tell(study, trial, found, objective, found)
    assert len(keys) == 10
    assert all(len(trial.values) == 2 for trial in study.trials)
    assert study.best_trials


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_proposal_follows_from_seed_number_and_finished_trials(name: str, tmp_path: Path) -> None:
    space, objective = space_of(EMBEDDED, 4, tuned=TUNING), Objective()
    settings = replace(QUICK, n_startup=6)
    found: list[list[object]] = []
    for seed, at in ((1, {}), (1, {"storage": open_journal(tmp_path / "journal", "search", print)}), (2, {})):
        study = new_study(name, space, objective, settings, seed, **at)
        first = None
        found.append([])
        for _ in range(7):
            trial, one = ask(study, space)
            first = first or one
            found[-1].append(one.key)
            tell(study, trial, one, objective, first)
            study.sampler.reseed_rng()
            # A worker that starts anew knows what the study knows.
            study.sampler = schedule_sampler(name, space, seed, objective, settings)
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_proposal_for_two_at_once_does_not_see_which_of_them_was_faster(name: str) -> None:
    """The trial beside it is finished, failed or still runs: all the same; the one before that is known."""
    space, settings = space_of(EMBEDDED, 4), replace(QUICK, n_startup=3)
    found = []
    for end in ("running", "finished", "failed"):
        sampler = schedule_sampler(name, space, 0, Objective(), settings, parallel=2)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        first = None
        for number in range(9):
            trial, one = ask(study, space)
            first = first or one
            if number < 8 or end == "finished":
                tell(study, trial, one, Objective(), first)
            elif end == "failed":
                study.tell(trial, state=TrialState.FAIL)
        found.append(ask(study, space)[1].key)
    assert len(set(found)) == 1


@pytest.mark.parametrize("name", ["phi", "evolution"])
def test_what_is_enqueued_is_run_as_it_is(name: str) -> None:
    space = space_of(EMBEDDED, 4, open=True)
    study = new_study(name, space, Objective())
    above = next(one for one in (scatter(space, random.Random(i)) for i in range(99)) if max(one.schedule.ranks) > 16)
    kept = {"candidate": above.to_json(), "baseline": True}
    study.enqueue_trial(within(distributions(space), above.values), user_attrs=kept)
    study.enqueue_trial({}, user_attrs={"candidate": starters(space)[0].to_json()})
    assert ask(study, space)[1] == above
    assert ask(study, space)[1] == starters(space)[0]
    generations = [trial.system_attrs.get("NSGAIISampler:generation") for trial in study.trials]
    assert generations == ([0, 0] if name == "evolution" else [None, None])
    assert ask(study, space)[1].key not in {above.key, starters(space)[0].key}


def test_a_failed_trial_is_given_up_and_an_empty_space_says_so() -> None:
    space = space_of(tiny_graph(), 3, offsets=(0, 0), deltas=(1, 1), rules=("paper",))
    inside = [one.key for one in listed(space)]
    for name in ("random", "phi"):
        study = new_study(name, space, Objective())
        trial, failed = ask(study, space)
        study.tell(trial, state=TrialState.FAIL)
        found = []
        for _ in inside[1:]:
            trial, one = ask(study, space)
            found.append(one.key)
            tell(study, trial, one, Objective(), starters(space)[0])
        assert sorted([failed.key, *found], key=str) == sorted(inside, key=str)
        with pytest.raises(ConfigError, match="holds no schedule beside"):
            ask(study, space)


def test_a_study_of_another_model_is_refused() -> None:
    space = space_of(EMBEDDED, 4)
    study = new_study("random", space, Objective())
    study.enqueue_trial({}, user_attrs={"candidate": starters(space_of(GROUPED, 4))[0].to_json()})
    study.ask()
    with pytest.raises(GraphMismatchError, match="One study serves one model"):
        ask(study, space)
    with pytest.raises(ConfigError, match="Did you mean 'random'"):
        schedule_sampler("randm", space, 0, Objective())
    with pytest.raises(ConfigError, match="no parameter of this search"):
        new_study("random", space, Objective()).ask().suggest_float("dropout", 0.0, 1.0)


# The start


def test_starters_are_uniform_coarse_and_fine() -> None:
    space = space_of(LLAMA, 128, tuned=TUNING)
    found = starters(space)
    assert [set(one.schedule.ranks) == {128} for one in found] == [True] + [False] * (len(found) - 1)
    assert found[0].values["n_stages"] == 1
    assert found[0].learning_rate == TUNING.middle[0]
    assert found[1].values["delta"] == 2
    assert len({one.key for one in found}) == len(found) >= 3
    assert all(contains(space, one.schedule) for one in found)
    for graph, rank in ((EMBEDDED, 2), (GROUPED, 8)):
        for more in ({"open": True}, {}):
            other = space_of(graph, rank, **more)
            assert set(starters(other)[0].schedule.ranks) == {rank}
            assert all(contains(other, one.schedule) for one in starters(other))
    bare = Space(EMBEDDED, Budget.of_rank(EMBEDDED, 4), open=True)
    assert [set(one.schedule.ranks) for one in starters(bare)] == [{4}]
    narrow = starters(space_of(EMBEDDED, 4, n_stages=(2, 3)))
    assert set(narrow[0].schedule.ranks) == {4}, "the baseline is uniform LoRA, even where the space leaves it out"


def test_the_start_fills_the_space_where_it_is_asked_to() -> None:
    space, settings = space_of(EMBEDDED, 4, open=True), PhiSettings(scattered=32)
    found: list[Candidate] = []
    for seed in range(10):
        found.append(propose(space, [], found, Objective(), None, settings, seed=seed))
    assert found[: len(starters(space))] == starters(space)
    drawn = [scatter(space, random.Random(seed)) for seed in range(10 - len(starters(space)))]

    def nearest(candidates: list[Candidate]) -> float:
        all_of = [*starters(space), *candidates]
        return fmean(min(distance(a.schedule, b.schedule) for b in all_of if b is not a) for a in candidates)

    assert nearest(found[len(starters(space)) :]) > nearest(drawn)


# Φ


def test_improvement_is_exact_and_never_flat() -> None:
    grid = np.linspace(-9.0, 60.0, 400_001)
    density = np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi)
    for z in (-6.0, -2.0, -1.0, 0.0, 1.5, 8.0):
        gain = np.trapezoid(np.maximum(z + grid, 0.0) * density, grid)
        assert log_improvement(z) == pytest.approx(math.log(gain), rel=1e-6)
    z = np.concatenate([-np.logspace(8, -3, 400), np.logspace(-3, 3, 100)])
    assert np.isfinite(log_improvement(z)).all()
    assert all(a < b for a, b in pairwise(log_improvement(z)))


def test_a_goal_is_the_objective_of_predicted_scores() -> None:
    draw = random.Random(0)
    space = space_of(EMBEDDED, 4)
    some = [scores(sample(space, draw), 2.0, draw) for _ in range(6)]
    rows = np.array([list(one.values()) for one in some])
    for text in ("relative", "gqa", "gqa=2,mme=1"):
        objective = Objective.parse(text)
        goal = Goal.of(objective.affine(some[0]), NAMES, rows, [1.0])
        value, deviation = goal(rows, np.ones_like(rows))
        assert value == pytest.approx([objective.values(one, some[0], 1.0)[0] for one in some])
        assert deviation == pytest.approx(goal.weights.sum())
    goal = Goal.of(Objective.parse("pareto:gqa,mme").affine({}), NAMES, rows, [0.3, 0.7])
    value, deviation = goal(np.vstack([rows, rows.max(axis=0), rows.min(axis=0)]), np.ones((8, 3)))
    assert value[6] == pytest.approx(0.0)
    assert value[6] >= value.max()
    assert value[7] <= value.min()
    assert (deviation > 0).all()


@pytest.mark.parametrize("text", ["relative", "loss", "pareto:gqa,mme"])
@pytest.mark.parametrize("model", ["ridge", "mlp"])
def test_choose_takes_what_promises_most(model: str, text: str) -> None:
    space, draw = space_of(EMBEDDED, 4, open=True), random.Random(0)
    known = observed([scatter(space, draw) for _ in range(24)])
    pool = sorted((scatter(space, draw) for _ in range(40)), key=worth)
    settings = PhiSettings(model, jitter=0.0)
    at = choose(pool, known, [], Objective.parse(text), known[0].scores, settings, 1)
    assert at == choose(pool, known, [], Objective.parse(text), known[0].scores, settings, 1)
    assert at >= 30, "among the best quarter, the pool being sorted"
    with pytest.raises(ConfigError, match="pool of candidates is empty"):
        choose([], known, [], Objective(), None)


def test_what_runs_is_not_expected_to_improve_once_more() -> None:
    space, draw = space_of(tiny_graph(), 8, open=True), random.Random(0)
    known = observed([scatter(space, draw) for _ in range(16)])
    settings = PhiSettings("gaussian-process", targets="objective", pool=40)
    first = propose(space, known, [], Objective(), known[0].scores, settings, 5)
    second = propose(space, known, [first], Objective(), known[0].scores, settings, 5)
    assert second.key != first.key
    third = propose(space, known, [], Objective(), known[0].scores, settings, 5, taken=[first.key])
    assert third.key != first.key
    assert unseen(space, first, {first.key, second.key}, draw).key not in {first.key, second.key}


def test_trials_that_diverged_and_too_few_are_no_reason_to_stop() -> None:
    space, draw = space_of(EMBEDDED, 4), random.Random(0)
    lost = [Observation(scatter(space, draw), dict.fromkeys(NAMES, math.nan), math.nan) for _ in range(9)]
    found = propose(space, lost, [], Objective(), starters_scores(space), QUICK, 1)
    assert found == starters(space)[0]
    known = observed([*starters(space), *(scatter(space, draw) for _ in range(9))])
    assert contains(space, propose(space, [*lost, *known], [], Objective(), known[0].scores, QUICK, 1).schedule)
    gqa = Objective.parse("gqa")
    assert contains(space, propose(space, known, [], gqa, None, QUICK).schedule), "which needs no baseline"
    with pytest.raises(ConfigError, match="needs the score of 'gqa'"):
        propose(space, [replace(one, scores={}) for one in known], [], gqa, None, QUICK)
    with pytest.raises(ConfigError, match="share from 0 to 1"):
        PhiSettings(mutants=1.5)
    with pytest.raises(ConfigError, match="at least one a round"):
        PhiSettings(pool=1)


def starters_scores(space: Space) -> dict[str, float]:
    return scores(starters(space)[0])


def test_the_ensemble_proposes_and_targets_agree() -> None:
    space, draw = space_of(tiny_graph(), 4), random.Random(0)
    known = observed([*starters(space), *(scatter(space, draw) for _ in range(9))])
    keys = {one.candidate.key for one in known}
    for targets in ("scores", "scores+loss", "objective"):
        settings = PhiSettings("transformer-ensemble", targets=targets, pool=16, norms=True)  # type: ignore[arg-type]
        found = propose(space, known, [], Objective(), known[0].scores, settings, 1)
        assert found.key not in keys
        assert adopt(space, found.schedule) is not None


def best_of(space: Space, phi: PhiSettings | None, trials: int, seed: int) -> float:
    """The true worth of the best schedule among those that a search with noisy scores tried."""
    draw, known = random.Random(f"{seed}"), list[Observation]()
    for i in range(trials):
        if phi is None:
            found = sample(space, draw) if i else starters(space)[0]
        else:
            base = known[0].scores if known else None
            found = propose(space, known, [], Objective(), base, phi, seed * 1000 + i)
        known.append(Observation(found, scores(found, 0.1, draw), 0.0))
    return max(worth(one.candidate) for one in known)


@pytest.mark.parametrize("more", [{}, {"open": True}], ids=["closed", "open"])
def test_phi_finds_better_schedules_than_chance(more: dict[str, bool]) -> None:
    space = space_of(EMBEDDED, 4, **more)
    phi = PhiSettings("gaussian-process", targets="objective", pool=32, n_startup=6)
    pairs = [(best_of(space, phi, 14, seed), best_of(space, None, 14, seed)) for seed in range(10)]
    assert sum(a > b for a, b in pairs) >= 8
    assert fmean(a - b for a, b in pairs) > 0


def test_samplers_load_no_torch() -> None:
    code = "import sys, hydra_vlm.search.samplers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

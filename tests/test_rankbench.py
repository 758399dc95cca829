"""RankBench: its plan, its table, and what is compared on it, on a made-up table of known truth."""

import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hydra_vlm.allocation import Budget
from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.errors import BudgetError, ConfigError, DataError, HydraError
from hydra_vlm.files import read_json, write_json
from hydra_vlm.graph import llama_graph
from hydra_vlm.performance_model.cross_validation import Plan
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.rankbench.__main__ import app
from hydra_vlm.rankbench.collect import collect
from hydra_vlm.rankbench.entry import Entry, closed_space, open_space
from hydra_vlm.rankbench.ground import TableGround, surrogate_ground, table_ground
from hydra_vlm.rankbench.models import compare_models, measured, noise_floor
from hydra_vlm.rankbench.models import report as models_report
from hydra_vlm.rankbench.plan import FIRST, UNIFORM_SEEDS, plan, runs
from hydra_vlm.rankbench.samplers import Contest, contest, report
from hydra_vlm.rankbench.searches import begin
from hydra_vlm.rankbench.spread import Effects, effects, gain, paired
from hydra_vlm.rankbench.spread import report as spread_report
from hydra_vlm.rankbench.table import PACKAGED, RankBench, Row, half, load
from hydra_vlm.records import TrialRecord
from hydra_vlm.search.membership import adopt
from hydra_vlm.search.phi import PhiSettings, starters
from hydra_vlm.search.samplers import SAMPLERS

GRAPH = llama_graph("small", 4, 16, 44)
BUDGET = Budget.of_rank(GRAPH, 4)
NAMES = ("mme", "mmbench", "textvqa", "pope", "gqa", "scienceqa")
CHEAP = PhiSettings(model="ridge", n_startup=5)


def small_profile() -> GradientNormProfile:
    mean = tuple((1.0 + p.layer + len(p.component) / 9,) * 2 for p in GRAPH.projections)
    return GradientNormProfile(GRAPH, mean, ((0.0, 0.0),) * len(mean), 4, 1)


PROFILE = small_profile()
ENTRIES = tuple(plan(GRAPH, BUDGET, PROFILE, n=72))


def made_up(noise: float, of_seed: float = 0.0, entries: tuple[Entry, ...] = ENTRIES, n_runs: int = 200) -> RankBench:
    """Every projection adds to every score, with diminishing returns in its rank; a seed adds the same to all."""
    draw = np.random.default_rng(0)
    weights = draw.gamma(2.0, 1.0, (len(NAMES), len(GRAPH.projections)))
    shifts = of_seed * draw.normal(size=UNIFORM_SEEDS)
    ranks = {entry.id: np.log2(1 + np.array(entry.ranks) / BUDGET.rank) for entry in entries}
    rows = []
    for name, seed in runs(entries)[:n_runs]:
        truth = 30 + 20 * (weights * ranks[name]).mean(axis=1)
        scores = tuple(map(float, truth + shifts[seed] + noise * draw.normal(size=len(NAMES))))
        early = tuple((step, 4 - 0.1 * step - truth.mean() / 100) for step in (5, 10, 100))
        rows.append(Row(name, seed, scores, 3.0 - float(truth.mean()) / 50, early, 60.0))
    return RankBench(GRAPH, BUDGET, PROFILE, NAMES, entries, tuple(rows), {"made": "up"})


CLEAN, NOISY = made_up(0.0, of_seed=1.0), made_up(1.0, of_seed=2.0)


# The plan


def test_the_plan_keeps_the_budget_and_starts_with_uniform() -> None:
    spaces = {"closed": closed_space(GRAPH, BUDGET, PROFILE), "open": open_space(GRAPH, BUDGET, PROFILE)}
    assert len({entry.ranks for entry in ENTRIES}) == len(ENTRIES) == 72
    assert ENTRIES[0].origin == "uniform"
    assert set(ENTRIES[0].ranks) == {BUDGET.rank}
    for entry in ENTRIES:
        schedule = entry.schedule(GRAPH, BUDGET)
        assert schedule.parameters <= BUDGET.parameters
        inside = adopt(spaces[entry.space], schedule)
        assert inside is not None
        assert inside.key == entry.candidate(GRAPH, BUDGET).key
        assert inside.choices == entry.choices or entry.space == "closed"
    assert {entry.origin for entry in ENTRIES} == {"uniform", "coarse", "fine", "rival", "closed", "open"}
    assert min(Counter(entry.space for entry in ENTRIES).values()) >= 20


def test_a_longer_plan_starts_with_the_shorter_one() -> None:
    assert tuple(plan(GRAPH, BUDGET, PROFILE, n=50)) == ENTRIES[:50]
    assert plan(GRAPH, BUDGET, PROFILE, seed=1, n=50)[-1] != ENTRIES[49]


def test_a_space_too_small_for_the_plan_is_an_error() -> None:
    graph = llama_graph("tiny", 2, 8, 8)
    flat = GradientNormProfile(graph, ((1.0, 1.0),) * 14, ((0.0, 0.0),) * 14, 1, 0)
    with pytest.raises(HydraError, match="too small"):
        plan(graph, Budget.of_rank(graph, 1), flat, n=10**4)


@pytest.mark.parametrize("n", [10, 70, 160])
def test_every_run_comes_once_and_first_seeds_first(n: int) -> None:
    entries = [replace(ENTRIES[0], id=f"z{i:03}") for i in range(n)]
    order = runs(entries)
    assert len(set(order)) == len(order) == 2 * n + UNIFORM_SEEDS - 2
    first = min(n, FIRST)
    assert order[:first] == [(entry.id, 0) for entry in entries[:first]]
    assert {name for name, seed in order if seed == 1} == {entry.id for entry in entries}
    if n > FIRST:
        assert sum(seed == 1 for _, seed in order[FIRST : FIRST + 48]) == 48
    assert runs(entries, seeds=3)[: len(order) - n] == order[: len(order) - n]


# The table


def test_a_table_comes_back_from_disk(tmp_path: Path) -> None:
    NOISY.save(tmp_path)
    assert load(tmp_path) == NOISY
    (tmp_path / "runs.jsonl").unlink()
    with pytest.raises(DataError, match=r"runs\.jsonl does not exist"):
        load(tmp_path)
    (tmp_path / "runs.jsonl").write_text('{"id": "z000"}\n')
    with pytest.raises(DataError, match="not a run"):
        load(tmp_path)
    (tmp_path / "runs.jsonl").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        load(tmp_path)


def changed(row: Row, **fields: Any) -> Callable[[], RankBench]:
    return lambda: replace(NOISY, rows=(replace(row, **fields), *NOISY.rows[1:]))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda: replace(NOISY, rows=(*NOISY.rows, NOISY.rows[3])), "twice"),
        (lambda: replace(NOISY, rows=tuple(row for row in NOISY.rows if row.entry != "z000")), "has no run"),
        (changed(NOISY.rows[0], entry="z999"), "belongs to no entry"),
        (changed(NOISY.rows[0], scores=(1.0,)), "1 scores for 6"),
        (changed(NOISY.rows[0], validation_loss=float("nan")), "not finite"),
        (lambda: replace(NOISY, entries=NOISY.entries[::-1]), "uniform LoRA"),
        (lambda: replace(NOISY, entries=(*NOISY.entries, NOISY.entries[5])), "two entries of one id"),
        (lambda: replace(NOISY, entries=(*NOISY.entries, replace(NOISY.entries[5], id="new"))), "one rank vector"),
        (lambda: NOISY.part("test"), "held-out"),  # type: ignore[arg-type]
    ],
)
def test_a_broken_table_is_refused(broken: Callable[[], RankBench], said: str) -> None:
    with pytest.raises(HydraError, match=said):
        broken()


def test_a_schedule_over_the_budget_is_refused() -> None:
    rich = replace(ENTRIES[1], ranks=(9,) * len(GRAPH.projections))
    with pytest.raises(BudgetError):
        replace(NOISY, entries=(ENTRIES[0], rich))


def test_the_halves_are_fixed_and_share_uniform_only() -> None:
    ours, theirs = NOISY.part("development"), NOISY.part("held-out")
    both = {entry.id for entry in ours.entries} & {entry.id for entry in theirs.entries}
    assert both == {"z000"}
    assert len(ours.entries) + len(theirs.entries) == len(ENTRIES) + 1
    assert min(len(ours.finished), len(theirs.finished)) > len(ENTRIES) / 3
    assert NOISY.part("all") == NOISY
    assert [half(f"z{i:03}") for i in range(1, 7)].count("held-out") in range(1, 6)
    assert NOISY.objective(NOISY.baseline[None])[0] == pytest.approx(100)


def test_a_benchmark_where_uniform_has_nothing_counts_in_points() -> None:
    rows = tuple(replace(row, scores=(0.0 if row.entry == "z000" else 5.0, *row.scores[1:])) for row in NOISY.rows)
    bench = replace(NOISY, rows=rows)
    scores = np.array([[5.0, *bench.baseline[1:]]])
    assert bench.objective(scores)[0] == pytest.approx(100 + 5 / 6)


def write_trials(folder: Path, bench: RankBench, n: int) -> None:
    write_json(folder / "graph.json", GRAPH.to_json())
    write_json(folder / "profile.json", PROFILE.to_json())
    write_json(folder / "rankbench.json", [entry.to_json() for entry in ENTRIES])
    for row in bench.rows[:n]:
        scores = tuple(
            Score(b, 20 * v if b == "mme" else v, 10, maximum=2000 if b == "mme" else 100)
            for b, v in zip(NAMES, row.scores, strict=True)
        )
        losses = tuple((step, 1 / step) for step in range(5, 95, 5))
        schedule = bench.schedules[row.entry]
        record = TrialRecord(row.entry, row.seed, schedule, {}, losses, row.validation_loss, scores, row.seconds)
        write_json(folder / "trials" / record.key / "record.json", record.to_json())
    (folder / "trials" / "z070-seed0").mkdir(parents=True)


def test_the_table_is_collected_from_trials(tmp_path: Path) -> None:
    write_trials(tmp_path, NOISY, 12)
    (tmp_path / "config.yaml").write_text("model: here\ntraining: {steps: 90, epochs: null}\n")
    bench = collect(tmp_path, {"made": "today"})
    assert bench.entries == ENTRIES
    assert bench.benchmarks == NAMES
    assert bench.meta["training"] == {"steps": 90}
    assert bench.meta["made"] == "today"
    assert "model" not in bench.meta
    assert [(row.entry, row.seed) for row in bench.rows] == [(row.entry, row.seed) for row in NOISY.rows[:12]]
    np.testing.assert_allclose(bench.scores(), NOISY.scores(NOISY.rows[:12]), atol=1e-4)
    assert [step for step, _ in bench.rows[0].train_losses] == [5, 10, 20, 25, 45, 90]


def test_trials_that_do_not_belong_are_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no rankbench\.json"):
        collect(tmp_path)
    write_trials(tmp_path, NOISY, 0)
    with pytest.raises(DataError, match="no trial"):
        collect(tmp_path)
    write_trials(tmp_path / "b", NOISY, 3)
    path = tmp_path / "b" / "trials" / "z001-seed0" / "record.json"
    other = TrialRecord.from_json(read_json(path))
    write_json(path, replace(other, scores=other.scores[1:]).to_json())
    with pytest.raises(DataError, match="same benchmarks"):
        collect(tmp_path / "b")
    write_json(path, replace(other, schedule=NOISY.schedules["z002"]).to_json())
    with pytest.raises(DataError, match="plan was made anew"):
        collect(tmp_path / "b")


# Spread


def test_what_a_seed_does_to_all_is_taken_off() -> None:
    even = paired(CLEAN)
    assert {row.seed for row in even.rows} == {0, 1}
    found = effects(even, "gqa")
    assert found.variances[1] == pytest.approx(0, abs=1e-18)
    assert effects(CLEAN, "gqa").variances[1] > 0.1
    apart = {name: even.scores(rows)[:, 4].mean() for name, rows in even.runs.items()}
    first = {row.entry: row.scores[4] for row in CLEAN.rows if row.seed == 0}
    assert apart["z009"] - apart["z000"] == pytest.approx(first["z009"] - first["z000"])


def test_variances_and_reliability_are_found() -> None:
    draw = np.random.default_rng(1)
    groups = np.repeat(np.arange(2000), draw.integers(1, 4, 2000))
    values = 5 + 2 * draw.normal(size=2000)[groups] + draw.normal(size=len(groups))
    found = Effects(values, groups)
    assert found.variances == pytest.approx((4, 1), rel=0.1)
    assert found.reliability(1) == pytest.approx(0.8, abs=0.02)
    assert found.reliability(4) > found.reliability(1)
    assert found.overall == pytest.approx(5, abs=0.2)
    expected, deviation = found.shrunk
    assert expected.std() < found.means.std()
    assert deviation.max() < 1
    with pytest.raises(DataError, match="second seed"):
        Effects(values[:3], np.arange(3))


def test_the_best_of_equals_gains_nothing_but_luck() -> None:
    draw = np.random.default_rng(2)
    equal = tuple(replace(row, scores=tuple(50 + draw.normal(size=6))) for row in NOISY.rows)
    bench = paired(replace(NOISY, rows=equal))
    found = gain(bench, "objective", bench.rows)
    assert found.naive > 0.5
    assert found.expected < 0.5 * found.naive
    assert found.interval[0] == 0


def test_a_real_gain_is_found() -> None:
    bench = paired(NOISY)
    found = gain(bench, "objective", bench.rows)
    clean = paired(CLEAN)
    truth = clean.objective(clean.scores())
    best = max(truth) - truth[0]
    assert found.interval[0] <= found.expected <= found.naive
    assert found.there >= found.expected
    assert found.expected == pytest.approx(best, abs=3)
    text = spread_report(NOISY)
    assert text.count("| objective |") == 6
    assert "**closed**" in text
    with pytest.raises(DataError, match="two seeds"):
        spread_report(replace(NOISY, rows=tuple(row for row in NOISY.rows if row.seed == 0)))


# Models


def test_models_are_compared_on_the_table() -> None:
    bench = paired(NOISY)
    found = compare_models(bench, ("ridge", "mean"), Plan(5, (0,), (16,)))
    assert found.estimate("ridge", "mse").mean < 0.7 * found.estimate("mean", "mse").mean
    floor = noise_floor(bench)
    assert floor is not None
    assert 0 < floor < found.estimate("ridge", "mse").mean
    assert "Learning curve, MSE" in models_report(bench, found)
    objective = measured(bench).objective(bench.scores())
    np.testing.assert_allclose(objective, bench.objective(bench.scores()))
    assert measured(bench, "early-loss").extras is not None
    assert noise_floor(replace(bench, rows=bench.rows[:30])) is None
    with pytest.raises(ConfigError, match="early-loss"):
        measured(bench, "loss")  # type: ignore[arg-type]


# Searches


def test_every_search_sees_each_schedule_once_and_uniform_first() -> None:
    ground = table_ground(NOISY)
    asked = Contest(SAMPLERS, repetitions=1, trials=12, settings=CHEAP)
    courses, again = contest(ground, asked), contest(ground, asked)
    assert [course.sampler for course in courses] == list(SAMPLERS)
    assert {course.observed[0] for course in courses} == {ground.regret(0)}
    assert all(len(course.observed) == (24 if course.sampler == "random" else 12) for course in courses)
    assert all(min(course.observed) >= 0 for course in courses)
    assert [replace(course, seconds=0) for course in courses] == [replace(course, seconds=0) for course in again]
    text = report(courses, asked)
    assert "trials of random search for the same" in text
    assert "Φ less" in text


def test_a_searcher_is_never_given_a_schedule_twice() -> None:
    ground = table_ground(NOISY, "closed")
    for name in SAMPLERS:
        seen = _first(name, ground, 11)
        assert seen[0] == 0
        assert len(set(seen)) == len(seen), name


def test_phi_begins_with_those_of_hydras_schedules_that_the_table_holds() -> None:
    ground = table_ground(NOISY, "closed")
    ranks = [one.schedule.ranks for one in ground.candidates]
    own = [ranks.index(one.schedule.ranks) for one in starters(ground.space) if one.schedule.ranks in ranks]
    assert len(own) > 1
    assert _first("phi", ground, len(own)) == own


def _first(name: str, ground: TableGround, n: int) -> list[int]:
    search, seen = begin(name, ground, 3, CHEAP), []
    at = next(search)
    for _ in range(n):
        seen.append(at)
        at = search.send(ground.observe(at, 0))
    return seen


def test_a_search_by_loss_is_judged_by_loss() -> None:
    table, model = table_ground(NOISY, goal="loss"), surrogate_ground(NOISY, goal="loss", part="development")
    best = int(table.worth.argmax())
    losses = [np.mean([run.loss for run in runs]) for runs in table.runs]
    assert np.corrcoef(table.worth, losses)[0, 1] < -0.9
    assert table.regret(best) == 0
    assert model.best >= model.worth(list(table.candidates[:20])).max() - 1e-9
    quiet = table_ground(NOISY, goal="loss", noise=False)
    assert [-run.loss for (run,) in quiet.runs] == pytest.approx(quiet.worth.tolist())
    course = contest(quiet, Contest(("random",), 1, 8))[0]
    assert course.predicted[8] <= course.observed[0]  # the best one seen is the best one there is so far
    courses = contest(table, Contest(("random",), 2, 8))
    assert all(0 <= regret <= np.ptp(table.worth) for course in courses for regret in course.observed)


def test_phi_beats_random_where_there_is_something_to_learn() -> None:
    ground = table_ground(made_up(0.2))
    asked = Contest(("phi", "random"), repetitions=12, trials=16, settings=CHEAP)
    courses = contest(ground, asked)
    at_16 = {name: np.mean([c.observed[15] for c in courses if c.sampler == name]) for name in asked.samplers}
    assert at_16["phi"] < 0.7 * at_16["random"]


def test_regret_after_all_schedules_is_nothing_without_noise() -> None:
    ground = table_ground(made_up(0.0, of_seed=1.0, n_runs=160).part("development"))
    trials = len(ground.candidates)
    course = contest(ground, Contest(("random",), 1, trials))[0]
    assert course.observed[-1] == pytest.approx(0, abs=1e-9)
    assert list(course.observed) == sorted(course.observed, reverse=True)
    with pytest.raises(ConfigError, match="cannot be picked"):
        contest(ground, Contest(("random",), 1, trials + 1))
    for wrong in ({"samplers": ("cma",)}, {"samplers": ()}, {"repetitions": 0}):
        with pytest.raises(ConfigError):
            Contest(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("space", ["closed", "open"])
def test_searches_run_freely_on_a_surrogate(space: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hydra_vlm.rankbench.ground.DRAWS", 50)
    monkeypatch.setattr("hydra_vlm.rankbench.ground.ROUNDS", 3)
    ground = surrogate_ground(NOISY, space)
    courses = contest(ground, Contest(("phi", "random", "evolution"), 1, 7, settings=CHEAP))
    assert len({course.observed[0] for course in courses}) == 1  # uniform
    assert all(np.isfinite(course.observed).all() for course in courses)
    one = ground.space
    assert one.open == (space == "open")
    first, again = (ground.observe(NOISY.entries[0].candidate(GRAPH, BUDGET), seed) for seed in (1, 1))
    assert first.scores == again.scores
    assert first.scores.keys() == set(NAMES)


# Commands


def test_commands_print_markdown(tmp_path: Path) -> None:
    NOISY.save(tmp_path)
    run = CliRunner()
    quick = ["--samplers", "random,phi", "--repetitions", "2", "--trials", "9", "--phi", "model=ridge"]
    for words, said in (
        (["datasheet"], "72 of 72 planned"),
        (["spread", "--part", "held-out"], "| objective |"),
        (["models", "--models", "ridge,mean", "--folds", "4", "--no-curve"], "no model gets below"),
        (["models", "--models", "ridge", "--folds", "4", "--no-curve", "--target", "loss"], "target loss"),
        (["samplers", *quick, "--objective", "loss"], "objective loss"),
        (["samplers", *quick, "--out", str(tmp_path / "courses.json")], "| phi |"),
    ):
        found = run.invoke(app, [*words, "--table", str(tmp_path)], catch_exceptions=False)
        assert found.exit_code == 0
        assert said in found.output
    assert len(read_json(tmp_path / "courses.json")) == 4
    for setting in ("colour=red", "pool=many", "model", "model=linear"):
        result = run.invoke(app, ["samplers", "--table", str(tmp_path), "--phi", setting])
        assert isinstance(result.exception, ConfigError), setting


def test_collect_writes_the_table(tmp_path: Path) -> None:
    write_trials(tmp_path / "work", NOISY, 6)
    words = ["collect", str(tmp_path / "work"), "--out", str(tmp_path / "table"), "--fact", "made=2026"]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert len(load(tmp_path / "table").rows) == 6
    assert load(tmp_path / "table").meta == {"made": "2026"}


def test_nothing_here_loads_torch() -> None:
    modules = ", ".join(f"hydra_vlm.rankbench.{name}" for name in ("plan", "table", "spread", "samplers", "__main__"))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_draws_do_not_move_the_global_generator() -> None:
    random.seed(5)
    expected = random.random()
    random.seed(5)
    plan(GRAPH, BUDGET, PROFILE, n=45)
    assert random.random() == expected


# The packaged table


def test_the_packaged_table_is_small_whole_and_of_one_budget() -> None:
    bench = load()
    assert sum(path.stat().st_size for path in PACKAGED.iterdir()) <= 3_000_000
    assert bench.entries[0].origin == "uniform"
    assert {"closed", "open"} == {entry.space for entry in bench.finished}
    ranks = [entry.ranks for entry in bench.finished]
    assert len(set(ranks)) == len(ranks) >= 128
    costs = {
        space: [
            entry.schedule(bench.graph, bench.budget).parameters for entry in bench.finished if entry.space == space
        ]
        for space in ("closed", "open")
    }
    assert max(*costs["closed"], *costs["open"]) <= bench.budget.parameters
    cheapest = min(bench.graph.costs)
    assert min(costs["open"]) > bench.budget.parameters - cheapest  # no further rank would fit
    assert sum(len(rows) > 1 for rows in bench.runs.values()) >= 48
    assert all(0 <= score <= 100 for row in bench.rows for score in row.scores)
    text = "".join(path.read_text(encoding="utf-8") for path in PACKAGED.iterdir())
    assert '"/' not in text  # no path of the machine that made it


def test_the_packaged_table_is_the_plans() -> None:
    bench = load()
    planned = {entry.id: entry.ranks for entry in plan(bench.graph, bench.budget, bench.profile, n=len(bench.entries))}
    assert all(planned[entry.id] == entry.ranks for entry in bench.entries)

"""The performance model on a known function of ranks: what it learns, what it refuses, and how it is judged."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from hydra_vlm.allocation import Budget
from hydra_vlm.errors import ConfigError, DataError, GraphMismatchError
from hydra_vlm.graph import ComputationGraph, Projection, llama_graph
from hydra_vlm.performance_model import encoding, transformer
from hydra_vlm.performance_model.cross_validation import (
    CrossValidation,
    Estimate,
    Plan,
    cross_validate,
    folds,
    interval,
)
from hydra_vlm.performance_model.encoding import FloatArray, InputScaling, distinct, encode, feature_names
from hydra_vlm.performance_model.metrics import Measured, fold_metrics
from hydra_vlm.performance_model.protocol import (
    MIN_SCHEDULES,
    PERFORMANCE_MODELS,
    Regression,
    performance_model,
)
from hydra_vlm.profile import GradientNormProfile
from hydra_vlm.schedule import RankSchedule, Scaling

GRAPH = llama_graph("embedded", 8, 128, 352)
BUDGET = Budget.of_rank(GRAPH, 8)
COSTS = np.array(GRAPH.costs)

NAMES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "lightgbm" and importlib.util.find_spec("lightgbm") is None, reason="lightgbm is an extra"
        ),
    )
    for name in PERFORMANCE_MODELS
]
LEARNING = [name for name in NAMES if name.values[0] != "mean"]
WITH_SPREAD = {"transformer-ensemble", "random-forest", "ridge", "gaussian-process"}


def drawn(n: int, seed: int, concentration: float = 1.0, graph: ComputationGraph = GRAPH) -> list[RankSchedule]:
    """Random schedules; a low concentration puts the budget into few projections."""
    shares = np.random.default_rng(seed).dirichlet(np.full(len(graph.costs), concentration), size=n)
    ranks = (shares * BUDGET.parameters / np.array(graph.costs)).astype(int)
    return [RankSchedule(f"{seed}.{i}", graph, tuple(map(int, row)), BUDGET.parameters) for i, row in enumerate(ranks)]


def truth(schedules: list[RankSchedule], n_outputs: int) -> FloatArray:
    """Scores that a rank adds to with diminishing returns, more so in deep layers, and an interaction of Q and Down."""
    draw = np.random.default_rng(123)
    ranks = np.array([s.ranks for s in schedules], dtype=float).reshape(-1, 8, 7)
    gain = 1 - np.exp(-ranks / 8)
    depth = np.linspace(0.3, 1, 8)
    together = gain[:, :4, 0].mean(axis=1) * gain[:, 4:, 6].mean(axis=1)
    parts = (
        np.einsum("nlk,l,k->n", gain, depth + draw.uniform(-0.3, 0.3), draw.uniform(0.2, 1.5, 7))
        for _ in range(n_outputs)
    )
    return 50 + np.stack([part + 12 * together for part in parts], axis=1)


SCHEDULES, ASKED = drawn(96, 0), drawn(200, 1)
SCORES, ANSWERS = truth(SCHEDULES, 3), truth(ASKED, 3)


def noisy(scores: FloatArray, share: float = 0.15) -> FloatArray:
    return scores + share * scores.std(axis=0) * np.random.default_rng(7).normal(size=scores.shape)


def uniform(rank: int, graph: ComputationGraph = GRAPH, **changes: object) -> RankSchedule:
    schedule = RankSchedule(f"uniform-{rank}", graph, (rank,) * len(graph.projections), rank * graph.cost)
    return replace(schedule, **changes)  # type: ignore[arg-type]


def profile(graph: ComputationGraph = GRAPH) -> GradientNormProfile:
    values = tuple((0.1 * (1 + p.layer), 0.3 * (1 + p.layer)) for p in graph.projections)
    return GradientNormProfile(graph, values, values, steps=5, skipped=1)


# ---- what is seen of a schedule


def test_uniform_lora_at_the_budget_is_one_everywhere() -> None:
    for rank in (4, 128):
        encoded = encode([uniform(rank)])
        np.testing.assert_allclose(encoded.tokens, np.ones((1, 8, 7)))
        np.testing.assert_allclose(encoded.scalars[0], [1.0, np.log2(rank), 1.0])
    half = replace(uniform(4), budget=uniform(8).budget)
    np.testing.assert_allclose(encode([half]).ranks, np.log2(1.5))
    np.testing.assert_allclose(encode([half]).scalars[0, 0], 0.5)


def test_tokens_hold_each_rank_in_its_place() -> None:
    graph = ComputationGraph("odd", (Projection(0, "a", 4, 4), Projection(0, "b", 2, 2), Projection(1, "b", 8, 8)))
    schedule = RankSchedule("z", graph, (3, 1, 0), 2 * graph.cost)
    np.testing.assert_allclose(encode([schedule]).tokens[0], [[np.log2(2.5), np.log2(1.5)], [0, 0]])


def test_features_are_named_and_right() -> None:
    encoded = encode(SCHEDULES[:3], profile(), [[1.0], [2.0], [3.0]])
    names = feature_names(GRAPH, profile=True, n_extras=1)
    assert encoded.features.shape == (3, len(names))
    found = dict(zip(names, encoded.features[0], strict=True))
    schedule = SCHEDULES[0]
    shares = np.array(schedule.ranks) * COSTS / schedule.budget
    layers = np.array([p.layer for p in GRAPH.projections])
    assert found["used budget"] == pytest.approx(schedule.parameters / schedule.budget)
    assert found["share of q_proj"] == pytest.approx(shares[0::7].sum())
    assert found["share of first third"] == pytest.approx(shares[layers <= 2].sum())  # depths 0, 1/7, 2/7
    assert found["depth mean"] == pytest.approx((shares * layers / 7).sum() / shares.sum())
    assert found["not adapted"] == schedule.ranks.count(0) / 56
    assert found["share by norm"] == pytest.approx((shares * (1 + layers) / 4.5).sum())
    assert found["extra 1"] == 1.0


def test_scaling_rule_is_seen() -> None:
    scales = [Scaling("constant", 4.0), Scaling("fixed", 64.0), Scaling("rslora", 8.0)]
    seen = encode([uniform(16, scaling=scaling) for scaling in scales]).scalars[:, 2]
    np.testing.assert_allclose(seen, [2, 2, 1])


def test_runs_of_one_schedule_are_one_group() -> None:
    same = replace(SCHEDULES[0], name="another name")
    rescaled = replace(SCHEDULES[0], scaling=Scaling("constant", 1.0))
    assert distinct([SCHEDULES[0], SCHEDULES[1], same, rescaled]).tolist() == [0, 1, 0, 2]


def test_scaled_inputs_ignore_what_did_not_vary() -> None:
    scaling = InputScaling.of(encode(SCHEDULES))
    assert np.abs(scaling.flat(encode(SCHEDULES)).mean(axis=0)).max() < 1e-9
    assert np.square(scaling.flat(encode(SCHEDULES))[:, :56]).mean() == pytest.approx(1)
    other = encode([replace(s, scaling=Scaling("balanced", 8.0)) for s in ASKED])
    assert np.all(scaling.scalars(other)[:, 1:] == 0)
    assert np.abs(scaling.scalars(encode(SCHEDULES))[:, 0]).max() < 3  # the used budget: rounding stays small


# ---- what a model learns


@pytest.fixture(scope="module")
def fitted() -> dict[str, object]:
    models = [name.values[0] for name in NAMES if not any(mark.args[0] for mark in name.marks)]
    return {str(name): performance_model(str(name)).fit(SCHEDULES, noisy(SCORES), seed=3) for name in models}


@pytest.mark.parametrize("name", LEARNING)
def test_every_model_beats_the_mean(name: str, fitted: dict) -> None:
    found = fitted[name].predict(ASKED)
    size = ANSWERS.std(axis=0)
    error, of_mean = ((((p.mean - ANSWERS) / size) ** 2).mean(axis=0) for p in (found, fitted["mean"].predict(ASKED)))
    assert error.mean() < 0.9 * of_mean.mean()
    correlations = [np.corrcoef(found.mean[:, k], ANSWERS[:, k])[0, 1] for k in range(3)]
    assert min(correlations) > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_spread_is_given_or_none(name: str, fitted: dict) -> None:
    found = fitted[name].predict(ASKED)
    assert found.mean.shape == (200, 3)
    assert (found.spread is not None) == (name in WITH_SPREAD)
    if found.spread is not None:
        assert found.spread.shape == (200, 3)
        assert found.spread.min() >= 0
        assert found.spread.mean() > 0


@pytest.mark.parametrize("name", ["transformer-ensemble", "gaussian-process", "ridge"])
def test_spread_grows_away_from_the_data(name: str, fitted: dict) -> None:
    near, far = (fitted[name].predict(asked).spread.mean() for asked in (SCHEDULES, drawn(100, 5, concentration=0.1)))
    assert far > 1.2 * near


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_prediction(name: str) -> None:
    model, schedules = performance_model(name), SCHEDULES[:24]
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first, again = (model.fit(schedules, SCORES[:24, :2], seed=5).predict(ASKED[:9]) for _ in range(2))
    np.testing.assert_array_equal(first.mean, again.mean)
    if first.spread is not None:
        np.testing.assert_array_equal(first.spread, again.spread)
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("name", NAMES)
def test_constant_outputs_are_predicted_as_they_are(name: str) -> None:
    scores = np.column_stack([np.full(24, 0.1), SCORES[:24, 0], np.full(24, -3.0)])
    found = performance_model(name).fit(SCHEDULES[:24], scores, seed=0).predict(ASKED[:4])
    np.testing.assert_allclose(found.mean[:, [0, 2]], [[0.1, -3.0]] * 4)
    assert np.isfinite(found.mean).all()
    if found.spread is not None:
        assert np.all(found.spread[:, [0, 2]] == 0)
        assert np.all(found.spread[:, 1] >= 0)
    nothing = performance_model(name).fit(SCHEDULES[:5], scores[:5, :1], seed=0).predict(ASKED[:4])
    np.testing.assert_allclose(nothing.mean, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_five_schedules_suffice(name: str) -> None:
    found = performance_model(name).fit(SCHEDULES[:5], SCORES[:5, :1], seed=0).predict(ASKED[:3])
    assert found.mean.shape == (3, 1)
    assert np.isfinite(found.mean).all()


@pytest.mark.parametrize("name", ["transformer", "ridge", "random-forest"])
def test_profile_and_extras_are_inputs(name: str) -> None:
    luck = np.random.default_rng(0).normal(size=96)
    scores = (SCORES[:, :1] - SCORES[:, :1].mean()) / SCORES[:, :1].std() + 3 * luck[:, None]
    model = performance_model(name, profile())
    told = model.fit(SCHEDULES[:80], scores[:80], seed=1, extras=luck[:80]).predict(SCHEDULES[80:], luck[80:]).mean
    untold = model.fit(SCHEDULES[:80], scores[:80], seed=1).predict(SCHEDULES[80:]).mean
    assert ((told - scores[80:]) ** 2).mean() < 0.5 * ((untold - scores[80:]) ** 2).mean()


# ---- the paper's Transformer


def test_the_network_is_one_encoder_layer_of_torch() -> None:
    settings = transformer.TransformerSettings(members=2)
    weights = transformer.initial_weights((3, 8, 7), 2, 6, settings, seed=0)
    draw = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(w.shape, generator=draw) / 4 for name, w in weights.items()}
    tokens, scalars = torch.randn(3, 8, 7, generator=draw), torch.randn(3, 2, generator=draw)
    found = transformer.forward(weights, tokens, scalars, settings.heads)
    for member in range(2):
        w = {name: weight[member].squeeze(0) for name, weight in weights.items()}
        layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        layer.load_state_dict(
            {
                "self_attn.in_proj_weight": w["attention_in.weight"].T,
                "self_attn.in_proj_bias": w["attention_in.bias"],
                "self_attn.out_proj.weight": w["attention_out.weight"].T,
                "self_attn.out_proj.bias": w["attention_out.bias"],
                "linear1.weight": w["feed_in.weight"].T,
                "linear1.bias": w["feed_in.bias"],
                "linear2.weight": w["feed_out.weight"].T,
                "linear2.bias": w["feed_out.bias"],
                **{f"norm{i}.{kind}": w[f"norm_{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")},
            }
        )
        with torch.no_grad():
            whole = (scalars @ w["schedule.weight"] + w["schedule.bias"])[:, None]
            read = layer(tokens @ w["token.weight"] + w["token.bias"] + w["position.weight"] + whole).mean(1)
        wanted = read @ w["scores.weight"] + w["scores.bias"]
        torch.testing.assert_close(found[member], wanted, rtol=1e-4, atol=1e-5)


def test_the_best_epoch_is_kept_and_members_stop_for_themselves() -> None:
    encoded, targets = encode(SCHEDULES[:30]), (SCORES[:30] - SCORES[:30].mean(0)) / SCORES[:30].std(0)
    settings = transformer.TransformerSettings(members=3, patience=10)
    trained = transformer.train(encoded, targets, seed=2, settings=settings)
    losses = trained.losses
    assert losses.shape[1:] == (3, 2)
    assert len(losses) < settings.epochs
    held_out = encoding.validation_rows(encoded.groups, 3, 0.2, seed=2)
    assert held_out.sum(axis=1).tolist() == [6, 6, 6]
    assert not np.array_equal(held_out[0], held_out[1])
    tokens = torch.tensor(trained.scaling.tokens(encoded), dtype=torch.float32)
    scalars = torch.tensor(trained.scaling.scalars(encoded), dtype=torch.float32)
    with torch.no_grad():
        found = transformer.forward(trained.weights, tokens, scalars, settings.heads).numpy()
    for member in range(3):
        kept = ((found[member] - targets)[held_out[member]] ** 2).mean()
        own = losses[:, member, 1]
        best = next(i for i in range(len(own)) if own[i] == own[: i + 11].min() and own[i] == own[: i + 1].min())
        assert kept == pytest.approx(own[best], rel=1e-4)


def test_runs_of_one_schedule_are_not_split() -> None:
    groups = np.repeat(np.arange(10), 3)
    held_out = encoding.validation_rows(groups, 4, 0.2, seed=0)
    assert all(len(set(row[groups == group])) == 1 for row in held_out for group in range(10))
    assert held_out.sum(axis=1).tolist() == [6] * 4


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="multiple of 5 heads"):
        transformer.TransformerSettings(heads=5)
    with pytest.raises(ConfigError, match="must be positive"):
        transformer.TransformerSettings(members=0)


# ---- what is refused


def test_fewer_schedules_than_a_split_needs() -> None:
    repeated = SCHEDULES[: MIN_SCHEDULES - 1] * 3
    with pytest.raises(DataError, match="needs at least 5 distinct schedules, got 4"):
        performance_model("ridge").fit(repeated, truth(repeated, 3), seed=0)
    with pytest.raises(DataError, match="got none"):
        performance_model("ridge").fit(SCHEDULES[:5], SCORES[:5], seed=0).predict([])


@pytest.mark.parametrize(
    ("scores", "extras", "message"),
    [
        (SCORES[:9], None, r"\(9, 3\) do not fit 10 schedules"),
        (SCORES[:10, 0], None, r"\(10,\) do not fit"),
        (np.zeros((10, 0)), None, r"\(10, 0\) do not fit"),
        (np.where(np.arange(30).reshape(10, 3) == 5, np.nan, 1.0), None, r"score 3 of schedule '0.1' \(row 2\) is nan"),
        (SCORES[:10], np.zeros(9), r"extras of shape \(9, 1\) do not fit 10"),
        (SCORES[:10], np.full(10, np.inf), "extras of schedule 1 are not finite"),
    ],
)
def test_shapes_that_do_not_fit(scores: FloatArray, extras: FloatArray | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        performance_model("ridge").fit(SCHEDULES[:10], scores, 0, extras)


def test_another_graph_or_other_extras_are_refused() -> None:
    small = llama_graph("small", 4, 64, 128)
    model = performance_model("ridge").fit(SCHEDULES[:10], SCORES[:10], seed=0)
    with pytest.raises(GraphMismatchError, match="different models"):
        model.predict([uniform(4, small)])
    with pytest.raises(GraphMismatchError, match="different models"):
        performance_model("ridge").fit([*SCHEDULES[:9], uniform(4, small)], SCORES[:10], seed=0)
    with pytest.raises(GraphMismatchError, match="profile was measured"):
        performance_model("ridge", profile(small)).fit(SCHEDULES[:10], SCORES[:10], seed=0)
    with pytest.raises(DataError, match="fitted with 0 extras a schedule, got 1"):
        model.predict(ASKED[:2], [1.0, 2.0])


def test_unknown_names_and_missing_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'forest'.*random-forest"):
        performance_model("forest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'hydra-vlm\[lightgbm\]'"):
        performance_model("lightgbm")


def test_no_torch_before_a_transformer_is_asked_for() -> None:
    code = (
        "import sys, hydra_vlm.performance_model.protocol as p, hydra_vlm.performance_model.cross_validation;"
        "[p.performance_model(n) for n in ('ridge', 'mlp', 'mean')]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- how models are judged


THREE = [uniform(rank, budget=BUDGET.parameters) for rank in (1, 2, 3, 3)]  # the last one was run twice
HAND = np.array([[0.0, 7.0], [2.0, 7.0], [4.0, 7.0], [6.0, 7.0]])
ALL = np.arange(4)


def test_metrics_by_hand() -> None:
    predicted = np.array([[1.0, 7.0], [5.0, 8.0], [4.0, 7.0], [4.0, 7.0]])
    found = fold_metrics(Measured(tuple(THREE), HAND), ALL, predicted)
    assert found.raw_mse == (3.5, 0.25)
    assert found.mse == pytest.approx(3.5 / 5)  # the first output's variance is 5; the second is constant
    assert found.mae == pytest.approx(1.5 / 5**0.5)
    assert found.spearman == pytest.approx(0.5)
    assert found.kendall == pytest.approx(1 / 3)
    assert found.objective_spearman == pytest.approx(0.5)
    spread = np.std([0, 2, 5])  # means by schedule
    assert found.regret == pytest.approx((5 - 2) / spread)
    lower = fold_metrics(Measured(tuple(THREE), HAND, ("loss", "other"), (-1.0, 0.0)), ALL, predicted)
    assert lower.regret == 0
    assert lower.objective_spearman == pytest.approx(0.5)


def test_a_constant_prediction_ranks_nothing_and_chooses_at_random() -> None:
    found = fold_metrics(Measured(tuple(THREE), HAND), ALL, np.full((4, 2), 0.1))
    assert (found.spearman, found.kendall, found.objective_spearman) == (0, 0, 0)
    assert found.regret == pytest.approx((5 - 7 / 3) / np.std([0, 2, 5]))


def test_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 3.0], n_folds=3)
    assert found.mean == 2
    assert found.half_width == pytest.approx(student.ppf(0.975, 2) * (1 / 3 + 1 / 2) ** 0.5)
    assert str(Estimate(0.5, None)) == "0.500"
    assert interval([1.0], n_folds=3) == Estimate(1.0, None)


def test_folds_never_split_a_schedule() -> None:
    groups = distinct([*SCHEDULES[:23], *SCHEDULES[:23], *SCHEDULES[:5]])
    parts = folds(groups, 5, seed=0)
    assert sorted(np.concatenate([held_out for _, held_out in parts])) == list(range(51))
    for trained, held_out in parts:
        assert not set(groups[trained]) & set(groups[held_out])
        assert len(trained) + len(held_out) == 51
        assert len(set(groups[held_out])) in (4, 5)
    assert any((a[1].tolist() != b[1].tolist()) for a, b in zip(parts, folds(groups, 5, seed=1), strict=True))


def test_folds_that_are_too_small() -> None:
    with pytest.raises(ConfigError, match=r"10 folds of 16 distinct schedules.*Measure 20"):
        folds(np.arange(16), 10, seed=0)
    with pytest.raises(ConfigError, match=r"2 folds of 8 distinct.*Measure 10"):
        folds(np.arange(8), 2, seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": np.ones((4, 2))}, "every output is the same"),
        ({"scores": HAND[:3]}, "do not fit 4 schedules"),
        ({"outputs": ("one",)}, "as many names and weights, got 1 and 2"),
        ({"weights": (1.0,)}, "as many names and weights, got 2 and 1"),
        ({"extras": np.zeros(3)}, "extras of shape"),
    ],
)
def test_measurements_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Measured(**{"schedules": tuple(THREE), "scores": HAND} | changes)


@pytest.mark.parametrize("changes", [{"n_folds": 1}, {"seeds": ()}, {"sizes": (16, 8)}, {"sizes": (4, 8)}])
def test_plans_that_cannot_be(changes: dict) -> None:
    with pytest.raises(ConfigError):
        Plan(**changes)


@pytest.fixture(scope="module")
def report() -> CrossValidation:
    schedules = (*SCHEDULES[:40], *SCHEDULES[:10])
    measured = Measured(schedules, noisy(truth(list(schedules), 2)), ("MME", "loss"), extras=np.arange(50.0))
    models = {name: performance_model(name) for name in ("ridge", "mean")}
    return cross_validate(models, measured, Plan(n_folds=5, seeds=(0, 1), sizes=(8, 16, 128)))


def test_learning_curve_has_its_shape(report: CrossValidation) -> None:
    assert (report.n_rows, report.n_schedules, report.models, report.sizes) == (50, 40, ("ridge", "mean"), (8, 16, 32))
    assert [(r.model, r.size, len(r.folds)) for r in report.results] == [
        (model, size, 10) for size in (8, 16, 32) for model in ("ridge", "mean")
    ]
    assert 0.5 < report.estimate("mean", "mse").mean < 2


def test_models_are_compared_fold_by_fold(report: CrossValidation) -> None:
    ridge, mean = (np.array(report.values(model, "mse")) for model in ("ridge", "mean"))
    assert ridge.mean() < mean.mean()
    assert report.difference("ridge", "mean", "mse") == interval(list(ridge - mean), 5)
    with pytest.raises(ConfigError, match="no 'mse' of 'ridge' at size 9"):
        report.values("ridge", "mse", 9)
    with pytest.raises(ConfigError, match="no 'rmse'"):
        report.values("ridge", "rmse")


def test_report_survives_json_and_prints(report: CrossValidation) -> None:
    again = CrossValidation.from_json(json.loads(json.dumps(report.to_json())))
    assert again == report
    lines = report.table().splitlines()
    assert lines[0] == "40 schedules (50 runs), 5 folds, 2 seeds"
    assert lines[1].split() == ["model", "trained", "on", "MSE", "MAE", "Spearman", "Kendall", "objective", "regret"]
    assert lines[2].startswith("ridge  8 ")
    assert str(report.estimate("mean", "mae", 16)) in lines[5]
    assert lines[9].split() == ["raw", "MSE", "trained", "on", "MME", "loss"]
    with pytest.raises(ConfigError, match="not a cross-validation report"):
        CrossValidation.from_json({"outputs": []})


def test_validation_is_the_same_each_time_and_may_hold_any_model() -> None:
    measured = Measured(tuple(SCHEDULES[:20]), SCORES[:20])
    small = transformer.TransformerSettings(epochs=5)
    model = Regression("own", lambda encoded, y, seed: transformer.train(encoded, y, seed, small).predict)
    first, again = (cross_validate({"own": model}, measured, Plan(n_folds=3)) for _ in range(2))
    assert first == again
    assert first.outputs == tuple(f"output {i}" for i in range(1, 4))
    assert first.sizes == (13,)

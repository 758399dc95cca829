"""The comparison and the page on synthetic run folders."""

import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fake_run import fake_moves, fake_profile, fake_run, fake_schedules, fake_trial, write_json
from hydra_vlm.benchmarks.protocol import Score
from hydra_vlm.errors import RunFolderError
from hydra_vlm.graph import llama_graph
from hydra_vlm.moving.plan import Move
from hydra_vlm.records import TrialRecord
from hydra_vlm.report import figures, move_figures
from hydra_vlm.report.comparison import Comparison, _merged, compare
from hydra_vlm.report.page import write_report
from hydra_vlm.report.rates import differing_rates, own_rates
from hydra_vlm.report.run import RunData, load_run
from hydra_vlm.schedule import RankSchedule, Scaling, hand_schedule
from hydra_vlm.signals import Signal


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def comparison(run: Path) -> Comparison:
    return compare(load_run(run))


def test_rows_come_in_a_fixed_order_with_exact_parameters(comparison: Comparison) -> None:
    assert [row.name for row in comparison.rows] == ["zero-shot", "uniform", "coarse", "fine", "full"]
    uniform, fine, full = (comparison.row(name) for name in ("uniform", "fine", "full"))
    assert uniform.parameters == uniform.budget == 8 * llama_graph("tiny", 8, 64, 176).cost
    assert uniform.used == 100
    assert fine.used is not None
    assert fine.used < 100
    assert (full.parameters, full.budget, full.used) == (0, None, None)
    assert comparison.row("zero-shot").seedless


def test_differences_are_paired_by_seed(comparison: Comparison) -> None:
    fine, uniform = comparison.row("fine").loss, comparison.row("uniform").loss
    assert fine.difference is not None
    by_seed = [fine.by_seed[s] - uniform.by_seed[s] for s in uniform.by_seed]
    assert fine.difference.mean == pytest.approx(sum(by_seed) / 5)
    assert (fine.difference.n, fine.difference.over) == (5, "seeds")
    assert fine.verdict == "better, larger than the noise"
    unpaired = fine.value.high is not None and uniform.value.low is not None and fine.value.high - uniform.value.low
    assert fine.difference.high is not None
    assert fine.difference.high < unpaired
    assert comparison.row("uniform").loss.difference is None
    assert comparison.row("coarse").scores["easy-vqa"].verdict == "not distinguishable from zero"


def test_a_model_as_it_came_meets_the_baseline_at_every_seed(comparison: Comparison) -> None:
    score = comparison.row("zero-shot").scores["easy-vqa"]
    assert score.difference is not None
    assert (score.difference.n, score.verdict) == (5, "worse, larger than the noise")
    assert "nothing trained: no seed noise" in score.value.method


def test_groups_are_compared_too(comparison: Comparison) -> None:
    groups = comparison.row("fine").groups["easy-vqa"]
    assert set(groups) == {"shape", "colour"}
    assert groups["shape"].difference is not None
    halves = (groups["shape"].value.mean + groups["colour"].value.mean) / 2
    assert halves == pytest.approx(comparison.row("fine").scores["easy-vqa"].value.mean)


def test_one_seed_falls_back_to_questions_and_says_so(tmp_path: Path) -> None:
    one = compare(load_run(fake_run(tmp_path, seeds=(0,))))
    score = one.row("full").scores["easy-vqa"]
    assert score.difference is not None
    assert score.difference.over == "questions"
    assert score.verdict == "better, larger than the noise over questions, seed noise unknown"
    assert one.row("fine").loss.verdict == "no interval, so noise unknown"
    assert "95 % paired bootstrap over 400 questions, one seed: says nothing about seed noise" in one.table()
    assert "(one seed)" in one.headline()


def test_seeds_that_do_not_match_are_not_compared(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("uniform",), seeds=(0, 1, 2))
    schedules = {s.name: s for s in load_run(tmp_path).schedules}
    fake_trial(tmp_path, "fine", 7, schedules["fine"])
    comparison = compare(load_run(tmp_path))
    assert comparison.row("fine").loss.difference is None
    assert "no common seed" in comparison.headline()


@pytest.mark.parametrize(("value", "maximum", "unit"), [(1200.9, 2000.0, ""), (61.25, 100.0, "%"), (0.0, 2000.0, "")])
def test_a_score_that_is_no_mean_of_credits_gets_no_interval_over_questions(
    tmp_path: Path, value: float, maximum: float, unit: str
) -> None:
    fake_run(tmp_path, names=("uniform", "fine"), seeds=(0,))
    for path in tmp_path.glob("trials/*/record.json"):
        record = json.loads(path.read_text())
        record["scores"][0] |= {"value": value, "maximum": maximum}
        write_json(path, record)
    score = compare(load_run(tmp_path)).row("fine").scores["easy-vqa"]
    assert (score.unit, score.value.low) == (unit, None)


def test_a_baseline_alone_is_compared_with_nothing(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("zero-shot", "uniform"), seeds=(0,))
    table = compare(load_run(tmp_path)).table()
    assert "uniform" in table
    assert "Difference to" not in table


def test_intervals_over_different_numbers_of_questions_are_told_once() -> None:
    told = _merged(["bootstrap over 1,283 questions, one seed", "over seeds", "bootstrap over 350 questions, one seed"])
    assert told == ("bootstrap over 350 to 1,283 questions, one seed", "over seeds")


def test_without_a_validation_file_losses_are_left_out(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("uniform", "fine"), seeds=(0, 1, 2))
    for path in tmp_path.glob("trials/*/record.json"):
        write_json(path, json.loads(path.read_text()) | {"validation_loss": None})
    comparison = compare(load_run(tmp_path))
    assert len(comparison.findings()) == 1
    assert all(row[1] != "validation loss" for row in comparison.differences())
    assert "Validation loss</h3>" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_parameters_that_differ_from_the_schedule_are_an_error(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("uniform", "fine"), seeds=(0,))
    path = tmp_path / "trials" / "fine-seed0" / "record.json"
    record = json.loads(path.read_text())
    record["trained"]["lora"] -= 1
    write_json(path, record)
    with pytest.raises(RunFolderError, match=r"'fine' disagree on LoRA parameters.*75,439, 75,440"):
        compare(load_run(tmp_path))


def test_text_and_json(comparison: Comparison) -> None:
    table = comparison.table()
    fine = next(line for line in table.splitlines() if line.startswith("fine"))
    assert re.search(r"fine +5 +75,440 +95\.68 % +0\.\d{4} ± 0\.\d{4} +\d\d\.\d\d ± \d\.\d\d %", fine)
    assert "95 % paired t interval over 5 seeds" in table
    assert max(map(len, table.splitlines())) <= 100
    assert comparison.headline().startswith("fine at 75,440 LoRA parameters (5 seeds): easy-vqa ")
    data = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    assert [row["lora_parameters"] for row in data["rows"]] == [0, 78848, 77616, 75440, 0]
    assert data["rows"][3]["scores"]["easy-vqa"]["difference"]["over"] == "seeds"


def test_folders_that_do_not_read(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        load_run(tmp_path)
    fake_run(tmp_path, names=("uniform",), seeds=(0,))
    verdicts = tmp_path / "trials" / "uniform-seed0" / "verdicts" / "easy-vqa.jsonl"
    verdicts.write_text(verdicts.read_text() + '{"id": "cut o')
    with pytest.raises(RunFolderError, match=r"easy-vqa\.jsonl, line 401 is not valid JSON.*Score the predictions"):
        load_run(tmp_path)
    (tmp_path / "trials" / "uniform-seed0" / "record.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"record\.json does not read"):
        load_run(tmp_path)


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> RunData:
    """As `tune` leaves it: no schedule files."""
    home = tmp_path_factory.mktemp("moved")
    fake_run(home, ("uniform", "squeeze", "dynamic"), (0, 1), n_layers=3, questions=20, profile=False)
    shutil.rmtree(home / "schedules")
    write_report(home)
    return load_run(home)


def test_most_trainable_parameters_stand_beside_the_shipped_ones(moved: RunData, comparison: Comparison) -> None:
    found = compare(moved)
    head, *rows = found.overview()
    shown = {row[0]: (row[head.index("LoRA parameters")], row[head.index("most trainable")]) for row in rows}
    cost = moved.ended_schedules()[0].graph.cost
    squeeze = found.row("squeeze")
    assert shown["uniform"] == (f"{8 * cost:,}",) * 2
    assert shown["squeeze"] == (f"{squeeze.parameters:,}", f"{16 * cost:,}")
    assert squeeze.to_json()["most_trainable"] == 16 * cost
    assert f"LoRA parameters, {16 * cost:,} in training (2 seeds)" in found.headline()
    assert f'<td class="number">{16 * cost:,}</td>' in (moved.folder / "report.html").read_text(encoding="utf-8")
    assert "most trainable" not in comparison.table()


def test_learning_rates_are_shown_where_trials_differ(moved: RunData, comparison: Comparison) -> None:
    assert differing_rates({"one": [{"a": 1e-3, "b": 4e-3}], "two": [{"a": 1e-3, "b": 4e-3}]}) == []
    varied = {"one": [{"a": 1e-3, "b": 4e-3}], "two": [{"a": 1e-3, "b": 2e-3}, {"a": 1e-3, "b": 8e-3}]}
    assert differing_rates(varied) == [["schedule", "B"], ["one", "0.004"], ["two", "0.002 to 0.008"]]
    assert differing_rates({"one": [{"a": 1}, {}], "two": [{"a": 2}], "three": [{}]})[3] == ["three", "–"]
    trial = TrialRecord("fine", 0, None, {"lora": 1}, (), 2.0, (), 1.0, learning_rates={"a": 1, "projector": 2})
    assert own_rates(trial) == {"a": 1}
    assert own_rates(replace(trial, trained={"lora": 1, "projector": 3})) == {"a": 1, "projector": 2}
    rates = "Peak learning rates"
    assert "0.0025 to 0.0026  0.01 to 0.0104" in compare(moved).table()
    assert rates in (moved.folder / "report.html").read_text(encoding="utf-8")
    assert rates not in comparison.table()


def test_seeds_whose_ranks_moved_may_ship_different_counts(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("uniform", "squeeze"), seeds=(0, 1), n_layers=2, questions=5)
    path = tmp_path / "trials" / "squeeze-seed1" / "record.json"
    record = json.loads(path.read_text())
    one = record["schedule"]
    one["ranks"][0]["q_proj"] -= 1
    one["parameters"] -= 128
    record["trained"]["lora"] -= 128
    write_json(path, record)
    assert compare(load_run(tmp_path)).row("squeeze").parameters == one["parameters"] + 128
    record["trained"]["lora"] -= 1
    write_json(path, record)
    with pytest.raises(RunFolderError, match="'squeeze' disagree on LoRA parameters"):
        compare(load_run(tmp_path))


class Page(HTMLParser):
    """What a page refers to, and the text of its headings."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]


def test_the_page_holds_every_part_and_fetches_nothing(run: Path) -> None:
    path = write_report(run)
    assert path == run / "report.html"
    assert not list(run.glob("*.tmp")) + list(run.glob(".*.tmp"))
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.references == []
    assert "link" not in page.tags
    assert "default-src 'none'" in text
    assert "@import" not in text.split("</style>")[0]
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        "What was run",
        "Result",
        "Where the gradients are",
        "Where the rank goes",
        "Training",
        "Configuration",
    ]
    for part in (
        "fine at 75,440 LoRA parameters",
        "hydra-vlm tune --out RUN",
        "Gradient norm by layer",
        "Gradient norm by component",
        "Parameters against budget",
        "Training loss",
        "Validation loss",
        "uniform LoRA at rank 8",
        "95 % paired t interval over 5 seeds",
        "<td>Gate</td>",
        "batch_size: 32",
    ):
        assert part in text, part


def test_text_from_outside_is_escaped(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    graph = llama_graph("tiny", 8, 64, 176)
    evil = RankSchedule(name, graph, (8,) * len(graph.projections), 8 * graph.cost)
    fake_run(tmp_path, names=("uniform", "fine", name), seeds=(0, 1, 2), extra={name: evil})
    (tmp_path / "config.yaml").write_text("model: '</script><b>x'\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert "<img" not in body
    assert "<b>" not in body
    assert "&lt;img src=x" in body
    assert body.count("<script") == body.count("</script>")


@pytest.mark.parametrize("linked", ["config.yaml", "schedules", "trials", "trials/fine-seed0/verdicts"])
def test_links_out_of_the_run_are_not_followed(tmp_path: Path, linked: str) -> None:
    fake_run(tmp_path / "run", names=("uniform", "fine"), seeds=(0,))
    (tmp_path / "run" / linked).rename(tmp_path / "other")
    (tmp_path / "run" / linked).symlink_to(tmp_path / "other")
    with pytest.raises(RunFolderError, match="a link leads to"):
        write_report(tmp_path / "run")


def test_labels_hold_neither_markup_nor_what_plotly_fills_in() -> None:
    trial = TrialRecord("<b>%{x}", 0, None, {}, ((1, 2.0),), 2.0, (), 1.0)
    curve = figures.loss_curves([trial]).data[0]
    assert curve.name == "&lt;b&gt;&#37;{x}"
    assert curve.hovertemplate.startswith("&lt;b&gt;&#37;{x}, step %{x}")


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ({"names": ()}, "No trial has finished"),
        ({"profile": False}, "no profile.json"),
        ({"names": ("fine",)}, "No trial of the baseline has finished"),
    ],
)
def test_a_run_that_is_not_complete_says_what_is_missing(tmp_path: Path, missing: dict[str, Any], says: str) -> None:
    fake_run(tmp_path, **{"seeds": (0, 1, 2), "questions": 50} | missing)
    (tmp_path / "trials" / "coarse-seed9").mkdir(parents=True)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert says in text
    assert "Unfinished: coarse-seed9" in text
    assert ("<h3>Gradient norm</h3>" in text) == missing.get("profile", True)


def test_a_folder_with_a_configuration_only(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("not: [valid")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    for says in ("No trial has finished", "no profile.json", "no schedules yet", "no environment.json"):
        assert says in text


def test_ranks_over_budget_are_marked(tmp_path: Path) -> None:
    graph = llama_graph("tiny", 8, 64, 176)
    config2 = hand_schedule(graph, ((0, 1), (2, 3, 4, 5), (6, 7)), (16, 8, 16), 8 * graph.cost, "config2")
    fake_run(tmp_path, names=("uniform", "config2"), seeds=(0, 1, 2), extra={"config2": config2})
    run = load_run(tmp_path)
    assert "150.00 % OVER" in compare(run).table()
    assert "OVER BUDGET" in figures.budget_bars(run.schedules).to_json()
    assert figures.rank_reach(run.schedules) == 8


def test_step_sizes_stand_beside_ranks(tmp_path: Path) -> None:
    graph = llama_graph("tiny", 2, 64, 176)
    made: dict[str, RankSchedule] = {}
    for rule, text, told in (
        ("constant", "9<sup>1.50</sup>", ", scale 2, step 1.50"),
        ("balanced", "9", ", scale 1.333, step 1.00"),
    ):
        made[rule] = hand_schedule(graph, ((0,), (1,)), (1, 9), 4 * graph.cost, rule, Scaling(rule, 2.0))
        heat = figures.rank_map(made[rule], 4).data[0]
        assert (set(heat.text[1]), set(heat.customdata[1])) == ({text}, {told})
    page = write_report(fake_run(tmp_path, names=("uniform",), n_layers=2, extra=made)).read_text(encoding="utf-8")
    assert "1: 2 (0.50), 9: 2 (1.50)" in page
    assert "1: 4 (1.00), 9: 1.333 (1.00)" in page


@pytest.mark.parametrize("n_layers", [1, 8, 40])
def test_figures_of_small_and_large_models(tmp_path: Path, n_layers: int) -> None:
    run = load_run(fake_run(tmp_path, names=(), n_layers=n_layers))
    assert run.profile is not None
    fine = next(schedule for schedule in run.schedules if schedule.name == "fine")
    curve = figures.layer_curve(run.profile, fine.stages)
    stages = [trace for trace in curve.data if trace.name and trace.name.startswith("stage")]
    assert len({trace.marker.color for trace in stages}) == min(3, n_layers)
    assert sorted(layer for trace in stages for layer in trace.x) == list(range(1, n_layers + 1))
    heat = figures.rank_map(fine, 4).data[0]
    assert [list(row) for row in heat.z] == [list(layer.values()) for layer in fine.by_layer()]
    assert list(heat.x) == ["Q", "K", "V", "O", "Gate", "Up", "Down"]


def test_every_measured_signal_has_a_map_under_its_name(tmp_path: Path) -> None:
    graph = llama_graph("tiny", 8, 64, 176)
    signal = Signal(graph, "effective_rank", tuple(map(float, range(len(graph.projections)))), 8, "Directions <b>.")
    fake_run(tmp_path, names=(), profile=False)
    write_json(tmp_path / "signals/effective_rank.json", signal.to_json())
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h3>Effective rank</h3>" in text
    assert "Directions &lt;b&gt;. 8 steps." in text
    heat = figures.signal_map(signal).data[0]
    assert [list(row) for row in heat.z] == [list(layer.values()) for layer in signal.by_layer()]
    assert "effective rank" in heat.hovertemplate
    (tmp_path / "signals/effective_rank.json").write_text("{}")
    with pytest.raises(RunFolderError, match=r"effective_rank\.json does not read"):
        write_report(tmp_path)


def test_the_report_loads_no_torch() -> None:
    code = "import sys, hydra_vlm.report.page; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_of_all_six_benchmarks_leads_with_their_average(tmp_path: Path) -> None:
    fake_run(tmp_path, names=("uniform", "fine"), seeds=(0,))
    for path in tmp_path.glob("trials/*/record.json"):
        record = json.loads(path.read_text())
        six = {"mme": 1000.0, "mmbench": 40.0, "textvqa": 30.0, "pope": 80.0, "gqa": 50.0, "scienceqa": 70.0}
        scores = [Score(name, value, 10, maximum=2000.0 if name == "mme" else 100.0) for name, value in six.items()]
        write_json(path, record | {"scores": [score.to_json() for score in scores[: 6 if "fine" in str(path) else 5]]})
    comparison = compare(load_run(tmp_path))
    assert "average" in comparison.benchmarks
    assert comparison.row("fine").scores["average"].value.mean == pytest.approx((50 + 40 + 30 + 80 + 50 + 70) / 6)
    assert "average" not in comparison.row("uniform").scores


def test_validation_losses_on_the_way_are_marked_and_the_kept_step_ringed() -> None:
    trial = TrialRecord("fine", 0, None, {"lora": 1}, ((1, 3.0), (2, 2.0)), 2.1, (), 1.0)
    assert [line.mode for line in figures.loss_curves([trial]).data] == ["lines"]
    watched = replace(trial, validation_losses=((1, 2.1), (2, math.nan), (3, 2.4)), kept_step=1)
    lines, marks = figures.loss_curves([watched]).data
    assert (lines.mode, list(marks.x), list(marks.y)) == ("lines", [1, 3], [2.1, 2.4])
    assert list(marks.marker.symbol) == ["circle-open", "x-thin-open"]


def test_ranks_that_moved_are_a_film_from_the_start_on(moved: RunData) -> None:
    trial = next(trial for trial in moved.trials if trial.key == "dynamic-seed1")
    strip = move_figures.frames(trial)
    assert [frame.name for frame in strip] == ["Start", "After step 60", "After step 90", "After step 120"]
    assert [frame.ranks for frame in strip] == [trial.moves[0].before, *(move.after.ranks for move in trial.moves)]
    assert {frame.budget for frame in strip} == {8 * strip[0].graph.cost}
    text = (moved.folder / "report.html").read_text(encoding="utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[3:7] == ["Where the rank goes", "How ranks moved", "What the pilot tried", "Training"]
    films = text.split('class="grid film"')[1:]
    assert [film.split('class="note"')[0].count('class="plot"') for film in films] == [4, 2]
    low, high = min(strip[-1].ranks), max(strip[-1].ranks)
    for told in ("dynamic, seed 1", "<td>spectral</td>", f"<td>16 → {low}–{high}</td>", "0.4600", "0.4900", "+6.5 %"):
        assert told in text, told
    assert [schedule.name for schedule in moved.ended_schedules()] == ["uniform", "dynamic-seed1", "squeeze-seed1"]


@pytest.mark.parametrize("n_layers", [3, 58])
def test_a_spectrum_shows_what_was_kept_and_what_was_cut(n_layers: int) -> None:
    schedule = fake_schedules(fake_profile(llama_graph("tiny", n_layers, 64, 176)))["fine"]
    (move,) = fake_moves(schedule, (100,), "spectral")
    figure = move_figures.spectrum_figure(move)
    kept, cut, edge = figure.data
    assert (len(kept.x) // 3, len(cut.x) // 3) == (sum(schedule.ranks), sum(move.before) - sum(schedule.ranks))
    # the second projection in the figure is Q of layer 2, the eighth of the graph
    values, rank = move.spectra[7], schedule.ranks[7]
    assert (edge.x[3], edge.x[4]) == (0.5, 1.5)
    assert values[rank - 1] > edge.y[3] > values[rank]
    assert edge.customdata[3].startswith(f"layer 2, Q: {rank} of 16 kept, last kept ")
    assert figure.layout.yaxis.type == "log"
    assert len(figure.data) == 3
    assert len(figure.to_json()) < 600_000


def test_a_spectrum_of_zeros_or_without_lora_is_drawn_too() -> None:
    schedule = fake_schedules(fake_profile(llama_graph("tiny", 1, 64, 176)))["uniform"]
    (move,) = fake_moves(schedule, (100,), "spectral")
    ranks = (0, 8, 8, 16, 8, 8, 8)
    spectra = (move.spectra[0], (), (0.0,) * 16, *move.spectra[3:])
    kept, cut, edge = move_figures.spectrum_figure(
        replace(move, after=replace(schedule, ranks=ranks), spectra=spectra)
    ).data
    assert len(edge.x) == 3 * 6
    assert edge.y[0] > move.spectra[0][0]  # everything was cut
    assert edge.y[6] < move.spectra[3][-1]  # nothing was
    assert min(y for y in (*kept.y, *cut.y) if y is not None) > 0
    assert len(kept.x) == 3 * (8 + 16 + 8 + 8 + 8)
    near = replace(move, spectra=((0.8, 0.3),) * 7)  # no power of ten lies within
    assert "0.5" in move_figures.spectrum_figure(near).layout.yaxis.ticktext


def test_probes_are_shown_with_their_losses_and_the_chosen_one_ringed(moved: RunData) -> None:
    trial = next(trial for trial in moved.trials if trial.key == "dynamic-seed1")
    move = replace(trial.moves[0], probed=(((1,) * 21, math.nan), *trial.moves[0].probed))
    _, probed, chosen = move_figures.probes_figure(move).data
    assert list(probed.x) == [2, 3, 4, 5]
    assert (list(chosen.x), list(chosen.y)) == ([5], [0.49])
    again = Move.from_json(json.loads(json.dumps(move.to_json(), allow_nan=False)))
    assert math.isnan(again.probed[0][1])
    text = (moved.folder / "report.html").read_text(encoding="utf-8")
    assert text.count("Every probe, the chosen one in bold") == 3  # dynamic's, decided by phi
    assert text.count(f'<tr class=chosen><td class="number">4</td><td class="number">{0.49:.4f}</td>') == 3


def test_a_pilot_is_a_table_of_what_was_tried_and_what_won(moved: RunData) -> None:
    text = (moved.folder / "report.html").read_text(encoding="utf-8")
    tables = [part.split("</table>")[0] for part in text.split("<summary>")[1:] if part.startswith("squeeze, seed 1:")]
    (shown,) = tables
    assert shown.startswith("squeeze, seed 1: 0.0026 (B x 4, projector 0.001), the best of 4; 60 steps")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in shown.split("<tr")[2:]]
    assert rows[0] == ["0.001", "4", "0.001", "0.9000", "19", ""]
    assert rows[1][3:] == ["–", "19", "ended early: its loss doubled or was no number"]
    assert rows[2][3:] == ["0.6990", "19", "tied, at higher rates"]
    assert rows[3] == ["0.0026", "4", "0.001", "0.7000", "19", "won"]
    assert [row.startswith(" class=chosen") for row in shown.split("<tr")[2:]] == [False, False, False, True]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"spectra": [[1.0]]}, "spectra of the move after step 100 does not fit"),
        ({"probed": [[[1, 2], 0.5]]}, "probed of the move after step 100 does not fit"),
        ({"before": [8]}, "before of the move after step 100 does not fit"),
    ],
)
def test_a_move_that_does_not_fit_its_schedule_is_refused(tmp_path: Path, edit: dict[str, Any], says: str) -> None:
    fake_run(tmp_path, names=("squeeze",), seeds=(0,), n_layers=1, questions=5, profile=False)
    path = tmp_path / "trials" / "squeeze-seed0" / "record.json"
    record = json.loads(path.read_text())
    record["moves"][0] |= edit
    write_json(path, record)
    with pytest.raises(RunFolderError, match=says):
        write_report(tmp_path)


def test_moves_are_marked_on_the_training_loss() -> None:
    schedule = fake_schedules(fake_profile(llama_graph("tiny", 1, 64, 176)))["fine"]
    trial = TrialRecord("squeeze", 0, schedule, {"lora": 1}, ((1, 3.0), (200, 2.0)), 2.1, (), 1.0)
    moves = fake_moves(schedule, (60, 90), "spectral")
    marked = figures.loss_curves([replace(trial, moves=(moves[0], replace(moves[1], loss_before=math.nan)))]).data
    assert [(list(marks.x), list(marks.y)) for marks in marked[1:]] == [([60, 60], [0.46, 0.49])]
